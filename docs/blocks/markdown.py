"""Tables and paragraphs in Markdown."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Sequence


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; a bar within a cell is escaped."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
    )


def code(text: object) -> str:
    """Return text as code, or a dash for nothing."""
    return f"`{text}`" if str(text) else "-"


def size(shape: Iterable[int]) -> str:
    """Return such as 16x24."""
    return "x".join(map(str, shape))


def wrap(text: str) -> str:
    """Return a paragraph in lines of at most 100 characters; code is never broken."""
    glued = re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), text)
    lines = textwrap.wrap(glued, 100, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace("\0", " ")
