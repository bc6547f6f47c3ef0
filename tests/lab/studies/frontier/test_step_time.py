from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from muonscale.errors import StudyError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.frontier.analysis import choose_step_time
from muonscale.lab.studies.frontier.config import FrontierSection
from muonscale.lab.studies.frontier.stated_step_time import StatedStepTime
from muonscale.lab.studies.frontier.step_time import MeasuredStepTime, StepTimeModel, fit_step
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.study import Outcome
from tests.conftest import Muonscale

LENGTH = 32


def config(batch: int, *overrides: str) -> Config:
    words = ["model.preset=llama-pico", f"data.sequence_length={LENGTH}", "data.vocab_size=300"]
    words += [f"train.batch_tokens={batch}", "train.steps=4", "eval.batch_tokens=32", *overrides]
    return load_config("demo", words)


def timed(
    path: Path, variant: str, batch: int, step_ms: list[float], optimizer_ms: float, *more: str
) -> Outcome:
    """Return a finished run with steps of so many milliseconds."""
    folder = RunFolder(path / f"{variant}-{batch}-{len(more)}")
    resolved = config(batch, f"optimizer.rule={variant}", *more)
    folder.create(resolved)
    for number, ms in enumerate(step_ms, 1):
        folder.append_metrics(
            {"kind": "train", "step": number, "step_ms": ms, "optimizer_ms": optimizer_ms}
        )
    environment = {"device_name": "Two Cores", "threads": 1, "processes": 1}
    (folder.path / "env.json").write_text(json.dumps(environment))
    run = PlannedRun({"variant": variant, "batch": batch, "seed": 0}, resolved)
    return Outcome(run, folder, "finished", {"validation_loss": 3.0})


def study(path: Path, *more: str) -> dict[str, Outcome]:
    """Return runs whose passes take 3 ms + 0.02 ms per token, but for one slow step.

    AdamW's runs of 64 and 512 tokens, and Muon's of 128, were on a machine that did other work.
    """
    busy = {("adamw", 64): 3.0, ("adamw", 512): 1.5, ("muon", 128): 2.0}
    runs = [
        timed(
            path,
            variant,
            batch,
            [500, *[(3 + 0.02 * batch) * busy.get((variant, batch), 1) + own] * 4],
            own,
            *more,
        )
        for variant, own in (("muon", 5), ("adamw", 1))
        for batch in (64, 128, 512)
    ]
    return {o.run.id: o for o in runs}


def model(section: FrontierSection, outcomes: dict[str, Outcome]) -> StepTimeModel:
    return choose_step_time(section, ["muon", "adamw"], outcomes, LENGTH)


def values(throughput: StepTimeModel) -> dict[str, str]:
    return {row["what"]: row["value"] for row in throughput.assumptions()}


def test_measured_recovers_what_was_planted(tmp_path: Path) -> None:
    outcomes = study(tmp_path)
    found = model(FrontierSection(), outcomes)
    assert isinstance(found, MeasuredStepTime)
    muon, adamw = found.fits["muon"], found.fits["adamw"]
    assert (muon.fixed, muon.per_token) == (pytest.approx(3e-3), pytest.approx(2e-5))
    assert (adamw.fixed, adamw.per_token) == (muon.fixed, muon.per_token)
    assert (muon.optimizer, adamw.optimizer) == (0.005, 0.001)
    assert (muon.runs, muon.batches.low, muon.batches.high) == (6, 64, 512)
    # 512 tokens on 4 devices: 3 ms + 128 tokens, and a fourth of 5 ms.
    assert found.seconds("muon", 512, 4) == pytest.approx((3 + 0.02 * 128 + 5 / 4) / 1000)
    assert found.seconds("muon", 512, 32) == math.inf  # half a sequence each
    assert found.seconds("muon", 512, 3) == math.inf  # not as many sequences each
    repeated = model(FrontierSection(optimizer_work="repeated"), outcomes)
    assert repeated.seconds("muon", 512, 4) == pytest.approx((3 + 0.02 * 128 + 5) / 1000)


def test_every_number_of_the_measured_model_is_printed(tmp_path: Path) -> None:
    found = model(FrontierSection(), study(tmp_path))
    said = values(found)
    assert said["steps"] == "timed on Two Cores, 1 thread"
    assert said["passes of muon"] == "3 ms + 20 ms per 1,000 tokens"
    assert said["passes of adamw"] == "3 ms + 20 ms per 1,000 tokens"
    assert said["optimizer of muon"] == "5 ms, divided by the number of devices"
    assert said["optimizer of adamw"] == "1 ms, divided by the number of devices"
    assert "no communication" in said["data parallelism"]
    assert "whole sequences of 32 tokens" in said["batches"]
    assert "below 64 tokens, down to 32" in said["fewer tokens than were timed"]
    sources = {row["what"]: row["source"] for row in found.assumptions()}
    assert (
        "of 6 runs with this model, of 64 to 512 tokens; largest error 0.00%"
        in (sources["passes of muon"])
    )
    repeated = model(FrontierSection(optimizer_work="repeated"), study(tmp_path / "other"))
    assert values(repeated)["optimizer of muon"] == "5 ms, repeated on each device"


def test_errors_are_relative() -> None:
    # Least squares of relative errors of t = a + b x, by the normal equations.
    x, t = np.array([1.0, 10.0, 100.0]), np.array([2.0, 12.0, 95.0])
    design = np.stack([1 / t, x / t], axis=1)
    a, b = np.linalg.solve(design.T @ design, design.sum(axis=0))
    found = fit_step(x, t, np.array([3.0, 1.0, 2.0]))
    assert (found.fixed, found.per_token) == (pytest.approx(a), pytest.approx(b))
    assert found.optimizer == 1.0
    assert found.largest == pytest.approx(np.abs((a + b * x) / t - 1).max())


def test_runs_that_do_not_tell_are_refused(tmp_path: Path) -> None:
    one = timed(tmp_path, "muon", 64, [10], 1)
    with pytest.raises(StudyError, match=r"muon: .* at least 2 different batch sizes, got 1"):
        choose_step_time(FrontierSection(), ["muon"], {"a": one}, LENGTH)
    with pytest.raises(StudyError, match=r"adamw: .* got 0"):
        choose_step_time(FrontierSection(), ["adamw"], {"a": one}, LENGTH)
    with pytest.raises(StudyError, match="took no longer"):
        fit_step(np.array([1.0, 2.0]), np.array([2.0, 1.0]), np.ones(2))
    (one.folder.path / "env.json").write_text(json.dumps({"processes": 2}))
    with pytest.raises(StudyError, match=r"one process .* has 2 processes"):
        choose_step_time(FrontierSection(), ["muon"], {"a": one}, LENGTH)
    one.folder.metrics.unlink()
    with pytest.raises(StudyError, match="is incomplete"):
        choose_step_time(FrontierSection(), ["muon"], {"a": one}, LENGTH)


@pytest.mark.parametrize(("variant", "devices"), [("muon", 4), ("adamw", 4), ("muon", 1)])
def test_stated_is_what_plan_says(
    tmp_path: Path, muonscale: Muonscale, variant: str, devices: int
) -> None:
    section = FrontierSection(throughput="a100-80gb", mfu=0.5, bandwidth=10)
    outcomes = study(tmp_path)
    found = model(section, outcomes)
    own = next(
        o for o in outcomes.values() if o.run.label.startswith(variant) and "=512" in o.run.label
    )
    words = ["plan", own.folder.path, "--device", "a100-80gb", "--devices", devices]
    answer = muonscale(*words, "--mfu", "0.5", "--bandwidth", "10", "--json")
    assert answer.code == 0, answer.err
    tree = json.loads(answer.out)
    for batch in (64, 128):  # activations of the same share were counted before
        found.seconds(variant, batch, batch // (512 // devices) or 1)
    assert isinstance(found, StatedStepTime)
    assert found.facts(variant, 512, devices) == tree
    assert found.seconds(variant, 512, devices) == tree["time"]["step"]
    rows = found.assumptions()
    assert all(row in rows for row in tree["assumptions"])
    said = values(found)
    assert said["MFU of the model"] == "0.5"
    assert said["between machines"] == "10 GB/s per device"
    assert said["layout"] == "fsdp" and said["steps"].startswith("computed for a100-80gb")
    assert found.seconds(variant, 512, 32) == math.inf
    with pytest.raises(StudyError, match=r"no finished run .* 256 tokens"):
        found.seconds(variant, 256, 2)


def test_a_micro_batch_is_cut_to_what_divides_the_share(tmp_path: Path) -> None:
    outcomes = study(tmp_path, "train.micro_batch_tokens=64")
    found = model(FrontierSection(throughput="h100"), outcomes)
    assert isinstance(found, StatedStepTime)
    assert found.facts("muon", 512, 1)["layout"]["micro_batch_tokens"] == 64
    assert found.facts("muon", 512, 16)["layout"]["micro_batch_tokens"] == 32
    assert values(found)["micro-batches"].startswith("at most 64 tokens")
    # 384 tokens are 4 sequences on each of 3 devices, which micro-batches of 3 do not divide.
    run = timed(tmp_path, "muon", 384, [10], 1, "train.micro_batch_tokens=96")
    stated = StatedStepTime(FrontierSection(throughput="h100"), [run], LENGTH)
    assert stated.facts("muon", 384, 3)["layout"]["micro_batch_tokens"] == 64


def test_what_does_not_fit_into_memory_is_left_out_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = model(FrontierSection(throughput="h100"), study(tmp_path))
    assert isinstance(found, StatedStepTime)
    assert math.isfinite(found.seconds("muon", 512, 1))
    monkeypatch.setitem(found.facts("muon", 512, 1)["memory"], "fits", False)
    found.seconds("muon", 512, 2)
    assert found.seconds("muon", 512, 1) == math.inf
    assert values(found)["left out"].startswith("1 of 2 combinations")


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"devices": [2, 1]}, "frontier.devices=.* must rise"),
        ({"devices": []}, "at least 1"),
        ({"devices": [0]}, "greater than 0"),
        ({"throughput": "h10"}, "neither measured nor a device: .*h100"),
        ({"throughput": "h100", "mfu": 1.5}, "less than or equal to 1"),
        ({"throughput": "h100", "bandwidth": 0}, "greater than 0"),
        ({"mfu": 0.5}, "frontier.mfu=0.5 .* measured"),
        ({"bandwidth": 10}, "frontier.bandwidth=10 .* measured"),
        (
            {"throughput": "h100", "optimizer_work": "repeated"},
            "frontier.optimizer_work=repeated .* h100",
        ),
        ({"optimizer_work": "shared"}, "'divided' or 'repeated'"),
    ],
)
def test_wrong_values_are_refused(keys: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        FrontierSection.model_validate(keys)


def test_a_resolved_section_can_be_given_back() -> None:
    for section in (FrontierSection(), FrontierSection(throughput="cpu", mfu=0.3, bandwidth=1)):
        assert FrontierSection.model_validate(section.model_dump(mode="json")) == section
