"""Studies on a real Slurm of one node: each ends as the same study does in one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import PATIENCE, Cluster, StudyRun, wait_for

pytestmark = pytest.mark.slow

Make = Callable[[dict[str, Any]], StudyRun]

LONG = {"train.steps": 600, "checkpoint.every": 100_000}
"""A run that takes long enough to be met while it trains, and saves itself only when asked to."""


@pytest.fixture
def recipe(corpus_file: Path, tmp_path: Path) -> dict[str, Any]:
    return {
        "study": "compare",
        "base": "demo",
        "set": {
            "model.preset": "llama-pico",
            "data.path": str(corpus_file),
            "data.cache": str(tmp_path / "cache"),
            "data.vocab_size": 300,
            "data.sequence_length": 32,
            "train.steps": 12,
            "train.batch_tokens": 256,
            "eval.every": 200,
            "eval.tokens": 512,
            "eval.batch_tokens": 512,
            "eval.sample_tokens": 0,
        },
        "variants": {"adamw": {}, "muon": {}},
        "baselines": ["adamw"],
        "search": {
            "keys": {"lr": {"key": "optimizer.lr", "start": 0.005}},
            "settings": 1,
            "most": 1,
            "seeds": [0, 1],
        },
        "seeds": [0, 1],
    }


@pytest.fixture
def there(tmp_path: Path, cluster: Cluster) -> Iterator[Make]:
    """Make a study of a recipe, to be done by Slurm."""
    made: list[StudyRun] = []

    def make(recipe: dict[str, Any]) -> StudyRun:
        made.append(StudyRun(recipe | {"executor": {"kind": "slurm"}}, tmp_path / "there"))
        return made[-1]

    yield make
    for study in made:
        study.stop()
    cluster.clear()


@pytest.fixture
def here(tmp_path: Path) -> Make:
    """The same, to be done in one process."""
    return lambda recipe: StudyRun(recipe | {"executor": {"kind": "inline"}}, tmp_path / "here")


def timeless(found: Any) -> Any:
    """Return what was found without what says how long it took."""
    if isinstance(found, dict):
        return {key: timeless(value) for key, value in found.items() if "second" not in key}
    return [timeless(item) for item in found] if isinstance(found, list) else found


def failures(study: StudyRun) -> list[tuple[str, str]]:
    return [(failed["run"], failed["reason"]) for failed in study.result["failed"]]


def same(far: StudyRun, near: StudyRun) -> None:
    assert far.weights() == near.weights()
    assert far.losses() == near.losses()
    assert timeless(far.result) == timeless(near.result)


def test_a_study_ends_as_in_one_process_and_a_failed_run_does_not_stop_it(
    recipe: dict[str, Any], there: Make, here: Make
) -> None:
    """The tasks begin together and prepare the same corpus: nothing is in the cache."""
    recipe["variants"]["broken"] = {"data.path": "/nonexistent/corpus"}
    far, near = there(recipe), here(recipe)
    code, output = far.run()
    assert code == 1, output
    assert "submitted 6 runs to Slurm" in output
    assert near.run()[0] == 1
    assert len(far.weights()) == 4
    same(far, near)
    assert len(failures(far)) == 2 and failures(far) == failures(near)
    assert "/nonexistent/corpus" in failures(far)[0][1]
    assert far.jobs == {}


def test_preempted_runs_resume_and_end_bit_identical(
    recipe: dict[str, Any], there: Make, here: Make, cluster: Cluster
) -> None:
    recipe |= {"variants": {"muon": {}}, "baselines": ["muon"], "set": recipe["set"] | LONG}
    far, near = there(recipe), here(recipe)
    process = far.start()
    (timed_out, job), (preempted, other) = far.submitted().items()
    for id in (timed_out, preempted):
        wait_for(lambda id=id: far.steps(id) > 5, "a run trains")
    cluster.suspend(other)  # so that it is still there when its turn comes
    # What Slurm sends before a time limit, by the daemon that sends it then.
    cluster.say("scancel", "--signal=USR2", job)
    wait_for(lambda: cluster.state(job) == "PENDING", "the run has saved itself")
    cluster.resume(other)
    cluster.preempt_all()
    for one in (job, other):
        cluster.begin_now(one)
    output = process.communicate(timeout=PATIENCE)[0]
    assert process.returncode == 0, output
    assert near.run()[0] == 0
    same(far, near)
    assert far.submissions == 1
    for id in (timed_out, preempted):
        assert "stopped" in far.log(id) and "resum" in far.log(id), far.log(id)


def test_a_killed_study_does_not_submit_again_and_cancelled_runs_are_reported(
    recipe: dict[str, Any], there: Make, here: Make, cluster: Cluster
) -> None:
    recipe |= {"seeds": [0], "set": recipe["set"] | LONG}
    recipe["search"]["seeds"] = [0]
    far, near = there(recipe), here(recipe)
    process = far.start()
    jobs = far.submitted()
    cancelled = next(iter(jobs))
    for id in jobs:
        wait_for(lambda id=id: far.steps(id) > 0, "a run trains")
    cluster.suspend(*jobs.values())
    process.kill()
    assert set(far.status().values()) == {"running"}
    again = far.start()
    assert again.stdout is not None
    said = [again.stdout.readline() for _ in range(2)]
    assert said[1] == "2 runs are with Slurm already\n"
    cluster.resume(*jobs.values())
    cluster.say("scancel", jobs[cancelled])
    output = again.communicate(timeout=PATIENCE)[0]
    assert again.returncode == 1, output
    assert far.submissions == 1
    ((_, reason),) = failures(far)
    assert f"Slurm job {jobs[cancelled]} ended as CANCELLED" in reason
    code, output = far.run("--retry")
    assert code == 0, output
    assert far.submissions == 2
    assert near.run()[0] == 0
    same(far, near)
