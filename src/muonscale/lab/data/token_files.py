"""Tokens that another program wrote: files of `data.format=tokens`.

| file | written by | ids |
|---|---|---|
| `.bin` without a header | nanoGPT | `data.token_dtype` |
| `.bin` with the header of llm.c | llm.c, modded-nanogpt | uint16 or uint32, said by the header |
| `.bin` with an `.idx` beside it | Megatron-LM | said by the `.idx` |
| `.npy` | NumPy | said by the file |

The ids are used as they are: no end of text is added. Files are told to be of the validation split
by their names. Without one, the end of the tokens is.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from muonscale.errors import DataError, shown
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.folders import SkippedFiles, find_files, unreadable
from muonscale.lab.data.tokenizer import id_limit, token_bytes
from muonscale.lab.data.tokens import TokenWriter, token_dtype
from muonscale.lab.files import check_regular, open_regular, read_bytes, sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HEADER_BYTES = 1024
HEADERS = {(20240520, 1): "<u2", (20240801, 7): "<u4"}
"""Magic number and version of llm.c's headers, and the dtype of the ids."""
MEGATRON = b"MMIDIDX\x00\x00"
MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
CHUNK = 1 << 22
"""Tokens that are copied at once."""
SHOWN = 4096
"""First ids of a file without a header that show whether they are wider than they are read."""
VALIDATION, TEST = (
    re.compile(rf"(?<![a-z])({words})(?![a-z])") for words in ("val|valid|validation", "test")
)

Part = tuple[Path, NDArray[Any]]
"""A file, and ids of it."""


@dataclass
class TokenFiles:
    """The tokens of a corpus, in files."""

    train: list[Part]
    validation: list[Part]
    digests: list[bytes]
    """What identifies every file in its split."""
    left_out: SkippedFiles
    duplicates: int = 0
    """None are looked for."""

    @property
    def size(self) -> int:
        """Bytes of the tokens."""
        return sum(ids.nbytes for _, ids in (*self.train, *self.validation))


def find_token_files(data: DataSection) -> TokenFiles:
    """Open the files of a corpus and divide them into the splits.

    Raises:
        DataError: if a file cannot be read or is not one of tokens, or no file is for training.
    """
    found, left_out = find_files(data)
    files: dict[Path, str] = {}
    for file in found:
        path = Path(file.place)
        if file.system is not None:
            raise DataError(f"data.path={data.title}: tokens are read from local files only")
        if path.suffix not in OPENERS:
            if file.named:
                raise DataError(f"{path} is no file of tokens; accepted: {', '.join(OPENERS)}")
            if path.suffix != ".idx":
                left_out.add("no tokens", file.name)
        elif TEST.search(file.name.lower()):
            left_out.add("a test set", file.name)
        else:
            files[path] = file.name
    is_validation = {path: bool(VALIDATION.search(name.lower())) for path, name in files.items()}
    try:
        parts = [(path, _open(path, data.token_dtype)) for path in files]
        digests = [
            f"{sha256(path)} {ids.dtype} {is_validation[path]}".encode() for path, ids in parts
        ]
    except OSError as error:
        raise unreadable(error.filename or data.title, error) from error
    train = [part for part in parts if not is_validation[part[0]]]
    validation = [part for part in parts if is_validation[part[0]]]
    if not train:
        more = f"; {left_out}" if left_out.counts else ""
        raise DataError(
            f"data.path={data.title} has no file of tokens to train on, only {len(validation)} for "
            f"validation by their names{more}"
        )
    return TokenFiles(train, validation, digests, left_out)


def divide(files: TokenFiles, share: float, end: int) -> None:
    """Move the last `share` of the tokens to the validation split, from an `end` of text on."""
    if files.validation:
        return
    wanted = round(share * sum(ids.size for _, ids in files.train))
    while files.train and files.train[-1][1].size <= wanted:
        files.validation.insert(0, files.train.pop())
        wanted -= files.validation[0][1].size
    if wanted and files.train:
        path, ids = files.train[-1]
        cut = ids.size - wanted
        ends = np.flatnonzero(ids[cut : cut + wanted // 2] == end)
        cut += int(ends[0]) if ends.size else 0
        files.train[-1] = path, ids[:cut]
        files.validation.insert(0, (path, ids[cut:]))


def copy_tokens(
    parts: list[Part],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    split: str,
    progress: Callable[[int], None],
) -> tuple[int, int, int]:
    """Write the tokens of a split as shards.

    Args:
        parts: the tokens.
        tokenizer: the tokenizer that they are of.
        folder: where the shards go.
        split: start of their names.
        progress: called with the bytes done.

    Returns:
        The ends of text, the bytes of text and the tokens.

    Raises:
        DataError: for an id that the vocabulary does not have.
        OSError: if the disk is full or read-only.
    """
    limit, sizes, end = id_limit(tokenizer), token_bytes(tokenizer), tokenizer.eos_token_id
    texts = size = done = 0
    with TokenWriter(folder, split, token_dtype(limit)) as writer:
        for path, start, ids in _chunks(parts):
            if ids.min() < 0 or ids.max() >= limit:
                at = int(np.flatnonzero((ids < 0) | (ids >= limit))[0])
                raise DataError(
                    f"{path} has the id {ids[at]} at {start + at:,}, and data.tokenizer a "
                    f"vocabulary of {limit:,}: it is another tokenizer's, or not of {ids.dtype} "
                    "(data.token_dtype)"
                )
            writer.write(ids)
            texts += int(np.count_nonzero(ids == end))
            size += int(sizes[ids].sum())
            done += ids.nbytes
            progress(done)
    return max(1, texts), size, writer.count


def _chunks(parts: list[Part]) -> Iterator[tuple[Path, int, NDArray[Any]]]:
    for path, ids in parts:
        for start in range(0, ids.size, CHUNK):
            yield path, start, np.array(ids[start : start + CHUNK])


def _open(path: Path, dtype: str) -> NDArray[Any]:
    check_regular(path)
    ids = OPENERS[path.suffix](path, dtype)
    if not ids.size:
        raise DataError(f"{path} holds no tokens")
    return ids


def _open_bin(path: Path, dtype: str) -> NDArray[Any]:
    index = path.with_suffix(".idx")
    if index.exists():
        return _open_megatron(path, index)
    with open_regular(path) as file:
        head = file.read(HEADER_BYTES)
    magic, version, count = np.frombuffer(head.ljust(12, b"\0")[:12], "<i4").tolist()
    if (magic, version) in HEADERS:
        return _map(path, HEADERS[magic, version], HEADER_BYTES, count)
    ids = _map(path, np.dtype(dtype).newbyteorder("<"), 0, None)
    if ids.itemsize == 2 and ids.size > 2 and not ids[1:SHOWN:2].any():
        raise DataError(
            f"{path}: every second id is 0 as {dtype}; its ids have 4 bytes: set "
            "data.token_dtype=uint32"
        )
    return ids


def _map(path: Path, dtype: Any, offset: int, count: int | None) -> NDArray[Any]:
    """Map a file of ids after a header, which says how many they are, None if it does not."""
    size, kind = path.stat().st_size - offset, np.dtype(dtype)
    if size % kind.itemsize or (count is not None and size != count * kind.itemsize):
        said = f"a whole number of {kind} (data.token_dtype)"
        if count is not None:
            said = f"the {count:,} ids of {kind} that its header or index says"
        raise DataError(f"{path} has {size:,} bytes of ids, which are not {said}")
    if not size:
        return np.empty(0, kind)
    return np.memmap(path, kind, "r", offset=offset)


def _open_megatron(path: Path, index: Path) -> NDArray[Any]:
    content = read_bytes(index, at_most=1 << 34)
    at = len(MEGATRON) + struct.calcsize("<QBQQ")
    if not content.startswith(MEGATRON) or len(content) < at:
        raise DataError(f"{index} is no index of Megatron-LM; move it away if {path.name} has none")
    _, code, sequences, _ = struct.unpack_from("<QBQQ", content, len(MEGATRON))
    if code not in MEGATRON_DTYPES or len(content) < at + 12 * sequences:
        raise DataError(f"{index} is damaged, or of ids that are no integers (dtype {code})")
    lengths = np.frombuffer(content, "<i4", sequences, at).astype(np.int64)
    starts = np.frombuffer(content, "<i8", sequences, at + 4 * sequences)
    ids = _map(path, MEGATRON_DTYPES[code], 0, int(lengths.sum()))
    if not np.array_equal(starts, (np.cumsum(lengths) - lengths) * ids.itemsize):
        raise DataError(f"{index}: the sequences of {path.name} do not follow one another")
    return ids


def _open_npy(path: Path, dtype: str) -> NDArray[Any]:
    try:
        ids = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        # numpy's own reason is often that it is a pickle, with the advice to load that
        raise DataError(f"{path} is not what numpy.save writes of integers") from error
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise DataError(
            f"{path} is {shown(ids.dtype.name)} of shape {ids.shape}; tokens are 1-D integers"
        )
    return ids


OPENERS: dict[str, Callable[[Path, str], NDArray[Any]]] = {".bin": _open_bin, ".npy": _open_npy}
"""What opens files of tokens, by suffix."""
