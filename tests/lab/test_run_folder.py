from __future__ import annotations

import fcntl
import json
import math
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from muonscale.errors import CheckpointError
from muonscale.lab.config.load import load_config
from muonscale.lab.files import write_atomic
from muonscale.lab.run_folder import RunFolder


def lines(folder: RunFolder) -> list[tuple[str, int]]:
    return [(r["kind"], r["step"]) for r in folder.read_metrics()]


def test_metrics_after_a_step_and_a_cut_line_are_dropped(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append_metrics({"kind": "train", "step": step})
    with folder.metrics.open("a") as file:
        file.write('{"kind": "train", "st')
    assert [record["step"] for record in folder.truncate_metrics(2, pytest.fail)] == [1, 2, 3]
    assert lines(folder) == [("train", 1), ("train", 2)]
    folder.append_metrics({"kind": "train", "step": 3})
    assert lines(folder)[-1] == ("train", 3)


def test_records_around_damaged_lines_stay_and_the_file_is_kept(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in range(1, 8):
        folder.append_metrics({"kind": "train", "step": step})
    for damage, number in ((b'{"kind": "tr\xff', 2), (b"5", 4)):
        split = folder.metrics.read_bytes().split(b"\n")
        split[number] = damage
        folder.metrics.write_bytes(b"\n".join(split))
    before, said = folder.metrics.read_bytes(), []
    assert [step for _, step in lines(folder)] == [1, 2, 4, 6, 7]
    assert [record["step"] for record in folder.truncate_metrics(6, said.append)] == [1, 2, 4, 6, 7]
    assert [step for _, step in lines(folder)] == [1, 2, 4, 6]
    assert (tmp_path / "metrics-damaged.jsonl").read_bytes() == before
    assert len(said) == 1 and "2 of 7 lines" in said[0] and "line 3" in said[0]
    folder.truncate_metrics(6, pytest.fail)
    folder.metrics.write_bytes(b"5\n")
    folder.truncate_metrics(6, said.append)
    assert (tmp_path / "metrics-damaged.jsonl").read_bytes() == before
    assert (tmp_path / "metrics-damaged1.jsonl").read_bytes() == b"5\n"


def test_a_replaced_record_stands_once(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append_metrics({"kind": "train", "step": 1})
    for value in (1.0, math.nan, 2.0):
        records = folder.replace_metrics({"kind": "eval", "step": 1, "validation_loss": value})
        assert records == folder.read_metrics()
    assert folder.read_metrics("train") == [{"kind": "train", "step": 1}]
    assert lines(folder) == [("train", 1), ("eval", 1)]
    assert folder.read_metrics()[1]["validation_loss"] == 2.0


def test_numbers_that_are_not_finite_are_written_as_null(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    record = {"kind": "train", "step": 1, "loss": math.nan, "grad_norm": {"hidden": math.inf}}
    folder.append_metrics(record)
    assert "NaN" not in folder.metrics.read_text() and "Inf" not in folder.metrics.read_text()
    assert folder.read_metrics()[0]["grad_norm"] == {"hidden": None}


def test_a_folder_where_nothing_was_begun_is_not_left_behind(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "new").locked():
        pass
    assert not (tmp_path / "new").exists()
    with RunFolder(tmp_path / "begun").locked():
        RunFolder(tmp_path / "begun").create(load_config("demo"))
    assert (tmp_path / "begun" / "config.json").exists()


def test_an_existing_run_needs_resume(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(load_config("demo"))
    assert folder.check_free(resume=True)
    with pytest.raises(CheckpointError, match="--resume"):
        folder.check_free(resume=False)


def test_a_folder_of_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    for resume in (True, False):
        with pytest.raises(CheckpointError, match=r"run\.path=FOLDER") as caught:
            RunFolder(tmp_path).check_free(resume=resume)
        assert "--resume" not in str(caught.value)  # there is nothing to resume


def test_a_changed_configuration_is_refused_key_by_key(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(load_config("demo"))
    with pytest.raises(CheckpointError) as error:
        folder.check_same(load_config("demo", ["optimizer.lr=0.5", "train.steps=9"]))
    for text in ("optimizer.lr: 0.02 in the run, 0.5 now", "train.steps: None in the run, 9 now"):
        assert text in str(error.value)


def test_a_model_is_not_taken_for_a_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="is not a run folder"):
        RunFolder(tmp_path).saved_config()


def test_what_a_run_depends_on_is_nothing_until_it_is_written(tmp_path: Path) -> None:
    assert RunFolder(tmp_path).environment() == {}
    (tmp_path / "env.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"env\.json cannot be read"):
        RunFolder(tmp_path).environment()


def test_keys_that_change_no_weights_may_change(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.create(load_config("demo"))
    free = [
        "eval.every=7",
        "checkpoint.keep=9",
        "checkpoint.marks=[0.5]",
        "run.threads=1",
        "data.cache=x",
        "run.path=y",
    ]
    folder.check_same(load_config("demo", free))


def test_a_second_process_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib; from muonscale.lab.run_folder import RunFolder\n"
        "with RunFolder(pathlib.Path(sys.argv[1])).locked(): pass"
    )
    with RunFolder(tmp_path).locked():
        other = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
        )
    assert "another process is training" in other.stderr
    with RunFolder(tmp_path).locked():
        pass


def test_a_file_system_without_locks_is_not_another_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("muonscale.lab.files.fcntl.flock", fail)
    folder = RunFolder(tmp_path)
    with (
        pytest.raises(CheckpointError, match=r"does not lock files \(Function not implemented\)"),
        folder.locked(),
    ):
        pass
    assert (tmp_path / "run.lock").exists() and not folder.is_locked()


def test_a_folder_that_cannot_be_made_is_a_sentence() -> None:
    with (
        pytest.raises(CheckpointError, match="/proc/run cannot be written"),
        RunFolder(Path("/proc/run")).locked(),
    ):
        pass


def test_an_atomic_write_leaves_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.json"
    write_atomic(path, json.dumps(1))

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("muonscale.lab.files.os.fsync", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, json.dumps(2))
    assert path.read_text() == "1"


def test_processes_that_share_a_file_do_not_share_what_they_write_it_from(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    (tmp_path / ".x.json.tmp").mkdir()  # in the way of a name that all processes have
    write_atomic(path, "1", shared=True)
    assert path.read_text() == "1"
    with pytest.raises(IsADirectoryError):
        write_atomic(path, "2")


def test_an_atomic_write_that_cannot_be_renamed_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "x.json").mkdir()
    for shared in (False, True):
        with pytest.raises(OSError, match=r"x\.json"):
            write_atomic(tmp_path / "x.json", "1", shared=shared)
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_who_asks_whether_a_folder_is_held_keeps_nobody_out(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    with folder.locked():
        (folder.path / "config.json").touch()  # so that the folder stays
    with (folder.path / "run.lock").open() as asking:
        fcntl.flock(asking, fcntl.LOCK_SH)  # as `is_locked` does for a moment
        threading.Timer(0.15, lambda: fcntl.flock(asking, fcntl.LOCK_UN)).start()
        with folder.locked():
            assert folder.is_locked()
        assert not folder.is_locked()
