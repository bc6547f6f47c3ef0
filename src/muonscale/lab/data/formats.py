"""Recognize files that are not text: by their names, by their first bytes, and by NUL bytes.

A reader of text would read many of them without an error: the NUL byte is UTF-8, and so are the
headers of an archive and the cells of a table.
"""

from __future__ import annotations

import re
from pathlib import PurePosixPath

from muonscale.errors import DataError

TEXT = "convert it to text, JSONL or parquet"
UNPACK = "unpack it first"
TABLE = "convert it to JSONL or parquet, and name the column that holds the text with data.field"
TOKENS = "tokens need data.format=tokens and their data.tokenizer"
MOVE = "move it out of data.path"
UTF_16 = "UTF-16 text"
BINARY = "binary data"

KINDS: dict[tuple[str, str], str] = {
    ("a table", TABLE): "xls xlsx ods orc avro",
    ("an archive", UNPACK): "7z rar jar whl deb rpm iso dmg",
    ("compressed", UNPACK): "lz4 lzma br z",
    ("binary data, such as tokens", TOKENS): "bin npy npz idx memmap mmap",
    ("a checkpoint or pickled data", MOVE): "pt pth ckpt safetensors pkl pickle gguf onnx joblib",
    ("a database or an array file", TEXT): "db sqlite sqlite3 h5 hdf5 mdb lmdb tfrecord",
    ("a document with a format of its own", TEXT): "pdf doc docx odt rtf epub mobi ppt pptx odp",
    ("an image", MOVE): "png jpg jpeg gif webp bmp tif tiff ico heic psd",
    ("audio or video", MOVE): "mp3 wav flac ogg m4a aac mp4 avi mov mkv webm",
    ("a program or a font", MOVE): "exe dll so dylib o pyc class wasm ttf otf woff woff2",
}
"""What files with these suffixes are, and what to do, to the suffixes."""

SUFFIXES = {f".{name}": kind for kind, names in KINDS.items() for name in names.split()}

MAGIC: dict[bytes, tuple[str, str]] = {
    b"\xff\xfe": (UTF_16, "convert it to UTF-8"),
    b"\xfe\xff": (UTF_16, "convert it to UTF-8"),
    b"\x1f\x8b": ("gzip data", "give it the suffix .gz"),
    b"\x28\xb5\x2f\xfd": ("zstd data", "give it the suffix .zst"),
    b"PK\x03\x04": ("a zip archive", "give it the suffix .zip"),
    b"BZh": ("bzip2 data", "give it the suffix .bz2"),
    b"\xfd7zXZ\x00": ("xz data", "give it the suffix .xz"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"PAR1": ("parquet data", "give it the suffix .parquet"),
    b"ARROW1": ("an Arrow file", "give it the suffix .arrow"),
    b"\x93NUMPY": ("a NumPy array", TOKENS),
    # The header of modded-nanogpt's tokens: the integer 20240520, little-endian.
    b"\x88\xd8\x34\x01": ("a file of tokens", TOKENS),
    b"SQLite format 3\x00": ("a SQLite database", TEXT),
    b"\x89HDF\r\n": ("an HDF5 file", TEXT),
    b"%PDF-": ("a PDF document", TEXT),
    b"\x89PNG\r\n": ("a PNG image", MOVE),
    b"\xff\xd8\xff": ("a JPEG image", MOVE),
    b"GIF8": ("a GIF image", MOVE),
    b"\x7fELF": ("a program", MOVE),
}
"""First bytes of files that are not UTF-8 text: what they are, and what to do."""

TAR = 257, b"ustar"
"""Offset and bytes of the mark of a tar archive."""
HEAD_BYTES = 512
"""How many leading bytes `check_content` needs."""

SHORT = 4096
"""Bytes up to which the share of bad ones is not counted."""
MOST_REPLACED = 0.1
"""Share of replacement characters from which on the data is not UTF-8 with a few errors."""


class ForeignError(DataError):
    """A file holds no text for the corpus.

    Args:
        message: the error.
        reason: what the file is, in a few words.
        of_records: whether it has records, which are not those of the corpus.
    """

    def __init__(self, message: str, reason: str, *, of_records: bool = False) -> None:
        super().__init__(message)
        self.reason, self.of_records = reason, of_records


def check_name(place: str, name: str) -> None:
    """Raise ForeignError if the name of the file at a place says that it is not text."""
    kind = SUFFIXES.get(PurePosixPath(name).suffix.lower())
    if kind is not None:
        raise ForeignError(f"{place} is {kind[0]} by its name; {kind[1]}", kind[0])


def check_content(place: str, head: bytes) -> None:
    """Raise DataError if the first bytes of the file at a place say that it is not text.

    It is a ForeignError but for text in another encoding.
    """
    offset, mark = TAR
    if head[offset:].startswith(mark):
        raise ForeignError(f"{place} is a tar archive; give it the suffix .tar", "a tar archive")
    # BZh is a word of some texts: bzip2 continues with its level and the digits of pi.
    for magic, (what, todo) in MAGIC.items():
        if head.startswith(magic) and (magic != b"BZh" or re.match(rb"BZh[1-9]1AY", head)):
            message = f"{place} is {what}; {todo}"
            raise DataError(message) if what == UTF_16 else ForeignError(message, what)


def is_other_encoding(data: bytes) -> bool:
    """Return whether too much of the data is not UTF-8 for replacement characters to leave text."""
    if len(data) <= SHORT:
        return False
    text = data.decode("utf-8", "replace")
    return text.count("\ufffd") > MOST_REPLACED * len(text)
