"""`train profile.steps=...`: what a profile of some steps leaves, and that it changes nothing."""

from __future__ import annotations

import gzip
import json
import re
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from muonscale.lab.run_folder import RunFolder
from tests.cli.jobs import Job
from tests.conftest import Muonscale

RANGES = {"data", "forward+backward", "gradients", "optimizer"}


def trace(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def optimizer_ms(table: str) -> float:
    found = re.search(r"^muonscale/optimizer +2 times, +([\d.]+) ms$", table, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_a_profile_of_steps(
    muonscale: Muonscale, tiny: list[str], trained_once: Path, tmp_path: Path
) -> None:
    run, plain = tmp_path / "run", trained_once
    answer = muonscale("train", *tiny, "profile.steps=6:8")
    assert answer.code == 0, answer.err
    stem = run / "profile" / "steps-6-7.rank0"
    spans = [e for e in trace(Path(f"{stem}.trace.json.gz")) if e.get("ph") == "X"]
    names = [e["name"].removeprefix("muonscale/") for e in spans if "muonscale/" in e["name"]]
    assert sorted(names) == sorted([*RANGES, *RANGES, "step 6", "step 7"])
    matmuls = [e["ts"] for e in spans if e["name"] == "aten::mm"]
    optimizer = next(e for e in spans if e["name"] == "muonscale/optimizer")
    assert any(ts < optimizer["ts"] for ts in matmuls)
    table = Path(f"{stem}.operators.txt").read_text()
    assert "aten::mm" in table
    seconds = optimizer_ms(table) / 1000
    spent = [e["dur"] for e in spans if e["name"] == "muonscale/optimizer"]
    assert seconds == pytest.approx(sum(spent) / 1e6, rel=0.01)
    records = RunFolder(run).read_metrics("train")
    assert [r["step"] for r in records if r.get("profiled")] == [6, 7]
    result = json.loads((run / "result.json").read_text())
    usual = [r["tokens_per_second"] for r in records if r["step"] not in (6, 7)]
    assert result["tokens_per_second"] == statistics.median(usual)
    for name in ("model/model.safetensors",):
        assert (run / name).read_bytes() == (plain / name).read_bytes()


def test_memory_is_that_of_the_operators(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    assert muonscale("train", *tiny, "train.steps=3", "profile.steps=2:3").code == 0
    path = tmp_path / "run" / "profile" / "steps-2-2.rank0.memory.json"
    found = json.loads(path.read_text())
    logits = 8 * 32 * 300 * 4  # sequences, length, vocabulary, float32
    assert found["allocated_bytes_by_operator"]["aten::_log_softmax"] == logits
    ranges = found["peak_bytes_by_range"]
    assert found["peak_bytes"] == ranges["muonscale/forward+backward"] > 2 * logits
    assert ranges["muonscale/optimizer"] < ranges["muonscale/forward+backward"]
    times, alive = zip(*found["timeline"], strict=True)
    assert max(alive) == found["peak_bytes"]
    assert list(times) == sorted(times)


@pytest.mark.slow
def test_a_run_that_stops_leaves_what_it_has_profiled_and_goes_on(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from muonscale.lab.training import loop

    step = loop.train_step

    def dies(state: Any, *args: Any, **options: Any) -> dict[str, Any]:
        if state.step == 7:
            raise KeyboardInterrupt
        return step(state, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies)
        assert muonscale("train", *tiny, "profile.steps=6:10").code == 130
    assert muonscale("train", tmp_path / "run", "--resume").code == 0
    names = {path.name.split(".")[0] for path in (tmp_path / "run" / "profile").iterdir()}
    assert names == {"steps-6-7", "steps-6-9"}


def test_steps_outside_of_the_run_are_refused(muonscale: Muonscale, tiny: list[str]) -> None:
    answer = muonscale("train", *tiny, "profile.steps=12:14")
    assert answer.code == 2
    assert re.search(r"profile\.steps=12:14 .* steps 1 to 12", answer.err)


def test_a_profile_that_cannot_be_written_stops_no_run(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    assert muonscale("train", *tiny, "train.steps=2").code == 0
    for name in ("result.json", "model"):
        path = tmp_path / "run" / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "profile").write_text("in the way")
    answer = muonscale("train", *tiny, "train.steps=2", "--resume", "profile.steps=1:2")
    assert answer.code == 0, answer.err
    assert "the profile is not written" in answer.out


@pytest.mark.parametrize("value", ["5", "[1,3]", "3", "a:b"])
def test_what_is_no_range_of_steps_is_shown_one(
    muonscale: Muonscale, tiny: list[str], value: str
) -> None:
    answer = muonscale("train", *tiny, f"profile.steps={value}")
    assert answer.code == 2 and "first:end" in answer.err


def test_a_gpu_leaves_a_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from muonscale.lab.training import profile

    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **k: asked.append(k))
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", lambda path: asked.append(path))
    monkeypatch.setattr(profile, "operators", lambda recorded, device: device.type)
    on_cpu = partial(torch.profiler.profile, profile_memory=True)
    monkeypatch.setattr(profile, "profile", lambda **options: on_cpu())
    profiler = profile.Profiler(range(1, 2), tmp_path / "p", 3, torch.device("cuda", 0))
    with profiler.step(1):
        torch.zeros(3)
    snapshot = str(tmp_path / "p" / "steps-1-1.rank3.memory.pickle")
    assert asked == [{"max_entries": profile.HISTORY}, snapshot, {"enabled": None}]


@pytest.mark.slow
def test_every_rank_leaves_its_profile(tiny: list[str], tmp_path: Path) -> None:
    job = Job(2, [*tiny, "profile.steps=2:4", "track=tensorboard"])
    job.output()
    names = {path.name for path in (tmp_path / "run" / "profile").glob("*.trace.json.gz")}
    assert names == {f"steps-2-3.rank{rank}.trace.json.gz" for rank in (0, 1)}
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 1
