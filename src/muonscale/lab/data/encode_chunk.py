"""The tokens of a chunk of text; as a program, those of the chunks that its input names.

It imports little, so that a process starts fast. `encode` starts it with the arguments of
`Encoder`, and writes the arguments of `write` as lines of JSON. Each is answered with the number of
tokens, or with code and text of an OSError.
"""

from __future__ import annotations

import json
import mmap
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

Cut = tuple[int, int, bool]
"""Start and end of a piece of text, and whether a document begins with it."""
PARTIAL = ".partial"
"""Suffix of shards that are not complete."""


class Encoder:
    """Encodes text of one file, with one tokenizer.

    Args:
        setting: the paths `tokenizer` and `text`, the `dtype` of the shards, the id `end` of the
            end of text, and `batch_bytes` of text to encode at once.
    """

    def __init__(self, setting: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._setting = setting
        self._tokenizer = Tokenizer.from_str(Path(setting["tokenizer"]).read_text("utf-8"))
        self._tokenizer.encode_special_tokens = True
        with Path(setting["text"]).open("rb") as file:
            self._text = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __enter__(self) -> Encoder:
        return self

    def __exit__(self, *_: object) -> None:
        self._text.close()

    def write(self, chunk: list[Cut], path: Path) -> int:
        """Write the tokens of a chunk under a temporary name, rename it, and return their number.

        Args:
            chunk: start, end and whether a document begins, of pieces of the text.
            path: the shard.

        Raises:
            OSError: if the disk is full or read-only.
        """
        temporary = path.with_suffix(f".{os.getpid()}{PARTIAL}")
        count = 0
        with temporary.open("wb") as file:
            for batch in self._batches(chunk):
                texts = [self._text[start:end].decode("utf-8") for start, end, _ in batch]
                found = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
                for (_, _, first), encoding in zip(batch, found, strict=True):
                    ids = [self._setting["end"], *encoding.ids] if first else encoding.ids
                    file.write(np.array(ids, dtype=self._setting["dtype"]).tobytes())
                    count += len(ids)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        return count

    def _batches(self, chunk: list[Cut]) -> Iterator[list[Cut]]:
        batch: list[Cut] = []
        size = 0
        for piece in chunk:
            batch.append(piece)
            size += piece[1] - piece[0]
            if size >= self._setting["batch_bytes"]:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch


def end_with_parent(parent: int) -> None:
    """End this process when its parent was killed: the next one would do its work again."""
    while os.getppid() == parent:
        time.sleep(0.2)
    os._exit(1)


def main() -> None:
    """Encode the chunks that the standard input names."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that waits decides
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()
    encoder = None
    with ExitStack() as stack:
        for line in sys.stdin:
            chunk, path = json.loads(line)
            try:
                if encoder is None:
                    encoder = stack.enter_context(Encoder(json.loads(sys.argv[1])))
                answer: Any = encoder.write(chunk, Path(path))
            except OSError as error:
                answer = [error.errno, error.strerror, error.filename]
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
