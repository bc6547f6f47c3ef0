"""Text to tokens, in chunks that become shards, on several processes.

The chunks of a split depend on its text alone. A chunk whose shard exists is not encoded again, so
that a preparation that was killed goes on where it was.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from muonscale.errors import DataError, exit_text
from muonscale.lab.data.document_store import DocumentStore, Range
from muonscale.lab.data.encode_chunk import Cut, Encoder
from muonscale.lab.data.tokenizer import id_limit
from muonscale.lab.data.tokens import shard_path, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK_BYTES = 1 << 24
"""Least text of a chunk."""
MOST_CHUNKS = 1000
"""Most chunks of a split."""
PARALLEL_BYTES = 1 << 26
"""Text from which on several processes encode it; a process needs a second to start."""
BATCH_BYTES = 1 << 22
"""Text that this process encodes at once, on the threads of tokenizers. The results take some 50
times as much memory."""
WORKER_BATCH_BYTES = 1 << 19
"""The same for another process, on one thread."""

ItemT = TypeVar("ItemT")


def encode_split(
    documents: DocumentStore,
    ranges: list[Range],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    split: str,
    progress: Callable[[int], None],
    processes: int | None = None,
) -> int:
    """Write the tokens of a split's text as shards, with an end of text before every range.

    Special tokens that a text spells out stay text.

    Args:
        documents: the text.
        ranges: the documents of the split.
        tokenizer: the tokenizer; its `tokenizer.json` is written to `folder.parent`.
        folder: where the shards go.
        split: start of their names.
        progress: called with the bytes of text done.
        processes: processes that encode; None for one for each CPU, if there is much text.

    Returns:
        The number of tokens.

    Raises:
        OSError: if the disk is full or read-only.
        DataError: if a process that encodes ends.
    """
    size = sum(end - start for start, end in ranges)
    if processes is None:
        processes = (
            len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        )
        processes = processes if size >= PARALLEL_BYTES else 1
    dtype = token_dtype(id_limit(tokenizer))
    chunks = batches(
        documents.cuts(ranges), lambda cut: cut[1] - cut[0], max(CHUNK_BYTES, size // MOST_CHUNKS)
    )
    names = ((shard_path(folder, split, number), chunk) for number, chunk in enumerate(chunks))
    saved = folder.parent / "tokenizer.json"
    tokenizer.backend_tokenizer.save(str(saved))
    setting = {"tokenizer": str(saved), "text": str(documents.path), "dtype": dtype.str}
    setting |= {"end": tokenizer.eos_token_id, "batch_bytes": BATCH_BYTES}
    done = count = 0
    for size, tokens in _encode(setting, names, processes or 1):
        done += size
        count += tokens
        progress(done)
    return count


def _encode(
    setting: dict[str, Any], chunks: Iterator[tuple[Path, list[Cut]]], processes: int
) -> Iterator[tuple[int, int]]:
    """Yield the bytes of text and the tokens of every chunk, in the order they are finished."""
    width = int(setting["dtype"][-1])

    def known(path: Path) -> int | None:
        return path.stat().st_size // width if path.exists() else None

    def size(chunk: list[Cut]) -> int:
        return sum(end - start for start, end, _ in chunk)

    if processes == 1:
        with Encoder(setting) as encoder:
            for path, chunk in chunks:
                tokens = known(path)
                yield size(chunk), encoder.write(chunk, path) if tokens is None else tokens
        return
    with ExitStack() as stack:
        workers: SimpleQueue[Worker] = SimpleQueue()
        for _ in range(processes):
            own = setting | {"batch_bytes": WORKER_BATCH_BYTES}
            workers.put(stack.enter_context(Worker(own)))
        pool = stack.enter_context(ThreadPoolExecutor(processes))

        def work(path: Path, chunk: list[Cut]) -> tuple[int, int]:
            worker = workers.get()
            try:
                return size(chunk), worker.write(chunk, path)
            finally:
                workers.put(worker)

        waiting: set[Future[tuple[int, int]]] = set()
        for path, chunk in chunks:
            if (tokens := known(path)) is not None:
                yield size(chunk), tokens
                continue
            waiting.add(pool.submit(work, path, chunk))
            if len(waiting) > processes:
                finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in finished)
        while waiting:
            finished, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in finished)


class Worker:
    """A process that encodes chunks, on one thread. It ends with this one: its input then ends."""

    def __init__(self, setting: dict[str, Any]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "muonscale.lab.data.encode_chunk", json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )

    def write(self, chunk: list[Cut], path: Path) -> int:
        """Write the tokens of a chunk, and return their number; errors as for `encode_split`."""
        tasks, answers = self._process.stdin, self._process.stdout
        assert tasks is not None and answers is not None
        answer = ""
        with suppress(BrokenPipeError):
            tasks.write(json.dumps([chunk, str(path)]) + "\n")
            tasks.flush()
            answer = answers.readline()
        if not answer:
            how = exit_text(self._process.wait())
            raise DataError(
                f"a process that tokenizes ended with {how}, at {path}; repeat with fewer processes: "
                "muonscale prepare --processes N, with the same words as before"
            )
        found = json.loads(answer)
        if isinstance(found, list):
            raise OSError(found[0], found[1], found[2] or str(path))
        return found

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:  # closes the pipes and waits
            pass


def batches(
    items: Iterable[ItemT], size_of: Callable[[ItemT], int], limit: int
) -> Iterator[list[ItemT]]:
    """Yield lists of items whose sizes sum to `limit` or a little more."""
    batch: list[ItemT] = []
    size = 0
    for item in items:
        batch.append(item)
        size += size_of(item)
        if size >= limit:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
