"""Recognize files that are not text: by their names, by their first bytes, and by NUL bytes.

A reader of text would read many of them without an error: the NUL byte is UTF-8, and so are the
headers of an archive and the cells of a table.
"""

from __future__ import annotations

import re
from pathlib import Path

TEXT = "convert it to text, JSONL or parquet"
UNPACK = "unpack it first"
TABLE = "convert it to JSONL or parquet, and name the column that holds the text with data.field"
TOKENS = "give the text that the tokens were made of"
MOVE = "move it out of data.path"

KINDS: dict[tuple[str, str], str] = {
    ("a table", TABLE): "csv tsv psv xls xlsx ods feather orc avro",
    ("an Arrow file", "save the data set as parquet, and name its column with data.field"): "arrow",
    ("an archive", UNPACK): "tar tgz tbz2 txz zip 7z rar jar whl deb rpm iso dmg",
    ("compressed", UNPACK): "gz bz2 xz zst lz4 lzma br z",
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
    b"\xff\xfe": ("UTF-16 text", "convert it to UTF-8"),
    b"\xfe\xff": ("UTF-16 text", "convert it to UTF-8"),
    b"\x1f\x8b": ("gzip data", UNPACK),
    b"\x28\xb5\x2f\xfd": ("zstd data", UNPACK),
    b"PK\x03\x04": ("a zip archive", UNPACK),
    b"BZh": ("bzip2 data", UNPACK),
    b"\xfd7zXZ\x00": ("xz data", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"PAR1": ("parquet data", "give it the suffix .parquet"),
    b"ARROW1": ("an Arrow file", TEXT),
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
"""First bytes of a file that `describe_content` needs."""

SHORT = 4096
"""Bytes up to which the share of bad ones is not counted."""
MOST_REPLACED = 0.1
"""Share of replacement characters from which on the data is not UTF-8 with a few errors."""


def describe_name(path: Path) -> str | None:
    """Return what a file that is not text is by its name, and what to do; None for other names."""
    kind = SUFFIXES.get(path.suffix.lower())
    return None if kind is None else f"{path} is {kind[0]} by its name; {kind[1]}"


def describe_content(path: Path, head: bytes) -> str | None:
    """Return what a file that is not text is by its first bytes, and what to do; None for text."""
    offset, mark = TAR
    if head[offset:].startswith(mark):
        return f"{path} is a tar archive; {UNPACK}"
    # BZh is a word of some texts: bzip2 continues with its level and the digits of pi.
    for magic, (what, todo) in MAGIC.items():
        if head.startswith(magic) and (magic != b"BZh" or re.match(rb"BZh[1-9]1AY", head)):
            return f"{path} is {what}; {todo}"
    return None


def is_other_encoding(data: bytes) -> bool:
    """Return whether too much of the data is not UTF-8 for replacement characters to leave text."""
    if len(data) <= SHORT:
        return False
    text = data.decode("utf-8", "replace")
    return text.count("\ufffd") > MOST_REPLACED * len(text)
