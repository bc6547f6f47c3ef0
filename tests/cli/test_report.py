from __future__ import annotations

import html
import json
import shutil
from pathlib import Path

import pytest

from tests.cli.studies import write_recipe
from tests.conftest import Muonscale, call
from tests.lab.report.folders import records, write_run


@pytest.fixture(scope="session")
def study_once(corpus_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert call("study", "run", write_recipe(folder, corpus_file, cache)) == 0
    return folder / "study"


@pytest.fixture
def study(study_once: Path, tmp_path: Path) -> Path:
    """A copy of the folder of a finished study of six runs, without its report."""
    folder = Path(shutil.copytree(study_once, tmp_path / "study"))
    shutil.rmtree(folder / "report")
    return folder


def test_a_run_that_was_trained_has_a_report(finished: Path, muonscale: Muonscale) -> None:
    answer = muonscale("report", finished)
    assert answer.code == 0, answer.err
    folder = finished / "report"
    assert answer.out.startswith(f"{folder / 'report.html'}, with 9 figures")
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
    assert "Comparison of 2 runs" in (tmp_path / "report" / "report.html").read_text(
        encoding="utf-8"
    )


def test_a_study_has_its_own_page(study: Path, muonscale: Muonscale) -> None:
    answer = muonscale("report", study)
    assert answer.code == 0, answer.err
    page = (study / "report" / "report.html").read_text(encoding="utf-8")
    (place,) = json.loads((study / "result.json").read_text())["places"]
    assert f"{place['comparisons'][0]['difference']:+.4f} nats" in page
    assert list((study / "report" / "figures").glob("*.png"))


def test_a_check_of_coordinates_has_its_own_page(
    tiny: list[str], tmp_path: Path, muonscale: Muonscale
) -> None:
    out = tmp_path / "check"
    quick = ("--widths", "16,32,64", "--seeds", 1, "--steps", 3, "--batch-tokens", 256)
    check = muonscale("coordcheck", *tiny, *quick, "--out", out)
    answer = muonscale("report", out)
    assert answer.code == 0, answer.err
    page = (out / "report" / "report.html").read_text(encoding="utf-8")
    _, claim = check.out.strip().splitlines()[-1].split(": ", 1)
    assert html.escape(claim) in page
    names = {path.name for path in (out / "report" / "figures").glob("*.png")}
    assert {"size-by-width.png", "update-slopes.png"} <= names and len(names) == 8


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"rows": []}', '{"rows": 5}'])
def test_a_damaged_check_of_coordinates_is_a_sentence(
    content: str, tmp_path: Path, muonscale: Muonscale
) -> None:
    (tmp_path / "coordcheck.json").write_text(content)
    answer = muonscale("report", tmp_path)
    assert answer.code == 2
    assert str(tmp_path / "coordcheck.json") in answer.err and "again" in answer.err


@pytest.mark.slow
def test_folders_of_several_kinds_are_parts_of_one_page(
    study: Path, tmp_path: Path, muonscale: Muonscale
) -> None:
    one, two = (write_run(tmp_path / name, records()) for name in ("one", "two"))
    answer = muonscale("report", one, study, two, "--out", tmp_path / "out")
    assert answer.code == 0, answer.err
    text = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert '<h2 class="part">Comparison of 2 runs</h2>' in text
    assert text.count('<h2 class="part">') == 2
    names = {path.name for path in (tmp_path / "out" / "figures").iterdir()}
    assert "part1-loss.png" in names
    assert any(name.startswith("part2-") for name in names)


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


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--port", "8000"], "--serve"),
        (["--serve", "--out", "page"], "--out page"),
    ],
)
def test_options_of_a_live_page_that_do_nothing_are_refused(
    words: list[str], said: str, tmp_path: Path, muonscale: Muonscale
) -> None:
    answer = muonscale("report", write_run(tmp_path / "run", records()), *words)
    assert answer.code == 2 and said in answer.err
    assert not (tmp_path / "run" / "report").exists()
