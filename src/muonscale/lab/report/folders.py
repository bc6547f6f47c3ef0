"""Makes one page about folders: runs are compared, every other folder has its own part.

The functions that read studies and coordinate checks are imported when such a folder is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Literal

from muonscale.errors import CheckpointError, StudyError
from muonscale.lab.files import read_object
from muonscale.lab.report.page import Block, Chart, ChartViews, Page, PageSection, Table, Text
from muonscale.lab.report.runs import runs_page

FolderT = Literal["run", "study", "coordcheck"]

READERS: dict[FolderT, tuple[str, str]] = {
    "study": ("muonscale.lab.studies.engine", "report_folder"),
    "coordcheck": ("muonscale.lab.coordcheck.page", "read_check_page"),
}
"""Module and name of the function that returns the page of a folder."""


def page_of(paths: Sequence[Path]) -> Page:
    """Return one page about folders of any kind.

    Runs are compared with each other. Runs as a whole and every other folder have a part of the
    page each, unless there is only one part.

    Raises:
        StudyError: for a folder that is not accepted or cannot be read.
    """
    kinds = {path: folder_kind(path) for path in paths}
    runs = [path for path in paths if kinds[path] == "run"]
    pages = [runs_page(runs)] if runs else []
    for path in paths:
        if (kind := kinds[path]) != "run":
            module, function = READERS[kind]
            pages.append(getattr(import_module(module), function)(path))
    return pages[0] if len(pages) == 1 else join_pages(pages)


def folder_kind(path: Path) -> FolderT:
    """Return the kind of a folder.

    Raises:
        StudyError: if no page can be made of it.
    """
    if (path / "study.json").is_file():
        return "study"
    if (path / "coordcheck.json").is_file():
        return "coordcheck"
    try:
        config = read_object(path / "config.json", "") or {}
    except CheckpointError:
        config = {}
    # The config.json of a Hugging Face model has no section `run`.
    if isinstance(config.get("run"), dict) or (path / "metrics.jsonl").is_file():
        return "run"
    what = (
        "is not the folder of a run, a study or a coordcheck"
        if path.is_dir()
        else "is not a folder"
    )
    raise StudyError(
        f"no report can be made of {path}: it {what}; give a folder with a run's config.json or "
        "metrics.jsonl, with study.json, or with coordcheck.json"
    )


def join_pages(pages: Sequence[Page]) -> Page:
    """Return one page with every page as a part; names of figures get the number of their part."""
    sections = []
    for number, page in enumerate(pages, start=1):
        for section in page.sections or (
            PageSection(title="Summary", blocks=(Text(page.summary),)),
        ):
            blocks = tuple(_renamed(block, f"part{number}-") for block in section.blocks)
            sections.append(replace(section, blocks=blocks, part=page.title))
    summary = "\n\n".join(f"{page.title}: {page.summary}" for page in pages)
    return Page(title="Report", summary=summary, sections=tuple(sections))


def _renamed(block: Block, prefix: str) -> Block:
    """Return a block with a prefix before the names of its files."""
    if isinstance(block, ChartViews):
        views = ((view, replace(chart, name=prefix + chart.name)) for view, chart in block.views)
        return ChartViews(views=tuple(views))
    if isinstance(block, Chart | Table) and block.name:
        return replace(block, name=prefix + block.name)
    return block
