from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from muonscale.lab.files import drop_nonfinite
from muonscale.lab.report.write import write_page
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.planned_run import PlannedRun, index_runs
from muonscale.lab.studies.study import Outcome
from muonscale.lab.studies.transfer.config import TransferConfig
from muonscale.lab.studies.transfer.study import TransferStudy
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.param_groups import plan_transfer
from tests.lab.studies.conftest import end_all, end_with, search_both

Best = Callable[[PlannedRun], float]
GRID = [0.005, 0.01, 0.02, 0.04, 0.08]


@pytest.fixture
def study(tiny_keys: dict[str, Any], tmp_path: Path) -> Callable[..., TransferStudy]:
    def make(**keys: Any) -> TransferStudy:
        given = {
            "path": tmp_path / "study",
            "set": {**tiny_keys, "model.preset": "llama-nano"},
            "widths": [32, 64, 128],
            "values": GRID,
        }
        return TransferStudy(TransferConfig.model_validate(given | keys))

    return make


def valley(study: TransferStudy, best: Best) -> dict[str, Any]:
    """Analyse losses that are lowest at `best` of a run, with seeds that differ and a little noise."""

    def end(run: PlannedRun) -> Outcome:
        where = run.coordinates
        distance = math.log(float(where.get("lr", where.get("wd", 0))) / best(run))
        seed = int(where["seed"])
        noise = 0.002 * math.sin(1000 * distance + seed + int(where["width"]))
        loss = math.inf if distance > 5 else 3 + 0.2 * distance**2 + 0.3 * seed + noise
        state = "diverged" if math.isinf(loss) else "finished"
        result = None if math.isinf(loss) else {"validation_loss": loss}
        return Outcome(run, RunFolder(Path("no")), state, result)

    return study.analyze(end_all(study, end))


def test_a_model_is_widened_and_multiplied_from_the_first_width(
    study: Callable[..., TransferStudy],
) -> None:
    runs = index_runs(study().plan({}))
    assert len(runs) == 5 * 2 * (1 + 2 * 2)  # the first width once for both conventions
    for run in runs.values():
        shape = planned_shape(run.config)
        assert shape.hidden_size == run.coordinates["width"]
        assert shape.hidden_size // shape.num_attention_heads == 32  # llama-nano's heads
        transfer = plan_transfer(run.config, shape)
        if run.coordinates["width"] == 32:
            assert transfer is None
            continue
        assert transfer is not None
        assert transfer.convention == run.coordinates["convention"]
        lr = transfer.rows["model.layers.0.self_attn.q_proj.weight"].multipliers.lr
        wide = run.coordinates["width"] / 32
        assert lr == pytest.approx(1 if transfer.convention == "standard" else wide**-0.5)


def test_an_optimum_that_stays_transfers(
    study: Callable[..., TransferStudy], tmp_path: Path
) -> None:
    found = valley(study(), lambda run: 0.019)
    page = study().report(drop_nonfinite(found), {})
    assert write_page(page, tmp_path / "report").exists()
    assert {chart.name for chart in page.charts} == {
        *("optimum", "best-loss", "curves-muon-spectral", "curves-muon-standard")
    }
    assert found["passed"] is True
    spectral, standard = found["curves"]
    assert (spectral["convention"], standard["convention"]) == ("spectral", "standard")
    for width in spectral["widths"]:
        assert width["optimum"] == pytest.approx(0.019, rel=0.05)
        assert width["low"] < width["optimum"] < width["high"] < 1.2 * width["low"]
        assert (width["best"], width["edge"]) == (0.02, None)
    assert spectral["step"] == pytest.approx(2)
    assert spectral["moved"] < 0.2


@pytest.mark.parametrize(
    ("power", "transfers"), [(0.3, True), (0.6, False), (-0.3, True), (-0.6, False)]
)
def test_an_optimum_that_moves_a_step_does_not(
    study: Callable[..., TransferStudy], power: float, transfers: bool
) -> None:
    # From width 32 to 128 it moves by 4^power: 2 is a step of the grid.
    found = valley(study(), lambda run: 0.02 * (int(run.coordinates["width"]) / 32) ** power)
    assert found["passed"] is transfers
    assert found["curves"][0]["moved"] == pytest.approx(abs(2 * power), abs=0.1)


def test_an_optimum_at_the_edge_does_not(study: Callable[..., TransferStudy]) -> None:
    found = valley(study(), lambda run: 0.005)
    assert found["passed"] is False
    assert "at the edge at width 32 (low), 64 (low), 128 (low)" in found["curves"][0]["why"]


def test_only_judged_conventions_count(study: Callable[..., TransferStudy]) -> None:
    def standard_moves(run: PlannedRun) -> float:
        moves = run.coordinates.get("convention") == "standard"
        return 0.02 / (int(run.coordinates["width"]) / 32 if moves else 1)

    found = valley(study(), standard_moves)
    assert [curve["transfers"] for curve in found["curves"]] == [True, False]
    assert found["passed"] is True
    assert valley(study(judged=["standard"]), standard_moves)["passed"] is False


def test_missing_runs_leave_it_undecided(
    study: Callable[..., TransferStudy], tmp_path: Path
) -> None:
    begun = study()
    found = begun.analyze({})
    assert found["passed"] is None
    write_page(begun.report(found, {}), tmp_path / "report")


def test_weight_decay_is_studied_the_same_way(study: Callable[..., TransferStudy]) -> None:
    wd = study(over="optimizer.weight_decay", values=[0.05, 0.1, 0.2])
    run = wd.plan({})[0]
    assert run.config.optimizer.weight_decay == 0.05
    assert run.coordinates["wd"] == 0.05
    assert valley(wd, lambda run: 0.1)["passed"] is True


def both(run: PlannedRun) -> float:
    """Return losses that are lowest at lr 0.02 and at rest 0.08, for AdamW 0.01."""
    optimizer, seed = run.config.optimizer, int(run.coordinates["seed"])
    rest = (optimizer.adamw_lr or math.nan) / (0.01 if optimizer.rule == "adamw" else 0.08)
    noise = 0.002 * math.sin(1000 * optimizer.lr + seed)
    return 3 + 0.2 * math.log(optimizer.lr / 0.02) ** 2 + 0.1 * math.log(rest) ** 2 + noise


def test_the_other_key_is_searched_at_the_first_width_and_carried(
    study: Callable[..., TransferStudy], tmp_path: Path
) -> None:
    given = study(variants=["muon", "adamw"], search=search_both(rest=0.02, most=20))
    assert {run.coordinates["width"] for run in given.plan({})} == {32}
    assert len(given.plan({})) == 2  # the first settings alone
    outcomes = end_all(given, end_with(both))
    wide = [o.run for o in outcomes.values() if o.run.coordinates["width"] != 32]
    assert len(wide) == 2 * 5 * 2 * 2 * 2
    for run in wide:
        best = 0.01 if run.coordinates["variant"] == "adamw" else 0.08
        assert run.config.optimizer.adamw_lr == run.coordinates["rest"] == best
    found = given.analyze(outcomes)
    assert [row["best"] for row in found["searches"]] == [
        {"lr": 0.02, "rest": 0.08},
        {"lr": 0.02, "rest": 0.01},
    ]
    assert found["passed"] is True
    page = given.report(drop_nonfinite(found), outcomes)
    assert {"search-lr", "search-rest"} <= {chart.name for chart in page.charts}
    assert sum(e.runs for e in given.expected(outcomes)) == len(outcomes)
    assert sum(e.most for e in given.expected({})) >= len(outcomes)


def test_there_is_no_verdict_where_the_other_key_is_not_tuned(
    study: Callable[..., TransferStudy],
) -> None:
    given = study(search=search_both(rest=0.02, most=5))
    found = given.analyze(end_all(given, end_with(both)))
    assert "rest high" in found["searches"][0]["edges"]
    assert (found["passed"], found["curves"][0]["transfers"]) == (None, None)
    assert "not tuned at width 32" in found["curves"][0]["why"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"widths": [64, 32]}, "must rise"),
        ({"values": [0.1, 0.2]}, "at least 3"),
        ({"values": [0.1, 0.3, 0.2]}, "values=.*0.1"),
        ({"values_of": {"adamw": GRID}}, "no variant 'adamw'"),
        ({"over": "optimizer.momentum"}, "optimizer.lr"),
        ({"conventions": ["mup"]}, "spectral"),
        ({"over": "optimizer.weight_decay", "search": search_both()}, "search.keys.wd: it must be"),
    ],
)
def test_wrong_studies_are_refused(keys: dict[str, Any], said: str) -> None:
    given = {"path": "x", "widths": [32, 64], "values": GRID}
    with pytest.raises(ValidationError, match=said):
        TransferConfig.model_validate(given | keys)


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"at": "first"}, "first width alone"),
        ({"begin": "start"}, "first width alone"),
        ({"keys": {"lr": {"key": "optimizer.lr", "start": 0.02}}}, "add keys"),
    ],
)
def test_searches_that_would_do_nothing_are_refused(search: dict[str, Any], said: str) -> None:
    keys = {
        "lr": {"key": "optimizer.lr", "start": 0.02},
        "rest": {"key": "optimizer.adamw_lr", "start": 0.04},
    }
    given = {"path": "x", "widths": [32, 64], "values": [0.01, 0.02, 0.04]}
    with pytest.raises(ValidationError, match=said):
        TransferConfig.model_validate({**given, "search": {"keys": keys, **search}})
