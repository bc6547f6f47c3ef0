"""Documents, what the readers of files take, and the reader of text.

`readers` has the reader of each suffix. All bytes are decoded here. Errors name the file and the
place of whatever is not UTF-8 or not a string. A large file is read in pieces of about a megabyte.
docs/decisions.md ("Files are read by our own code") says why this is not done by the datasets
library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, Protocol

from muonscale.errors import DataError
from muonscale.lab.data.formats import BINARY, ForeignError, is_other_encoding

if TYPE_CHECKING:
    from muonscale.lab.data.readers import Selection

PIECE_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"
ErrorsT = Literal["strict", "replace"]


class Convert(Protocol):
    """Converts a record to text, as `TextField` does."""

    @property
    def columns(self) -> list[str] | None:
        """The columns of a table that are needed; None for all."""
        ...

    def __call__(self, record: dict[str, Any], place: str) -> str:
        """Return the text. Raises DataError, which names the place."""
        ...


@dataclass(frozen=True)
class Document:
    """A document, or the next piece of the document before it."""

    name: str
    """Name of the file in the corpus, with the number of the line, record or row if it has any."""
    text: str
    """The text, without lone surrogates: it always encodes as UTF-8."""
    first: bool = True
    """False for the second and later pieces of one document."""


@dataclass(frozen=True)
class Stream:
    """The content of a file, or of a member of an archive."""

    name: str
    """Name in the corpus."""
    place: str
    """File, and member of an archive, for errors."""
    title: str
    """The name that says what it is: without the suffixes of compression."""
    file: BinaryIO
    convert: Convert
    errors: ErrorsT
    """`strict` refuses bytes that are not UTF-8, `replace` substitutes U+FFFD."""
    selection: Selection
    """Decides which members of an archive are read."""

    @property
    def suffix(self) -> str:
        """What decides how it is read, such as `.jsonl`."""
        return PurePosixPath(self.title).suffix.lower()


@dataclass(frozen=True)
class TextField:
    """Takes the text of a record from one of its fields."""

    field: str
    errors: ErrorsT

    @property
    def columns(self) -> list[str]:
        """The one column."""
        return [self.field]

    def __call__(self, record: dict[str, Any], place: str) -> str:
        """Return the text.

        Raises:
            DataError: if there is no such field, or it holds no text.
        """
        if self.field not in record:
            raise missing_field(self.field, list(record), place)
        return clean_text(record[self.field], field=self.field, errors=self.errors, place=place)


def clean_text(value: Any, *, field: str, errors: ErrorsT, place: str) -> str:
    """Return a text free of lone surrogates.

    Raises:
        DataError: if the value is not a string, or holds lone surrogates and errors is `strict`.
    """
    if not isinstance(value, str):
        kind = "null" if value is None else type(value).__name__
        raise DataError(f"{field!r} is {kind} in {place}; data.field must name a field with text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        if errors == "replace":
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        raise DataError(
            f"{field!r} holds the lone surrogate {value[error.start]!r} in {place}; repair it, or "
            "accept replacement characters with data.errors=replace"
        ) from None
    return value


def missing_field(field: str, found: list[str], place: str) -> ForeignError:
    """Return the error for a record or table without the column `data.field` names."""
    return ForeignError(
        f"no {field!r} in {place}, only {', '.join(map(repr, found)) or 'nothing'}; name the field "
        "that holds the text with data.field",
        f"without {field!r}",
        of_records=True,
    )


def read_text(stream: Stream) -> Iterator[Document]:
    """Yield a file of text, as one document in pieces."""
    first = True
    for text in texts(stream):
        yield Document(stream.name, text, first)
        first = False


def texts(stream: Stream) -> Iterator[str]:
    """Yield the text of a file in pieces that end with a line if possible.

    Raises:
        ForeignError: for binary data.
        DataError: for what is not UTF-8.
    """
    offset, line = 0, 1
    for piece in _pieces(stream.file):
        if offset == 0 and piece.startswith(BOM):
            offset, piece = len(BOM), piece[len(BOM) :]
        place = partial(_place, stream.place, offset, line, piece)
        if (at := piece.find(b"\0")) >= 0:
            message = (
                f"a NUL byte in {place(at)}: the file is not UTF-8 text, but binary data or text "
                "in another encoding; convert it, or remove the NUL bytes if it is text"
            )
            raise ForeignError(message, BINARY) if line == 1 else DataError(message)
        yield decode(piece, stream.errors, place)
        offset += len(piece)
        line += piece.count(b"\n")


def _pieces(file: BinaryIO) -> Iterator[bytes]:
    """Yield blocks that end at a newline, or between two characters where no newline comes."""
    rest = b""
    while block := file.read(PIECE_BYTES):
        block = rest + block
        cut = block.rfind(b"\n") + 1 or _character_end(block)
        rest = block[cut:]
        if cut:
            yield block[:cut]
    if rest:
        yield rest


def _character_end(block: bytes) -> int:
    """Return where the last complete UTF-8 character of a block ends."""
    for back in range(1, min(4, len(block)) + 1):
        lead = block[-back]
        if lead >= 0xC0:
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(block) - back if length > back else len(block)
        if lead < 0x80:
            break
    return len(block)


def _place(path: str, offset: int, line: int, piece: bytes, at: int) -> str:
    line += piece.count(b"\n", 0, at)
    return f"{path}, byte {offset + at}, line {line}"


def decode(data: bytes, errors: ErrorsT, place: Callable[[int], str]) -> str:
    """Return bytes as text; `place` describes a position in them for errors.

    Raises:
        DataError: if they are not UTF-8, and errors is `strict` or they are no text at all.
    """
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        found = f"not UTF-8: bytes {data[error.start : error.end].hex(' ')} in {place(error.start)}"
        if is_other_encoding(data):
            raise DataError(
                f"{found}, and more than a tenth of what follows: it is in another encoding, or no "
                "text; convert it to UTF-8"
            ) from None
        if errors == "replace":
            return data.decode("utf-8", "replace")
        raise DataError(
            f"{found}; convert the file, or accept replacement characters with data.errors=replace"
        ) from None
