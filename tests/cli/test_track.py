"""Runs that are followed by trackers: what these are told, and that they change nothing."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.trackers import registry
from muonscale.lab.training.trackers.tensorboard import TensorBoard
from tests.conftest import Muonscale

STOPPED = 130


class Fake:
    """A tracker that keeps what it is told, and fails where it is asked to."""

    rewinds = False
    told: list[tuple[str, int]] = []
    fails_at = ""
    place = "nowhere"

    def __init__(self, beginning: Any) -> None:
        self.fail("begin")

    def fail(self, what: str) -> None:
        if what == type(self).fails_at:
            raise RuntimeError("out of order")

    def log(self, values: dict[str, float], step: int) -> None:
        if step == 7:
            self.fail("log")
        self.told.append((next(iter(values)).split("/")[0], step))

    def end(self, result: dict[str, float], sample: str, step: int) -> None:
        self.fail("end")

    def close(self, *, finished: bool) -> None:
        self.fail("finish")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[Fake]:
    class Own(Fake):
        told: list[tuple[str, int]] = []

    monkeypatch.setitem(registry.TRACKERS, "wandb", Own)
    return Own


@pytest.fixture(scope="module")
def plain(trained_once: Path) -> bytes:
    """The weights of a run without trackers."""
    return weights(trained_once)


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the numbers of metrics.jsonl by name, read without the code under test."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for record in RunFolder(run).read_metrics():
        for name, value in record.items():
            if name in ("kind", "step"):
                continue
            inner = value if isinstance(value, dict) else {None: value}
            for key, number in inner.items():
                if isinstance(number, int | float):
                    full = f"{record['kind']}/{name}" + ("" if key is None else f"/{key}")
                    found[full].append((record["step"], number))
    return found


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {
        name: [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def assert_same(
    found: dict[str, list[tuple[int, float]]], wanted: dict[str, list[tuple[int, float]]]
) -> None:
    for name, points in wanted.items():
        assert [step for step, _ in found[name]] == [step for step, _ in points], name
        assert [value for _, value in found[name]] == pytest.approx([v for _, v in points]), name


def history(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[str]]:
    """Return history rows, summaries and ids of the offline files of W&B, parsed as they are.

    The format is that of LevelDB's log: blocks of 32 KiB, a header of 7 bytes for each.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    rows: list[dict[str, Any]] = []
    summaries: list[dict[str, Any]] = []
    ids = []
    for path in sorted(run.glob("wandb/offline-run-*/*.wandb")):
        for payload in leveldb_records(path.read_bytes()):
            record = Record.FromString(payload)
            if record.HasField("run"):
                ids.append(record.run.run_id)
            if record.HasField("history"):
                rows.append(items(record.history.item))
            if record.HasField("summary"):
                summaries.append(items(record.summary.update))
    return rows, summaries, ids


def items(parts: Any) -> dict[str, Any]:
    return {part.key or "/".join(part.nested_key): json.loads(part.value_json) for part in parts}


def leveldb_records(data: bytes) -> list[bytes]:
    block, at, whole, found = 32768, 7, b"", []
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        if kind == 0:
            at += block - at % block
            continue
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(whole)
            whole = b""
    return found


def test_tensorboard_has_the_metrics_of_the_run(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, plain: bytes
) -> None:
    run = tmp_path / "run"
    answer = muonscale("train", *tiny, "track=tensorboard", "telemetry.every=6")
    assert answer.code == 0, answer.err
    found = scalars(run)
    assert_same(found, {k: v for k, v in expected(run).items() if not k.startswith("telemetry")})
    telemetry = RunFolder(run).read_metrics("telemetry")
    rms = [(r["step"], r["groups"]["hidden"]["update_rms"]) for r in telemetry]
    assert_same(found, {"telemetry/groups/hidden/update_rms": rms})
    result = json.loads((run / "result.json").read_text())
    assert found["result/perplexity"] == [(12, pytest.approx(result["perplexity"]))]
    assert result["trackers"] == {"tensorboard": "complete"}
    assert weights(run) == plain


def interrupted(
    muonscale: Muonscale, tiny: list[str], monkeypatch: pytest.MonkeyPatch, *words: str
) -> None:
    """Train until step 8 has been told, lose what came after the checkpoint of step 5."""
    from muonscale.lab.training import loop

    step = loop.train_step

    def dies(state: Any, *args: Any, **options: Any) -> dict[str, Any]:
        if state.step == 8:
            raise KeyboardInterrupt
        return step(state, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", dies)
        assert muonscale("train", *tiny, *words).code == STOPPED


def test_a_resumed_run_goes_on_in_tensorboard(
    muonscale: Muonscale,
    tiny: list[str],
    tmp_path: Path,
    plain: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    interrupted(muonscale, tiny, monkeypatch, "track=tensorboard")
    assert scalars(tmp_path / "run")["train/loss"][-1][0] == 8
    time.sleep(1)  # readers order files by the second in their names, then by a number as text
    answer = muonscale("train", tmp_path / "run", "--resume")
    assert answer.code == 0, answer.err
    assert_same(scalars(tmp_path / "run"), expected(tmp_path / "run"))
    assert len(list((tmp_path / "run" / "tensorboard").iterdir())) == 2
    assert weights(tmp_path / "run") == plain


@pytest.mark.slow
def test_wandb_offline_has_every_step_once_over_a_resumption(
    muonscale: Muonscale,
    tiny: list[str],
    tmp_path: Path,
    plain: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = tmp_path / "run"
    interrupted(muonscale, tiny, monkeypatch, "track=wandb", "track.mode=offline")
    answer = muonscale("train", run, "--resume")
    assert answer.code == 0, answer.err
    assert "warning" not in answer.out
    rows, summaries, ids = history(run)
    wanted = expected(run)
    for name in ("train/loss", "train/lr/hidden", "eval/validation_loss"):
        found = [(row["_step"], row[name]) for row in rows if name in row]
        assert found == [(step, pytest.approx(value)) for step, value in wanted[name]]
    assert len(set(ids)) == 1
    final = {key: value for summary in summaries for key, value in summary.items()}
    result = json.loads((run / "result.json").read_text())
    assert final["result/validation_loss"] == result["validation_loss"]
    assert final["sample"] == result["sample"]
    assert weights(run) == plain


ALONE = """
import socket, sys
def refused(*arguments):
    print("network:", arguments, file=sys.stderr)
    raise OSError("no network here")
socket.getaddrinfo = socket.create_connection = refused
from muonscale.cli import main
sys.exit(main())
"""


@pytest.mark.slow
def test_trackio_is_local_and_goes_on(tiny: list[str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    environment = {
        **os.environ,
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "TRACKIO_SPACE_ID": "somebody/somewhere",
        "HF_TOKEN": "hf_" + "a" * 34,
    }
    first = alone([*tiny, "track=trackio", "track.mode=offline"], environment)
    assert "network:" not in first.stderr
    assert "warning" not in first.stdout
    (run / "result.json").unlink()
    for checkpoint in sorted((run / "checkpoints").iterdir())[1:]:  # back to step 10
        for file in sorted(checkpoint.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        checkpoint.rmdir()
    alone([str(run), "--resume"], environment)
    found, wanted = trackio_logs(tmp_path / "trackio", run), expected(run)
    names = (
        "train/loss",
        "train/lr/hidden",
        "eval/validation_loss",
    )  # times are those of the first
    assert_same(found, {name: wanted[name] for name in names})


def alone(words: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", ALONE, "train", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def trackio_logs(folder: Path, run: Path) -> dict[str, list[tuple[int, float]]]:
    """Return the rows of the run in Trackio's database, by name of the metric."""
    import sqlite3

    identity = json.loads((run / "trackers.json").read_text())["id"]
    connection = sqlite3.connect(folder / "muonscale.db")
    rows = connection.execute(
        "select step, metrics from metrics where run_name = ? order by id", (f"run-{identity}",)
    ).fetchall()
    connection.close()
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for step, metrics in rows:
        for name, value in json.loads(metrics).items():
            found[name].append((step, value))
    return found


@pytest.mark.parametrize("point", ["begin", "log", "end", "finish"])
def test_a_tracker_that_fails_is_one_warning(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, plain: bytes, fake: Any, point: str
) -> None:
    fake.fails_at = point
    answer = muonscale("train", *tiny, "track=[wandb,tensorboard]")
    assert answer.code == 0, answer.err
    said = f"switched off: failed to {point}: RuntimeError: out of order"
    assert answer.out.count(f"warning: track=wandb is {said}") == 1
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["trackers"] == {"wandb": said, "tensorboard": "complete"}
    environment = json.loads((tmp_path / "run" / "env.json").read_text())
    assert environment["trackers"]["wandb"] == (said if point == "begin" else "nowhere")
    assert_same(scalars(tmp_path / "run"), expected(tmp_path / "run"))
    assert weights(tmp_path / "run") == plain


def test_a_package_that_does_not_import_is_a_warning(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken" / "wandb").mkdir(parents=True)
    (tmp_path / "broken" / "wandb" / "__init__.py").write_text("raise ImportError('half of it')")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    for name in [name for name in sys.modules if name.split(".")[0] == "wandb"]:
        monkeypatch.delitem(sys.modules, name)
    answer = muonscale("train", *tiny, "train.steps=2", "track=wandb")
    assert answer.code == 0
    assert "warning: track=wandb is switched off: failed to begin: ImportError: half" in answer.out


def test_a_tracker_that_comes_later_or_again_is_told_what_it_missed(
    muonscale: Muonscale,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    fake: Any,
) -> None:
    fake.fails_at = "log"  # of step 7, after the evaluation of step 4
    interrupted(muonscale, tiny, monkeypatch, "track=wandb")
    assert [step for kind, step in fake.told if kind == "train"] == [1, 2, 3, 4, 5, 6]
    fake.fails_at = ""
    words = ("train", tmp_path / "run", "--resume", "track=[wandb,tensorboard]")
    assert muonscale(*words).code == 0
    assert [step for kind, step in fake.told if kind == "train"] == list(range(1, 13))
    assert [step for kind, step in fake.told if kind == "eval"] == [4, 8, 12]
    assert_same(scalars(tmp_path / "run"), expected(tmp_path / "run"))


@pytest.mark.parametrize("dry", [[], ["--dry-run"]])
def test_a_missing_package_is_refused_before_anything_is_done(
    muonscale: Muonscale,
    tiny: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    dry: list[str],
) -> None:
    monkeypatch.setitem(sys.modules, "trackio", None)
    answer = muonscale("train", *tiny, "track=trackio", *dry)
    assert answer.code == 2
    assert 'pip install "muonscale[track]"' in answer.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("track=wanbd", "did you mean wandb?"),
        ("track=[tensorboard, none]", "track=none"),
        ("track=7", "track=7"),
        ("track.mode=offlin", "track.mode='offlin'"),
        ("track.two=wandb", "unknown key track.two; did you mean to?"),
        ("trak=wandb", "must have the form section.key=value"),
    ],
)
def test_a_wrong_tracker_is_refused(
    muonscale: Muonscale, tiny: list[str], word: str, said: str
) -> None:
    answer = muonscale("train", *tiny, word)
    assert answer.code == 2
    assert said in answer.err


DAMAGED = ["{}", "[" * 5000, '{"id": "x", "known": {"tensorboard": 5}}']


def test_a_damaged_file_of_trackers_is_refused(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    words = [*tiny, "train.steps=5", "--resume", "track=tensorboard"]
    assert muonscale("train", *words).code == 0
    (tmp_path / "run" / "result.json").unlink()
    for text in DAMAGED:
        (tmp_path / "run" / "trackers.json").write_text(text)
        answer = muonscale("train", *words)
        assert answer.code == 2 and "trackers.json" in answer.err, text[:50]


def test_the_result_is_there_before_the_trackers_are_told(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def end(self: object, *told: object) -> None:
        seen.append((tmp_path / "run" / "result.json").exists())

    monkeypatch.setattr(TensorBoard, "end", end)
    assert muonscale("train", *tiny, "train.steps=2", "track=tensorboard").code == 0
    assert seen == [True]
