from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.cli.test_train import STEPS, metrics, weights
from tests.conftest import Muonscale


def test_telemetry_is_recorded_and_changes_nothing(
    muonscale: Muonscale, tiny: list[str], trained_once: Path, tmp_path: Path
) -> None:
    plain, seen = trained_once, tmp_path / "seen"
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
    muonscale: Muonscale, tiny: list[str], finished: Path
) -> None:
    (finished / "result.json").unlink()
    answer = muonscale("train", *tiny, "telemetry.every=2", "--resume")
    assert answer.code == 0, answer.err


def test_telemetry_has_the_kinds_of_matrices_of_the_moonlight_paper(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    assert muonscale("train", *tiny, "telemetry.every=6", "telemetry.matrices=2").code == 0
    for record in metrics(tmp_path / "run", "telemetry"):
        assert list(record["matrices"]) == ["AttnQO", "AttnKV", "Dense"]
        for figures in record["matrices"].values():
            assert figures["measured"] == 2
            assert 0 < figures["weight_svd_entropy"] < 1 and figures["update_rms"] > 0


def test_attention_is_recorded_on_sampled_steps_and_changes_nothing(
    muonscale: Muonscale, tiny: list[str], trained_once: Path, tmp_path: Path
) -> None:
    plain, seen = trained_once, tmp_path / "seen"
    answer = muonscale("train", *tiny, f"run.path={seen}", "telemetry.attention_every=4")
    assert answer.code == 0, answer.err
    assert weights(plain) == weights(seen)
    records = metrics(seen, "train")
    assert [r["step"] for r in records if "attention" in r] == [4, 8, 12]
    layers = json.loads((seen / "env.json").read_text())["attention"]["layers"]
    for record in records[3::4]:
        assert len(record["attention"]["max_logit"]) == len(layers)
        assert set(record["attention"]["share_above_100"]) == {0.0}
    result = json.loads((seen / "result.json").read_text())
    assert result["attention"]["recorded_steps"] == 3
    assert 0 < result["attention"]["seconds"] < result["train_seconds"]
    assert "recorded in 3 steps" in answer.out
    assert result["spikes"] == {"grad_norm": 0, "update_rms": 0}
    plain_result = json.loads((plain / "result.json").read_text())
    assert "attention" not in plain_result
    assert json.loads((plain / "env.json").read_text())["attention"] is None


def test_the_noise_scale_changes_nothing_and_goes_on_exactly(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "train.micro_batch_tokens=64"]
    seen = [*words, "telemetry.noise_scale_every=3"]
    plain, run = tmp_path / "plain", tmp_path / "seen"
    assert muonscale("train", *words, f"run.path={plain}").code == 0
    assert muonscale("train", *seen, f"run.path={run}").code == 0
    assert weights(plain) == weights(run)
    assert all("noise_scale" not in r for r in metrics(plain, "train"))
    found = [[r.get("noise_scale") for r in metrics(run, "train")]]
    (run / "result.json").unlink()
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    answer = muonscale("train", *seen, f"run.path={run}", "--resume")
    assert answer.code == 0 and "at step 10 of" in answer.out, answer.err
    found.append([r.get("noise_scale") for r in metrics(run, "train")])
    assert found[0] == found[1]
    assert [step for step, noise in enumerate(found[0], 1) if noise] == [3, 6, 9, 12]
    assert found[0][-1]["tokens_small"] == 64 and found[0][-1]["tokens_big"] == 256


def test_a_noise_scale_that_cannot_be_is_refused_before_anything_is_written(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "train.batch_tokens=32", "telemetry.noise_scale_every=3"]
    for more in ([], ["--dry-run"]):
        answer = muonscale("train", *words, *more)
        assert answer.code == 2 and "train.batch_tokens=32 is a single sequence" in answer.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_with_qk_clip_goes_on_exactly(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "optimizer.qk_clip=0.02"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert muonscale("train", *words, f"run.path={whole}").code == 0
    assert sum(r["qk_clip"]["clipped"] for r in metrics(whole, "train")) > 0
    shutil.copytree(whole, parts)
    (parts / "result.json").unlink()
    (step,) = (parts / "checkpoints").glob("step-00000012")
    shutil.rmtree(step)
    answer = muonscale("train", *words, f"run.path={parts}", "--resume")
    assert answer.code == 0 and "at step 10 of" in answer.out, answer.err
    assert weights(parts) == weights(whole)
    clips = [[r["qk_clip"] for r in metrics(run, "train")] for run in (whole, parts)]
    assert clips[0] == clips[1]


def test_what_cannot_be_clipped_is_refused_before_anything_is_written(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "model.preset=gemma-nano", "optimizer.qk_clip=100"]
    for more in ([], ["--dry-run"]):
        answer = muonscale("train", *words, *more)
        assert answer.code == 2 and "normalizes queries or keys" in answer.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
