from __future__ import annotations

import csv
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread

from muonscale.errors import StudyError
from muonscale.lab.report.page import Chart, Page, PageSection, Series, Surface, Table
from muonscale.lab.report.write import write_page
from tests.lab.report.sample import CHARTS, PAGE, RATE_CHART, SURFACE_CHART, TABLE


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "deep" / "folder"
    assert write_page(PAGE, path) == path / "report.html"
    return path


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def same(text: str, number: float) -> bool:
    return text == "" if math.isnan(number) else float(text) == number


def page_of(*blocks: Chart | Table) -> Page:
    return Page(title="", summary="", sections=(PageSection(title="", blocks=blocks),))


@pytest.mark.parametrize("chart", CHARTS, ids=lambda chart: chart.name)
def test_every_chart_has_pictures(chart: Chart, folder: Path) -> None:
    picture = imread(folder / "figures" / f"{chart.name}.png")
    assert picture.shape[:2] == (720, 1200)
    assert picture[..., :3].min() < 0.5 and picture.std() > 0.01  # something is drawn on white
    svg = (folder / "figures" / f"{chart.name}.svg").read_text()
    assert "<svg" in svg and "</svg>" in svg and svg.count("<path") > 10


def test_numbers_of_series_are_exactly_those_of_the_chart(folder: Path) -> None:
    head, *rows = rows_of(folder / "figures" / "lr.csv")
    assert head == ["series", "x", "y", "low", "high"]
    nothing = (math.nan,) * 5
    wanted = [
        (series.name, *numbers)
        for series in RATE_CHART.series
        for numbers in zip(
            series.x, series.y, series.low or nothing, series.high or nothing, strict=True
        )
    ]
    marks = [("bigram", math.nan, 3.6, math.nan, math.nan), ("base", 0.01, *nothing[:3])]
    assert len(rows) == len(wanted) + 2
    for row, (name, *numbers) in zip(rows, [*wanted, *marks], strict=True):
        assert row[0] == name and all(map(same, row[1:], numbers)), row


def test_numbers_of_surfaces_have_a_file_beside_that_of_series(folder: Path) -> None:
    head, *rows = rows_of(folder / "figures" / "surface.csv")
    assert head == ["x", "y", "z"]
    assert rows == [
        ["0.005", "0.01", "3.4"], ["0.01", "0.01", "3.2"], ["0.02", "0.01", "3.3"],
        ["0.005", "0.1", "3.3"], ["0.01", "0.1", "3.1"], ["0.02", "0.1", ""],
    ]  # fmt: skip
    assert rows_of(folder / "figures" / "surface-series.csv")[1:] == [
        ["path", "0.005", "0.01", "", ""], ["path", "0.01", "0.1", "", ""],
    ]  # fmt: skip


def test_named_tables_have_a_file(folder: Path) -> None:
    assert rows_of(folder / "figures" / "final.csv") == [list(TABLE.head), *map(list, TABLE.rows)]
    files = {path.name for path in (folder / "figures").iterdir()}
    names = [chart.name for chart in CHARTS]
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg", "csv")} | {
        "final.csv",
        "surface-series.csv",
    }


def test_the_same_page_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    write_page(PAGE, tmp_path)
    for path in folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / path.relative_to(folder)).read_bytes(), path


CHART = replace(RATE_CHART, marks=())
SERIES = Series(name="a", x=(1.0, 2.0), y=(1.0, 2.0))


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ((CHART, CHART), "2 charts or tables of a page are called 'lr'"),
        ((CHART, replace(TABLE, name="lr")), "are called 'lr'"),
        ((SURFACE_CHART, replace(CHART, name="surface-series")), "called 'surface-series'"),
        ((replace(CHART, name="../a"),), "'../a'"),
        ((replace(CHART, series=()),), "'lr' has neither series nor a surface"),
        ((replace(CHART, series=(replace(SERIES, y=(1.0,)),)),), "series 'a': unequal lengths"),
        ((replace(CHART, series=(replace(SERIES, low=(1.0, 1.0)),)),), "series 'a'.*low and high"),
        ((replace(CHART, y_limits=(2.0, 1.0)),), "y_limits"),
        (
            (
                replace(
                    CHART, surface=Surface(x=(1.0, 2.0), y=(1.0, 2.0), z=((1.0, 2.0),), label="")
                ),
            ),
            "2 rows of 2",
        ),
        (
            (replace(CHART, surface=Surface(x=(1.0,), y=(1.0,), z=((1.0,),), label="")),),
            "at least 2 x 2",
        ),
        ((replace(TABLE, rows=(("a",),)),), "1 cells and the head 4"),
    ],
)
def test_what_cannot_be_drawn_is_refused(
    blocks: tuple[Chart | Table, ...], said: str, tmp_path: Path
) -> None:
    with pytest.raises(StudyError, match=said.replace("(", r"\(")):
        write_page(page_of(*blocks), tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_a_folder_that_cannot_be_written_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StudyError, match="cannot be written"):
        write_page(page_of(TABLE), tmp_path / "file")


def test_reports_import_neither_torch_nor_pyplot() -> None:
    code = (
        "import sys\n"
        "import muonscale.cli.report, muonscale.lab.report.folders, muonscale.lab.report.write\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib.pyplot') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
