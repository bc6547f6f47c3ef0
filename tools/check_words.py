"""Check docs, docstrings, comments and strings for words that this project writes otherwise.

    python tools/check_words.py [PATH ...]

Each row of `WORDS` is a pattern and what to write in its place. Lines of prose in Markdown wrap at
100 columns. Code is not checked, only the words
in it that people read: Markdown outside code blocks, and strings and comments of Python files.
Pages under docs/results/ are left out, since commands wrote them, and so is the history of the
project in EXPERIMENTS.md and CHANGELOG.md.
"""

from __future__ import annotations

import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHECKED = ("src", "docs", "benchmarks", "examples", "README.md", "CONTRIBUTING.md")
LEFT_OUT = ("docs/results", "benchmarks/results")

WORDS: dict[str, str] = {
    r"alike": "the same, equal, both",
    r"so many": "that many, a number, or the number itself",
    r"told apart": "not significantly different; distinguished",
    r"become of": "happened to",
    r"dealt out": "partitioned",
    r"woven": "interleaved",
    r"hears?|heard|hearing": "record, hook, measure",
    r"lies? (otherwise|as|whole|on a rank|on one rank|on several ranks)": "is sharded",
    r"what travels": "what is sent",
    r"likewise\.": "a sentence",
    r"(?<![\w`*] )(known|counted|measured|drawn|accepted|kept|taken|left out|checked) are(?= )": "subject first",
    r"at the end stands?": "subject first",
    r"(re)?cent(re|red|res|ring)": "center",
    r"\w*(normal|orthogonal|initial|serial|recogn|optim|organ|real|util|summar|minim|maxim|general|regular|random|parallel|visual|synchron|quant|factor|parametr|character|emphas)is(e|es|ed|ing|ation|ations)": "-ize",
    r"colou?rs? of one's own": "own colors",
    r"colours?|coloured": "color",
    r"neighbours?|neighbouring": "neighbor",
    r"behaviours?": "behavior",
    r"favours?|favourite": "favor",
    r"labell(ed|ing)|modell(ed|ing)|travell(ed|ing)": "one l",
    r"licence": "license",
    r"whilst|amongst": "while, among",
    r"held[-_ ]out\w*": "validation; left out of a fit",
}
"""From a pattern, matched without regard to case as whole words, to what to write."""

PATTERN = re.compile(
    "|".join(rf"(?P<w{n}>\b(?:{pattern})(?!\w))" for n, pattern in enumerate(WORDS)), re.IGNORECASE
)
WIDTH = 100
"""Characters of a line of prose in Markdown."""
UNWRAPPED = ("|", "#", "<", "![")
"""Beginnings of lines that cannot be wrapped."""
CODE = re.compile(r"`[^`]*`|https?://\S+|\]\([^)]*\)")


def main(arguments: list[str]) -> int:
    """Print every place that should read otherwise, and return 1 if there is one."""
    paths = [Path(a).resolve() for a in arguments] or [ROOT / name for name in CHECKED]
    places = [place for path in paths for file in files_in(path) for place in check(file)]
    for place in places:
        print(place)
    if places:
        print(f"{len(places)} places; the words are in tools/check_words.py")
    return 1 if places else 0


def files_in(path: Path) -> list[Path]:
    """Return the Python and Markdown files at or below `path` that are checked."""
    files = [path] if path.is_file() else sorted(path.rglob("*"))
    return [
        file
        for file in files
        if file.suffix in (".py", ".md")
        and not file.relative_to(ROOT).as_posix().startswith(LEFT_OUT)
        and "__pycache__" not in file.parts
    ]


def check(file: Path) -> Iterator[str]:
    """Yield `path:line: word -> what to write` for every hit in a file."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".md" and "reference" not in file.parts:  # whose blocks are generated
        for number, line in markdown_prose(text):
            if len(line) > WIDTH and not line.startswith(UNWRAPPED) and "://" not in line:
                yield f"{file.relative_to(ROOT)}:{number}: {len(line)} characters -> {WIDTH}"
    prose = python_prose(text) if file.suffix == ".py" else markdown_prose(text)
    for number, line in prose:
        for hit in PATTERN.finditer(CODE.sub("", line)):
            better = list(WORDS.values())[int(str(hit.lastgroup)[1:])]
            yield f"{file.relative_to(ROOT)}:{number}: {hit[0]!r} -> {better}"


def python_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) of strings and comments."""
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", -1)}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in kinds:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def markdown_prose(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, line) outside code blocks."""
    fenced = False
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            yield number, line


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
