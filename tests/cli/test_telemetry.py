from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.test_train import STEPS, metrics, weights
from tests.conftest import Muonscale


def test_telemetry_is_recorded_and_changes_nothing(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    plain, seen = tmp_path / "plain", tmp_path / "seen"
    assert muonscale("train", *tiny, f"run.path={plain}").code == 0
    words = [*tiny, f"run.path={seen}", "telemetry.every=4", "telemetry.matrices=3"]
    assert muonscale("train", *words).code == 0
    assert weights(plain) == weights(seen)
    losses = [[r["loss"] for r in metrics(run, "train")] for run in (plain, seen)]
    assert losses[0] == losses[1]
    assert metrics(plain, "telemetry") == []
    records = metrics(seen, "telemetry")
    assert [r["step"] for r in records] == list(range(4, STEPS + 1, 4))
    reported = {r["step"]: r["update_rms"] for r in metrics(seen, "train")}
    for record in records:
        groups = record["groups"]
        assert set(groups) == {"hidden", "embedding", "head", "norm"}
        hidden = groups["hidden"]
        assert hidden["update_rms"] == pytest.approx(reported[record["step"]], rel=1e-3)
        assert hidden["measured"] == 3
        assert 0 < hidden["weight_svd_entropy"] < 1
        assert 1 <= hidden["weight_stable_rank"] <= 32
        assert "weight_svd_entropy" not in groups["embedding"]


def test_adamw_runs_have_the_spectra_of_their_hidden_matrices(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "optimizer.rule=adamw", "optimizer.lr=0.003", "telemetry.every=12"]
    assert muonscale("train", *words).code == 0
    (record,) = metrics(tmp_path / "run", "telemetry")
    assert record["groups"]["hidden"]["measured"] == 8
    assert 0 < record["groups"]["hidden"]["update_svd_entropy"] < 1


def test_telemetry_may_change_when_a_run_goes_on(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert muonscale("train", *tiny).code == 0
    (run / "result.json").unlink()
    answer = muonscale("train", *tiny, "telemetry.every=2", "--resume")
    assert answer.code == 0, answer.err
