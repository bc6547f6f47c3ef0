"""Makes one page about folders: runs are compared, every other folder has its own part.

The functions that read studies and coordinate checks are imported when such a folder is met.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Literal

from muonscale.errors import StudyError
from muonscale.lab.report.page import Block, Chart, Page, Section, Table, Text
from muonscale.lab.report.runs import runs_page

FolderT = Literal["run", "study", "coordcheck"]

READERS: dict[FolderT, tuple[str, str]] = {
    "study": ("muonscale.lab.studies.kinds", "study_page"),
    "coordcheck": ("muonscale.lab.coordcheck.page", "read_check_page"),
}
"""Module and name of the function that returns the page of a folder."""


def page_of(paths: Sequence[Path]) -> Page:
    """Return one page about folders of any kind.

    Runs are compared with each other. Where there is more than runs, or than one other folder, each
    has a part of the page.

    Raises:
        StudyError: for a folder that is none of what is accepted, or that cannot be read.
    """
    kinds = [folder_kind(path) for path in paths]
    runs = [path for path, kind in zip(paths, kinds, strict=True) if kind == "run"]
    pages = [runs_page(runs)] if runs else []
    pages += [_read(path, kind) for path, kind in zip(paths, kinds, strict=True) if kind != "run"]
    return pages[0] if len(pages) == 1 else joined(pages)


def folder_kind(path: Path) -> FolderT:
    """Return what a folder is.

    Raises:
        StudyError: if it is nothing that a page can be made of.
    """
    if (path / "study.json").is_file():
        return "study"
    if (path / "coordcheck.json").is_file():
        return "coordcheck"
    if (path / "metrics.jsonl").is_file() or _is_run_config(path / "config.json"):
        return "run"
    what = "holds none of what makes one" if path.is_dir() else "is no folder"
    raise StudyError(
        f"no report can be made of {path}: it {what}; accepted: a run folder (config.json of a run, "
        "metrics.jsonl), a study folder (study.json), a coordcheck folder (coordcheck.json)"
    )


def joined(pages: Sequence[Page]) -> Page:
    """Return one page with every page as a part; names of figures get the number of their part."""
    sections = [
        section
        for number, page in enumerate(pages, start=1)
        for section in _part(page, f"part{number}-")
    ]
    summary = "\n\n".join(f"{page.title}: {page.summary}" for page in pages)
    return Page(title="Report", summary=summary, sections=tuple(sections))


def _read(path: Path, kind: FolderT) -> Page:
    module, function = READERS[kind]
    return getattr(import_module(module), function)(path)


def _is_run_config(path: Path) -> bool:
    """Return whether a file is the config.json of a run, not that of a Hugging Face model."""
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and isinstance(tree.get("run"), dict)


def _part(page: Page, prefix: str) -> list[Section]:
    def renamed(block: Block) -> Block:
        if isinstance(block, Chart | Table) and block.name:
            return replace(block, name=prefix + block.name)
        return block

    sections = page.sections or (Section(title="Summary", blocks=(Text(page.summary),)),)
    return [
        replace(section, blocks=tuple(map(renamed, section.blocks)), part=page.title)
        for section in sections
    ]
