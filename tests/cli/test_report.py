from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from muonscale.lab.report.page import Chart, Page, PageSection, Series, Table
from tests.conftest import Muonscale
from tests.lab.report.folders import records, write_run


def fake(monkeypatch: pytest.MonkeyPatch, module: str, function: str, title: str) -> list[Path]:
    """Put a reader of folders in place of a module, and return the paths it is given."""
    asked: list[Path] = []

    def page(path: Path) -> Page:
        asked.append(path)
        chart = Chart(
            name="loss", title="t", x_label="x", y_label="y",
            series=(Series(name="a", x=(1.0, 2.0), y=(1.0, 2.0)),),
        )  # fmt: skip
        table = Table(head=("a",), rows=(("1",),), name="numbers")
        section = PageSection(title="Found", blocks=(chart, table))
        return Page(title=title, summary="A summary.", sections=(section,))

    *_, name = module.split(".")
    parent, _, _ = module.rpartition(".")
    for part in (parent, module):
        monkeypatch.setitem(sys.modules, part, ModuleType(part))
    setattr(sys.modules[parent], name, sys.modules[module])
    setattr(sys.modules[module], function, page)
    return asked


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Path]]:
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "study.json").write_text("{}")
    return folder, fake(monkeypatch, "muonscale.lab.studies.engine", "report_folder", "The study")


def test_a_run_that_was_trained_has_a_report(finished: Path, muonscale: Muonscale) -> None:
    answer = muonscale("report", finished)
    assert answer.code == 0, answer.err
    folder = finished / "report"
    assert answer.out.startswith(f"{folder / 'report.html'}, with 8 figures")
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".svg", ".csv"}
    loss = json.loads((finished / "result.json").read_text())["validation_loss"]
    assert f"{loss:.4f}" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_several_runs_are_compared_in_one_page(
    tmp_path: Path, muonscale: Muonscale, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = (write_run(tmp_path / name, records()) for name in ("one", "two"))
    monkeypatch.chdir(tmp_path)
    assert muonscale("report", one, two).code == 0
    assert "2 runs" in (tmp_path / "report" / "report.html").read_text(encoding="utf-8")


def test_a_study_has_its_own_page(study: tuple[Path, list[Path]], muonscale: Muonscale) -> None:
    folder, asked = study
    answer = muonscale("report", folder)
    assert answer.code == 0, answer.err
    assert asked == [folder]
    assert (folder / "report" / "figures" / "loss.png").exists()
    assert "The study" in (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_a_check_of_coordinates_has_its_own_page(
    tmp_path: Path, muonscale: Muonscale, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "coordcheck.json").write_text("{}")
    module = "muonscale.lab.coordcheck.page"
    asked = fake(monkeypatch, module, "read_check_page", "The coordinates")
    assert muonscale("report", tmp_path).code == 0
    assert asked == [tmp_path]


@pytest.mark.slow
def test_folders_of_several_kinds_are_parts_of_one_page(
    study: tuple[Path, list[Path]], tmp_path: Path, muonscale: Muonscale
) -> None:
    one, two = (write_run(tmp_path / name, records()) for name in ("one", "two"))
    answer = muonscale("report", one, study[0], two, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for part in ("2 runs", "The study"):
        assert f'<h2 class="part">{part}</h2>' in text
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert {"part1-training-loss.png", "part2-loss.png", "part2-numbers.csv"} <= names


@pytest.mark.parametrize("what", ["nowhere", "empty", "model", "file"])
def test_what_is_no_run_and_no_study_is_refused(
    what: str, tmp_path: Path, muonscale: Muonscale
) -> None:
    path = tmp_path / what
    if what == "file":
        path.write_text("")
    elif what != "nowhere":
        path.mkdir()
    if what == "model":
        (path / "config.json").write_text('{"model_type": "llama"}')
    answer = muonscale("report", path)
    assert answer.code == 2
    assert f"no report can be made of {path}" in answer.err
    for accepted in ("metrics.jsonl", "study.json", "coordcheck.json"):
        assert accepted in answer.err
    assert not (path / "report").exists()
