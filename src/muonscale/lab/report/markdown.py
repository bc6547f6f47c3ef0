"""A page as Markdown, for a repository or an issue: tables and pictures, nothing interactive."""

from __future__ import annotations

import re

from muonscale.lab.report.page import (
    Block,
    Chart,
    ChartViews,
    Command,
    Page,
    Table,
    Text,
    Tiles,
    Verbatim,
    Verdict,
)

CODE = re.compile(r"`([^`\n]+)`")
"""Code in a sentence."""


def markdown(page: Page, figures: str = "figures") -> str:
    """Return a page as Markdown.

    Args:
        page: what to write.
        figures: folder of the pictures, relative to the file.
    """
    parts = [f"# {_plain(page.title)}", _plain(page.summary)]
    part = ""
    for section in page.sections:
        if section.part != part:
            part = section.part
            parts.append(f"## {_plain(part)}" if part else "")
        parts.append(f"{'###' if part else '##'} {_plain(section.title)}")
        parts += [_block(block, figures) for block in section.blocks]
    return "\n\n".join(part for part in parts if part) + "\n"


def _block(block: Block, figures: str) -> str:
    match block:
        case Text(text):
            return _plain(text)
        case Command(text):
            return f"```sh\n{text}\n```"
        case Verbatim():
            return f"```text\n{block.text}\n```" + _caption(block.caption)
        case Verdict():
            return f"- **{block.outcome}**: {_plain(block.text)}"
        case Table():
            return _table(block)
        case Chart():
            picture = f"![{_plain(block.title)}]({figures}/{block.name}.png)"
            return picture + _caption(block.caption)
        case ChartViews():
            return _block(block.charts[0], figures)
        case Tiles(tiles):
            lines = (f"- {_plain(t.label)}: **{_plain(t.value)}** {_plain(t.note)}" for t in tiles)
            return "\n".join(line.rstrip() for line in lines)


def _table(table: Table) -> str:
    if not table.rows:
        return ""
    rows = [table.head, ["---"] * len(table.head), *table.rows]
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in rows]
    return "\n".join(lines) + _caption(table.caption)


def _caption(text: str) -> str:
    return f"\n\n{_plain(text)}" if text else ""


def _cell(text: str) -> str:
    return _plain(text).replace("|", "\\|").replace("\n", " ")


def _plain(text: str) -> str:
    """Return text that Markdown leaves as it is, apart from the code between two backticks."""
    parts = CODE.split(text)
    return "".join(
        f"`{part}`" if number % 2 else _escaped(part) for number, part in enumerate(parts)
    )


def _escaped(text: str) -> str:
    for sign in ("\\", "*", "_", "`", "["):
        text = text.replace(sign, f"\\{sign}")
    return text.replace("&", "&amp;").replace("<", "&lt;")  # not every Markdown knows "\\<"
