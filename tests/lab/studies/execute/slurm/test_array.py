from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from muonscale.errors import StudyError
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.studies.config import ExecutorSection
from muonscale.lab.studies.execute.executor import make_executor
from muonscale.lab.studies.execute.folder import StudyFolder
from muonscale.lab.studies.execute.job import Job
from muonscale.lab.studies.execute.slurm import array as slurm
from muonscale.lab.studies.execute.slurm import queue as slurm_queue
from muonscale.lab.studies.execute.slurm.ledger import Ledger
from muonscale.lab.studies.kinds import load_study
from tests.lab.studies.fake_slurm import FakeSlurm

SYSTEM = "/usr/bin:/bin"


class Killed(BaseException):
    """Stands for SIGKILL: nothing handles it."""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "cluster"
    folder.mkdir()
    found = FakeSlurm(folder)
    monkeypatch.setenv("PATH", f"{found.bin}:{SYSTEM}")
    monkeypatch.setattr(slurm, "LAG", 0.0)
    return found


@pytest.fixture
def study(tmp_path: Path) -> Path:
    folder = tmp_path / "study"
    for name in ("configs", "runs", "logs"):
        (folder / name).mkdir(parents=True)
    return folder


def jobs_of(study: Path, number: int) -> list[Job]:
    jobs = []
    for id in "abcdefg"[:number]:
        folder = RunFolder(study / "runs" / id)
        folder.path.mkdir(exist_ok=True)
        config = study / "configs" / f"{id}.json"
        log = study / "logs" / f"{id}.log"
        jobs.append(Job(id, folder, config, log, log.with_suffix(".failed.json")))
    return jobs


def finish(study: Path, *ids: str) -> None:
    for id in ids:
        (study / "runs" / id / "result.json").write_text("{}")


def reason(job: Job) -> str:
    return json.loads(job.failure.read_text())["reason"]


def executor(study: Path, **section: Any) -> slurm.SlurmArray:
    made = make_executor(ExecutorSection(kind="slurm", **section), study)
    assert isinstance(made, slurm.SlurmArray)
    return made


@pytest.fixture
def run(study: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Run jobs; before each look at the queue but the first, the next of the happenings happens."""

    def do(jobs: Sequence[Job], *happenings: Callable[[], object], **section: Any) -> list[str]:
        left, ended = list(happenings), []

        def pause(seconds: float) -> None:
            assert left, f"waits for ever; ended: {ended}"
            left.pop(0)()

        monkeypatch.setattr(slurm, "sleep", pause)
        executor(study, **section).run(jobs, ended.append)
        assert not left
        return ended

    return do


# --- What is submitted


def test_jobs_are_one_array_with_the_studys_options(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]]
) -> None:
    options = {"slurm_partition": "gpu", "mem_gb": 4, "slurm_additional_parameters": {"nice": 7}}
    jobs = jobs_of(study, 3)
    ended = run(jobs, lambda: finish(study, "a", "b", "c"), workers=2, threads=4, slurm=options)
    assert sorted(ended) == ["a", "b", "c"]
    (text,) = fake.submitted
    flags = dict(re.findall(r"^#SBATCH --([a-z-]+)=?(.*)$", text, re.M))
    assert flags["array"] == "0-2%2"
    assert flags["cpus-per-task"] == "4" and "--cpus-per-task=4" in text.splitlines()[-1]
    assert (flags["partition"], flags["mem"], flags["nice"]) == ("gpu", "4GB", "7")
    assert flags["time"] == "60" and flags["signal"] == "USR2@90"
    assert {"requeue", "hold"} <= flags.keys()
    assert flags["job-name"] == json.loads((study / "slurm.json").read_text())["name"]


def test_options_of_the_user_come_before_the_defaults(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]]
) -> None:
    options = {"slurm_time": "2-0", "cpus_per_task": 8, "slurm_signal_delay_s": 300}
    run(jobs_of(study, 2), lambda: finish(study, "a", "b"), slurm=options)
    (text,) = fake.submitted
    assert "--time=2-0\n" in text and "--cpus-per-task=8\n" in text and "USR2@300" in text
    assert "0-1%2" in text  # all at a time


def test_more_runs_than_an_array_holds_are_several(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "ARRAY", 2)
    run(jobs_of(study, 3), lambda: finish(study, "a", "b", "c"))
    assert fake.begun == ["1_0", "1_1", "2"]


def test_a_study_within_a_job_hides_that_job_and_not_the_users_defaults(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"SLURM_JOB_ID": "7", "SLURM_MEM_PER_NODE": "100", "SLURM_CONF": "/etc/some.conf"}
    for key, value in given.items():
        monkeypatch.setenv(key, value)
    sbatch = fake.bin / "sbatch"
    sbatch.write_text(sbatch.read_text() + "\nenv >environment\n")
    run(jobs_of(study, 2), lambda: finish(study, "a", "b"))
    seen = (sbatch.parent.parent / "environment").read_text()
    assert "SLURM_CONF=/etc/some.conf" in seen
    assert "SLURM_MEM_PER_NODE" not in seen and "SLURM_JOB_ID" not in seen


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"partition": "gpu"}, "no option 'partition'; did you mean slurm_partition"),
        ({"slurm_partitoin": "gpu"}, "no option 'slurm_partitoin'; did you mean slurm_partition"),
        ({"name": "mine"}, "name='mine': "),
        ({"tasks_per_node": 2}, "tasks_per_node=2: a run of a study is one process"),
        ({"slurm_array_parallelism": 2}, "use executor.workers"),
        ({"slurm_use_srun": False}, "slurm_use_srun=False: "),
        ({"timeout_min": "soon"}, 'executor.slurm: Parameter "timeout_min" expected'),
    ],
)
def test_options_that_cannot_be_used_are_refused(
    options: dict[str, Any], sentence: str, fake: FakeSlurm, study: Path
) -> None:
    with pytest.raises(StudyError, match=re.escape(sentence)):
        executor(study, slurm=options)


def test_without_submitit_it_says_what_to_install(
    fake: FakeSlurm, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(StudyError, match=r'pip install "muonscale\[slurm\]"'):
        executor(study)


def test_without_slurm_it_says_where_to_go(study: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(StudyError, match="there is no sbatch on this machine"):
        executor(study)


def test_a_cluster_that_takes_no_jobs_is_a_sentence(fake: FakeSlurm, study: Path) -> None:
    (fake.bin / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid account' >&2\nexit 1")
    with pytest.raises(StudyError, match=r"takes no jobs of this study: .*invalid account"):
        executor(study).run(jobs_of(study, 2), print)


# --- Killed, and started again


def test_a_study_killed_while_it_waits_does_not_submit_again(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    def kill() -> None:
        raise Killed

    jobs = jobs_of(study, 3)
    with pytest.raises(Killed):
        run(jobs, lambda: finish(study, "b"), kill)
    left = [job for job in jobs if job.id != "b"]
    assert sorted(run(left, lambda: finish(study, "a", "c"))) == ["a", "c"]
    assert len(fake.submitted) == 1
    assert fake.begun == ["1_0", "1_1", "1_2"]
    assert "2 runs are with Slurm already" in capsys.readouterr().out
    assert Ledger(study).jobs == {}


def test_what_another_study_run_submitted_until_now_counts(
    fake: FakeSlurm, study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder is locked only after the executor was made."""
    made = executor(study)
    ledger = Ledger(study)
    ledger.add({"a": "7"})
    fake.give(ledger.name, "7")
    monkeypatch.setattr(slurm, "sleep", lambda seconds: finish(study, "a"))
    made.run(jobs_of(study, 1), print)
    assert not fake.submitted


@pytest.mark.parametrize("moment", ["before it is written down", "before they begin"])
def test_a_study_killed_while_it_submits_has_every_run_begin_once(
    moment: str,
    fake: FakeSlurm,
    study: Path,
    run: Callable[..., list[str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kill(*args: object) -> None:
        raise Killed

    jobs = jobs_of(study, 2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if moment == "before they begin":
            # The first call has nothing to release.
            patch.setattr(slurm_queue, "release", lambda ids: kill() if list(ids) else None)
        else:
            patch.setattr(Ledger, "add", kill)
        run(jobs)
    assert len(fake.submitted) == 1 and not fake.begun
    run(jobs, lambda: finish(study, "a", "b"))
    if moment == "before they begin":
        assert len(fake.submitted) == 1 and fake.begun == ["1_0", "1_1"]
    else:
        assert len(fake.submitted) == 2 and fake.begun == ["2_0", "2_1"]
        assert fake.state("1_0") == fake.state("1_1") == "CANCELLED"


def test_jobs_that_are_gone_are_submitted_again_and_no_others(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]]
) -> None:
    def leave() -> None:
        raise Killed

    jobs = jobs_of(study, 4)
    with pytest.raises(Killed):
        run(jobs, leave)
    fake.set_state("1_0", "CANCELLED")  # by hand, while no study was running
    fake.forget("1_1")
    finish(study, "c")
    fake.set_state("1_2", "COMPLETED")
    fake.set_state("1_3", "PENDING", "BeginTime")  # requeued
    ended = run(jobs, lambda: finish(study, "a", "b", "d"))
    assert ended[0] == "c" and sorted(ended) == ["a", "b", "c", "d"]
    assert len(fake.submitted) == 2
    assert fake.begun == ["1_0", "1_1", "1_2", "1_3", "2_0", "2_1"]


def test_a_job_that_is_about_to_leave_is_let_go(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]]
) -> None:
    first, second = jobs_of(study, 2)
    run([first], lambda: finish(study, "a"))
    assert fake.state("1") == "RUNNING"  # its result is there, and its process not yet gone
    run([second], lambda: finish(study, "b"))
    assert fake.state("1") == "RUNNING"


def test_a_failed_run_that_is_retried_is_submitted_again(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]]
) -> None:
    (job,) = jobs_of(study, 1)
    assert run([job], lambda: fake.set_state("1", "FAILED"), lambda: None) == ["a"]
    job.failure.unlink()
    assert run([job], lambda: finish(study, "a")) == ["a"]
    assert fake.begun == ["1", "2"]


# --- How jobs end


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("CANCELLED", "ended as CANCELLED, without a result; see"),
        ("NODE_FAIL", "ended as NODE_FAIL"),
        ("OUT_OF_MEMORY", "ended as OUT_OF_MEMORY, without a result; raise mem_gb"),
        ("TIMEOUT", "slurm_signal_delay_s"),
    ],
)
def test_a_job_that_leaves_nothing_is_a_failure_with_slurms_reason(
    state: str, words: str, fake: FakeSlurm, study: Path, run: Callable[..., list[str]]
) -> None:
    jobs = jobs_of(study, 2)
    fake_end = lambda: (fake.set_state("1_0", state), finish(study, "b"))  # noqa: E731
    assert sorted(run(jobs, fake_end, lambda: None)) == ["a", "b"]
    assert words in reason(jobs[0])
    assert str(jobs[0].log) in reason(jobs[0])
    assert str(study / "slurm" / "1_0_0_log.err") in reason(jobs[0])
    assert not jobs[1].failure.exists()


@pytest.mark.parametrize(
    ("accounting", "words"), [("CANCELLED by 0\n", "as CANCELLED,"), (None, "no longer knows how")]
)
def test_of_a_job_that_left_the_queue_the_accounting_is_asked(
    accounting: str | None,
    words: str,
    fake: FakeSlurm,
    study: Path,
    run: Callable[..., list[str]],
) -> None:
    if accounting:
        fake.have("accounting", accounting)
    (job,) = jobs_of(study, 1)
    run([job], lambda: fake.forget("1"), lambda: None)
    assert words in reason(job)


def test_a_result_may_come_later_than_the_end_of_its_job(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "LAG", 1000.0)
    (job,) = jobs_of(study, 1)
    over = lambda: fake.set_state("1", "COMPLETED")  # noqa: E731
    run([job], over, lambda: None, lambda: finish(study, "a"))
    assert not job.failure.exists()


def test_a_preempted_job_that_slurm_does_not_requeue_is_submitted_again(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]]
) -> None:
    jobs = jobs_of(study, 2)
    preempt = lambda: (fake.set_state("1_0", "PREEMPTED"), finish(study, "b"))  # noqa: E731
    run(jobs, preempt, lambda: finish(study, "a"))
    assert fake.begun == ["1_0", "1_1", "2"]
    assert not jobs[0].failure.exists()


def test_a_controller_that_is_down_for_a_while_is_waited_for(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    (job,) = jobs_of(study, 1)
    nothing = lambda: None  # noqa: E731
    run([job], lambda: fake.have("down"), nothing, nothing, lambda: finish(study, "a"))
    assert not job.failure.exists()
    assert capsys.readouterr().out.count("Unable to contact slurm controller") == 1


def test_nothing_is_submitted_if_slurm_does_not_say_what_it_has(
    fake: FakeSlurm, study: Path
) -> None:
    fake.have("down")
    with pytest.raises(StudyError, match="Unable to contact slurm controller"):
        executor(study).run(jobs_of(study, 2), print)
    assert not fake.submitted


def test_what_keeps_a_job_waiting_is_said(
    fake: FakeSlurm, study: Path, run: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    stall = lambda: fake.set_state("1_0", "PENDING", "PartitionTimeLimit")  # noqa: E731
    run(jobs_of(study, 2), stall, lambda: None, lambda: finish(study, "a", "b"))
    said = capsys.readouterr().out
    assert said.count("job 1 waits for: PartitionTimeLimit") == 1


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit(143)])
def test_an_interrupted_study_leaves_its_jobs_to_the_cluster(
    stop: BaseException,
    fake: FakeSlurm,
    study: Path,
    run: Callable[..., list[str]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupt() -> None:
        raise stop

    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(jobs_of(study, 2), lambda: finish(study, "a"), interrupt)
    said = capsys.readouterr().err
    assert "1 runs stay with the cluster" in said and "scancel 1\n" in said
    assert not [call for call in fake.calls if call.startswith("scancel")]
    assert Ledger(study).jobs == {"b": "1_1"}


# --- What `study status` says


@pytest.fixture
def planned(tmp_path: Path, corpus_file: Path) -> tuple[StudyFolder, dict[str, Any]]:
    """A study's folder and its two planned runs."""
    recipe = {
        "study": "compare",
        "path": str(tmp_path / "study"),
        "variants": ["adamw", "muon"],
        "baselines": ["adamw"],
        "search": {
            "keys": {"lr": {"key": "optimizer.lr", "start": 0.01}},
            "settings": 1,
            "most": 1,
        },
        "seeds": [0],
        "set": {"data.path": str(corpus_file)},
    }
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe))
    runs = {run.id: run for run in load_study(str(path)).plan({})}
    return StudyFolder(tmp_path / "study"), runs


def test_a_run_is_running_when_slurm_says_so(
    planned: tuple[StudyFolder, dict[str, Any]],
    fake: FakeSlurm,
    study: Path,
    run: Callable[..., list[str]],
) -> None:
    folder, runs = planned
    assert [o.state for o in folder.outcomes(runs).values()] == ["waiting", "waiting"]
    assert not fake.calls  # nothing is with Slurm

    def look() -> None:
        assert [o.state for o in folder.outcomes(runs).values()] == ["running", "waiting"]
        for job in jobs:
            finish(study, job.id)

    first, second = runs
    jobs = [replace(job, id=id) for id, job in zip((first, second), jobs_of(study, 2), strict=True)]
    for job, letter in zip(jobs, "ab", strict=True):
        (study / "runs" / job.id).symlink_to(study / "runs" / letter)
    run(jobs, lambda: fake.set_state("1_1", "PENDING", "Resources"), look)


def test_where_slurm_cannot_be_asked_status_says_so(
    planned: tuple[StudyFolder, dict[str, Any]], study: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, runs = planned
    first, second = runs
    Ledger(study).add({first: "12_3"})
    monkeypatch.setenv("PATH", "/nonexistent")
    found = folder.outcomes(runs)
    assert found[first].state == "running"
    assert "12_3" in found[first].reason and "no squeue" in found[first].reason
    assert found[second].state == "waiting"
