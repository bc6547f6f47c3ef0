from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from muonscale.lab.report.page import (
    Chart,
    ChartViews,
    Page,
    PageSection,
    Table,
    Text,
    Tiles,
    Verdict,
)
from muonscale.lab.report.write import write_page
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.engine import StudyState, analyze_study, build_report
from muonscale.lab.studies.kinds import command_of, load_study
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.report_blocks import begin_with_result
from muonscale.lab.studies.study import Outcome, Study
from tests.lab.studies.conftest import end_all

Make = Callable[..., Study]
LOSSES = {"adamw": 4.0, "muon": 3.0}


def finished(run: PlannedRun, path: Path) -> Outcome:
    """Return a run whose loss falls by steps to that of its optimizer, lr and seed."""
    path.mkdir(parents=True)
    where = run.coordinates
    end = LOSSES[str(where["variant"])] + 0.5 * (where["lr"] != 0.02) + 0.1 * int(where["seed"])
    end += 0.001 * (hash((where["lr"], where["seed"])) % 3)
    curve = [end + 2, end + 1.2, end + 0.5, end]
    records = [{"kind": "train", "step": n, "step_ms": 20} for n in range(1, 5)]
    records += [
        {"kind": "eval", "step": n, "tokens": 100 * n, "validation_loss": loss}
        for n, loss in enumerate(curve, 1)
    ]
    (path / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
    env = {
        "flops": {"per_token": 7, "newton_schulz_per_step": 10},
        "versions": {"torch": "2"},
        "device_name": "x",
        "threads": 1,
    }
    (path / "env.json").write_text(json.dumps(env))
    return Outcome(
        run, RunFolder(path), "finished", {"validation_loss": end, "train_seconds": 0.08}
    )


@pytest.fixture
def page(compare: Make, tmp_path: Path) -> Page:
    study = compare(baselines=["adamw", "muon"])
    outcomes = end_all(study, lambda run: finished(run, tmp_path / run.id))
    runs = {id: outcome.run for id, outcome in outcomes.items()}
    return build_report(study, analyze_study(study, StudyState(runs, outcomes)), outcomes)


def blocks(page: Page, kind: type) -> list:
    return [b for section in page.sections for b in section.blocks if isinstance(b, kind)]


def test_it_says_what_is_better_and_shows_why(page: Page, tmp_path: Path) -> None:
    (verdict,) = blocks(page, Verdict)
    assert verdict.passed is True
    assert verdict.text.startswith("muon is better than adamw: -1.0")
    charts = {chart.name for chart in page.charts}
    assert charts == {
        "search-0-lr",
        *(f"loss-by-{m}-0" for m in ("tokens", "flops", "seconds")),
    }
    reach = next(t for t in blocks(page, Table) if t.name == "to-adamw-0")
    # Muon is 1 below AdamW at the end: it has AdamW's loss between its steps 2 (+0.2) and 3 (-0.5).
    spent = {row[0]: row[2] for row in reach.rows}
    assert spent["adamw"] == "400 (1.00, 1.00 to 1.00)"
    assert 200 < float(spent["muon"].split()[0]) < 300
    ratio = float(spent["muon"].split("(")[1].split(",")[0])
    assert ratio == pytest.approx(float(spent["muon"].split()[0]) / 400, abs=0.01)
    assert next(t for t in blocks(page, Table) if t.name == "to-muon-0").rows[0][2] == "> 400"
    path = write_page(page, tmp_path / "report")
    assert (path.parent / "report.md").exists()


def test_the_result_comes_first(page: Page) -> None:
    first = page.sections[0]
    assert first.title == "Result"
    verdict, tiles, views = first.blocks
    assert isinstance(verdict, Verdict) and isinstance(tiles, Tiles)
    assert isinstance(views, ChartViews)
    assert [name for name, _ in views.views] == ["tokens", "FLOPs", "seconds"]
    values = {tile.label: tile for tile in tiles.tiles}
    assert values["lowest validation loss"].note == "muon"
    assert float(values["difference"].value) == pytest.approx(-1, abs=0.01)
    assert 50 < float(values["FLOPs to equal loss"].value.rstrip("%")) < 75
    assert page.sections[-2].title == "What was compared"
    assert len(page.verdicts) == 1  # moved, not repeated


def test_of_many_verdicts_one_is_first() -> None:
    verdicts = [Verdict(True, f"claim {n}") for n in range(4)]
    chart = Chart(name="main", title="", x_label="", y_label="")
    sections = (
        PageSection(title="Method", blocks=(Text("how"),)),
        PageSection(title="Claims", blocks=tuple(verdicts)),
        PageSection(title="Chart", blocks=(chart,)),
    )
    whole = Page(title="", summary="", sections=sections)
    page = begin_with_result(whole, verdicts, (), "main")
    assert [s.title for s in page.sections] == ["Result", "Method", "Claims"]
    assert page.sections[0].blocks == (verdicts[0], chart)
    assert page.verdicts == tuple(verdicts)
    assert begin_with_result(whole, verdicts[:3], (), "none").sections[0].blocks == (*verdicts[:3],)
    assert begin_with_result(whole, (), (), "none") == whole


def test_an_unfinished_study_has_a_page(compare: Make, tmp_path: Path) -> None:
    study = compare()
    runs = {run.id: run for run in study.plan({})}
    waiting = {id: Outcome(run, RunFolder(Path("no")), "waiting") for id, run in runs.items()}
    found = analyze_study(study, StudyState(runs, waiting))
    assert found["missing"] == 2
    page = build_report(study, found, waiting)
    assert "no run has finished" in str(page)
    assert blocks(page, Chart) == []
    write_page(page, tmp_path / "report")


def test_a_shipped_study_is_called_by_its_name(tmp_path: Path) -> None:
    shipped = load_study("muon-adamw-nano", [f"path={tmp_path}"]).config
    assert command_of(shipped) == "muonscale study run muon-adamw-nano"
    other = load_study("muon-adamw-nano", [f"path={tmp_path}", "seeds=[5]"]).config
    assert command_of(other) == f"muonscale study run {tmp_path}"


def test_runs_whose_times_or_environment_are_lost_are_counted_as_such(
    compare: Make, tmp_path: Path
) -> None:
    study = compare()
    outcomes = end_all(study, lambda run: finished(run, tmp_path / run.id))
    runs = {id: outcome.run for id, outcome in outcomes.items()}
    found = analyze_study(study, StudyState(runs, outcomes))
    first, second = list(outcomes)[:2]
    assert outcomes[first].result is not None
    lost = {**outcomes[first].result, "train_seconds": None}  # resumed after its last step
    outcomes[first] = replace(outcomes[first], result=lost)
    (outcomes[second].folder.path / "env.json").unlink()
    page = build_report(study, found, outcomes)
    _, facts, count = page.sections[-1].blocks
    assert isinstance(facts, Table) and isinstance(count, Text)
    assert dict(facts.rows) == {"torch": "2", "device": "unknown, x", "threads": "1, unknown"}
    hours = 0.08 * (len(outcomes) - 1) / 3600
    assert f"{hours:.2f} hours" in count.text and "1 whose times are lost" in count.text
