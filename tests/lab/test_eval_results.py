from __future__ import annotations

import json
from pathlib import Path

import pytest

from muonscale.errors import CheckpointError
from muonscale.lab.eval_results import Record, read_results


def record(folder: Path, step: int = 10, weights: str = "a") -> Record:
    return Record(folder=folder, step=step, weights=weights, parameters=3)


def task(name: str, value: float, **other: object) -> dict:
    return {"task": name, "shots": 0, "limit": None, "values": {"acc,none": value}, **other}


def test_a_later_call_keeps_what_it_does_not_repeat(tmp_path: Path) -> None:
    mine = record(tmp_path)
    mine.add("tasks", task("one", 0.1))
    mine.add("tasks", task("two", 0.2))
    mine.add("tasks", task("one", 0.3))
    mine.add("tasks", task("one", 0.4, limit=5))
    mine.add("texts", {"fingerprint": "x", "split": "all", "sequence_length": 8, "loss": 2.0})
    found = [(t["task"], t["limit"], t["values"]["acc,none"]) for t in mine.read()["tasks"]]
    assert found == [("two", None, 0.2), ("one", None, 0.3), ("one", 5, 0.4)]
    assert mine.read()["texts"][0]["loss"] == 2.0


def test_checkpoints_are_apart_by_step_and_by_weights(tmp_path: Path) -> None:
    record(tmp_path).add("tasks", task("one", 0.1))
    record(tmp_path, weights="b").add("tasks", task("one", 0.2))
    record(tmp_path, step=11).add("tasks", task("one", 0.3))
    record(tmp_path).add("tasks", task("two", 0.4))
    kept = [
        (c["step"], c["weights"], len(c["tasks"])) for c in read_results(tmp_path)["checkpoints"]
    ]
    assert kept == [(10, "b", 1), (11, "a", 1), (10, "a", 2)]


def test_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    record(tmp_path).add("tasks", task("one", float("nan")))
    assert "NaN" not in (tmp_path / "result.json").read_text()


@pytest.mark.parametrize("content", ["{", "[]", '{"checkpoints": [{"step": 1}]}'])
def test_a_file_that_is_no_result_is_refused_and_left(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(CheckpointError, match="--out"):
        record(tmp_path).check()
    assert (tmp_path / "result.json").read_text() == content


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    (tmp_path / "eval").write_text("a file")
    with pytest.raises(CheckpointError, match="--out"):
        record(tmp_path / "eval").check()


def test_the_file_is_whole_at_any_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path).add("tasks", task("one", 0.1))
    before = (tmp_path / "result.json").read_text()

    def fail(self: Path, target: Path) -> None:
        raise OSError("full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="full"):
        record(tmp_path).add("tasks", task("two", 0.2))
    assert (tmp_path / "result.json").read_text() == before and json.loads(before)
