"""Jobs of several processes: together from start to end, however they are interrupted."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from tests.cli.jobs import checkpoints, job, losses, records, weights
from tests.conftest import Muonscale

STEPS = 120
LONG = [f"train.steps={STEPS}", "train.batch_tokens=384", "checkpoint.every=20", "eval.every=50"]


@pytest.fixture
def words(tiny: list[str]) -> list[str]:
    """Words after `muonscale train` for a run of some seconds."""
    return [*tiny, "optimizer.ns_dtype=float32", *LONG]


def into(words: list[str], run: Path) -> list[str]:
    return [*words, f"run.path={run}"]


def alone(muonscale: Muonscale, words: list[str], run: Path) -> list[float]:
    """Return the losses of one process."""
    answer = muonscale("train", *into(words, run))
    assert answer.code == 0, answer.err
    return losses(run)


@pytest.mark.slow
def test_two_processes_train_as_one_and_only_the_first_one_speaks(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "optimizer.ns_dtype=float32", "train.micro_batch_tokens=64"]
    expected = alone(muonscale, words, tmp_path / "one")
    with job(2, into(words, tmp_path / "two")) as two:
        output = two.output()
    assert two.code == 0, output
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)
    for word in ("model  ", "step 3/12", "validation loss in nats per token"):
        assert output.count(word) == 1, output
    validation = [r["validation_loss"] for r in records(tmp_path / "one", "eval")]
    assert [r["validation_loss"] for r in records(tmp_path / "two", "eval")] == pytest.approx(
        validation, rel=1e-4
    )
    assert (tmp_path / "two" / "model" / "config.json").read_bytes() == (
        tmp_path / "one" / "model" / "config.json"
    ).read_bytes()
    answer = muonscale("export", tmp_path / "two", tmp_path / "out")
    assert answer.code == 0, answer.err
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == weights(tmp_path / "two")


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_the_job(tiny: list[str], tmp_path: Path) -> None:
    with job(2, [*into(tiny, tmp_path / "run"), "train.batch_tokens=96"]) as two:
        output = two.output()
    assert two.code != 0
    assert output.count("muonscale: train.batch_tokens=96 is 3 sequences") == 1, output


@pytest.mark.slow
def test_compiled_layers_that_are_recomputed_train_as_plain_ones(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "optimizer.ns_dtype=float32", "train.micro_batch_tokens=64"]
    expected = alone(muonscale, words, tmp_path / "one")
    more = ["train.compile=true", "train.activation_checkpointing=true"]
    with job(2, [*into(words, tmp_path / "two"), *more]) as two:
        output = two.output(patience=240)
    assert two.code == 0, output
    assert losses(tmp_path / "two") == pytest.approx(expected, rel=1e-4)


@pytest.mark.slow
def test_a_run_of_four_processes_goes_on_with_two_and_with_one(
    muonscale: Muonscale, words: list[str], tmp_path: Path
) -> None:
    expected = alone(muonscale, words, tmp_path / "whole")
    run = tmp_path / "run"
    for size in (4, 2):
        with job(size, [*into(words, run), "--resume"]) as part:
            before = len(losses(run))
            part.wait_for(lambda steps=before + 30: len(losses(run)) >= steps)
            part.signal(signal.SIGTERM)
            output = part.output()
        assert output.count("and saved; continue with") == 1, output
        assert checkpoints(run)[-1] == len(losses(run)) < STEPS
    answer = muonscale("train", str(run), "--resume")
    assert answer.code == 0, answer.err
    assert losses(run) == pytest.approx(expected, rel=2e-3)
    steps = [r["step"] for r in records(run, "train")]
    assert steps == list(range(1, STEPS + 1))


@pytest.mark.slow
@pytest.mark.parametrize("background", ["false", "true"])
def test_a_rank_that_is_killed_ends_the_job_which_resumes_bit_for_bit(
    background: str, words: list[str], tmp_path: Path
) -> None:
    with job(2, into(words, tmp_path / "whole")) as whole:
        assert whole.code == 0, whole.output()
    run = tmp_path / "run"
    words = [*words, f"checkpoint.background={background}"]
    with job(2, into(words, run)) as killed:
        killed.wait_for(lambda: len(losses(run)) >= 33)
        killed.rank(1).kill()
        output = killed.output()
    assert killed.code != 0
    assert "another process of the job is gone" in output, output
    assert "rank      : 1" in output and "SIGKILL" in output, output
    with job(2, [*into(words, run), "--resume"]) as resumed:
        output = resumed.output()
    assert resumed.code == 0 and "resuming" in output, output
    assert weights(run) == weights(tmp_path / "whole")
    assert losses(run) == losses(tmp_path / "whole")


@pytest.mark.slow
def test_torchrun_restarts_a_job_which_then_goes_on_by_itself(
    words: list[str], tmp_path: Path
) -> None:
    with job(2, into(words, tmp_path / "whole")) as whole:
        assert whole.code == 0, whole.output()
    run = tmp_path / "run"
    with job(2, into(words, run), "--max-restarts=1") as job_:
        job_.wait_for(lambda: len(losses(run)) >= 33)
        job_.rank(0).kill()
        output = job_.output()
    assert job_.code == 0, output
    assert f"resuming {run} at step 20" in output, output
    assert weights(run) == weights(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(
    rank: int, words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with job(2, [*into(words, run), "checkpoint.every=1000"]) as stopped:
        stopped.wait_for(lambda: len(losses(run)) >= 5)
        stopped.rank(rank).send_signal(signal.SIGTERM)
        output = stopped.output()
    assert output.count("and saved; continue with") == 1, output
    assert checkpoints(run) == [len(losses(run))]


@pytest.mark.slow
def test_a_signal_in_an_evaluation_leaves_it_and_the_resumed_run_makes_up_for_it(
    words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    long = [*into(words, run), "eval.every=10", "eval.tokens=8192", "eval.batch_tokens=32"]
    with job(2, [*long, "checkpoint.every=1000"]) as stopped:
        stopped.wait_for(lambda: len(losses(run)) == 10)
        stopped.signal(signal.SIGTERM)
        output = stopped.output()
    assert checkpoints(run) == [10], output
    assert records(run, "eval") == []
    with job(2, [*long, "--resume"]) as resumed:
        resumed.wait_for(lambda: len(losses(run)) > 10)
        assert [r["step"] for r in records(run, "eval")] == [10]


@pytest.mark.slow
def test_a_signal_while_layers_are_compiled_is_obeyed_after_the_step(
    words: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    compiled = ["train.compile=true", "checkpoint.every=1000", "model.fields.num_hidden_layers=10"]
    with job(2, [*into(words, run), *compiled]) as stopped:
        stopped.wait_for((run / "env.json").exists)
        time.sleep(1)
        for rank in (0, 1):  # past torchrun, which would kill them after 30 s
            stopped.rank(rank).send_signal(signal.SIGTERM)
        output = stopped.output()
    assert "recompile_limit" not in output, output
    assert output.count("and saved; continue with") == 1, output
    assert checkpoints(run) == [len(losses(run))] == [1], output
