"""Pages as they are written: fences, commands, links."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Fence:
    """A block of code."""

    words: str
    """What follows the three backticks."""
    text: str


def fences(page: Path, language: str) -> list[Fence]:
    """Return the blocks of a language, in order."""
    found = re.findall(
        r"^( *)```(\w+)([^\n]*)\n(.*?)^ *```", page.read_text("utf-8"), flags=re.M | re.S
    )
    return [
        Fence(words.strip(), re.sub(f"^{indent}", "", text, flags=re.M))
        for indent, name, words, text in found
        if name == language
    ]


def commands(page: Path) -> list[str]:
    """Return the lines of shell that run muonscale."""
    texts = [re.sub(r" *\\\n *", " ", fence.text) for fence in fences(page, "sh")]
    lines = [line for text in texts for line in text.splitlines()]
    return [line for line in lines if re.match(r"(\$ )?(muonscale|torchrun .*-m muonscale) ", line)]


def words_of(line: str) -> list[str]:
    """Return what follows `muonscale`, whoever starts it, up to a file that it writes to."""
    words = shlex.split(line, comments=True)
    words = words[: words.index(">")] if ">" in words else words
    return words[words.index("muonscale") + 1 :]


def links(page: Path) -> list[str]:
    """Return the files, with anchors, that a page links to or shows."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text("utf-8"), flags=re.M | re.S)
    text = re.sub(r"`[^`\n]*`", "", text)
    return re.findall(r"\]\((?!https?:|mailto:)([^)\s]+)[^)]*\)", text)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), flags=re.M)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"[-\s]+", "-", heading) for heading in plain}
