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
    outcomes = {}
    for id, run in index_runs(study.plan({})).items():
        where = run.coordinates
        distance = math.log(float(where.get("lr", where.get("wd", 0))) / best(run))
        seed = int(where["seed"])
        noise = 0.002 * math.sin(1000 * distance + seed + int(where["width"]))
        loss = math.inf if distance > 5 else 3 + 0.2 * distance**2 + 0.3 * seed + noise
        state = "diverged" if math.isinf(loss) else "finished"
        result = None if math.isinf(loss) else {"validation_loss": loss}
        outcomes[id] = Outcome(run, RunFolder(Path("no")), state, result)
    return study.analyze(outcomes)


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


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"widths": [64, 32]}, "must rise"),
        ({"values": [0.1, 0.2]}, "at least 3"),
        ({"values": [0.1, 0.3, 0.2]}, "values=.*0.1"),
        ({"values_of": {"adamw": GRID}}, "no variant 'adamw'"),
        ({"over": "optimizer.momentum"}, "optimizer.lr"),
        ({"conventions": ["mup"]}, "spectral"),
    ],
)
def test_wrong_studies_are_refused(keys: dict[str, Any], said: str) -> None:
    given = {"path": "x", "widths": [32, 64], "values": GRID}
    with pytest.raises(ValidationError, match=said):
        TransferConfig.model_validate(given | keys)
