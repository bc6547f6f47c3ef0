"""Tables in Markdown."""

from __future__ import annotations

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
