"""A step whose tokens are still written: the run waits, and is saved if they do not come."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from muonscale.errors import DataError
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.data.mixture import plan_mixture
from muonscale.lab.data.shuffle import sequence_indices
from muonscale.lab.data.stream import Feed, StreamedStore
from muonscale.lab.files import hold_lock
from muonscale.lab.training import setup, streaming
from muonscale.lab.training.baselines import ngram_baselines
from muonscale.lab.training.batches import Batches
from muonscale.lab.training.signals import Interrupted, StopRequest
from muonscale.lab.training.streaming import stop_preparing, wait_for_tokens
from tests.lab.data.test_stream import DTYPE, LENGTH, SIZES, whole_of, write_shard

BATCH = 4


class Run:
    """What waiting needs of a run whose training split has two of eight shards."""

    save, resume_command = setup.Run.save, setup.Run.resume_command

    def __init__(self, folder: Path, step: int) -> None:
        feed = Feed(len(SIZES), folder / "final", folder / "partial", folder / "lock")
        for number in range(2):
            write_shard(feed.partial, number)
        rows = StreamedStore(feed, DTYPE, 1000, sum(SIZES)).rows(LENGTH)
        timeline = Timeline.constant(9, BATCH, LENGTH)
        stretches = plan_mixture([[1.0]], [timeline.sequences_before(9)])
        self.batches = Batches(
            {"a": rows}, {"a": whole_of(folder)}, {"a": 1.0}, timeline, stretches, 8, 0
        )
        data, checkpoint = (
            SimpleNamespace(title="a", cache=folder),
            SimpleNamespace(keep=1, marks=[]),
        )
        self.config: Any = SimpleNamespace(
            timeline=timeline, steps=9, data=data, checkpoint=checkpoint
        )
        self.data = data
        self.folder = SimpleNamespace(path=folder / "run", checkpoints=folder / "checkpoints")
        self.said: list[str] = []
        self.console = SimpleNamespace(log=self.said.append, warn=self.said.append)
        self.saved: list[int] = []
        self.state = SimpleNamespace(step=step, save=self.write)
        self.saver: Any = None
        self.flags: list[int | None] = []
        """What another rank says, in order; then the same as this one."""
        self.processes = SimpleNamespace(max_flag=self.agree, on_first=lambda work: work())
        background = SimpleNamespace(error="out of memory", stop=lambda: True)
        self.corpora = {"a": SimpleNamespace(background=background, fingerprint="f")}
        self.tokenizer = range(200)

    def write(self, *_: Any, background: Any, **__: Any) -> None:
        assert background is None
        self.saved.append(self.state.step)

    def agree(self, flag: int | None) -> int | None:
        other = self.flags.pop(0) if self.flags else flag
        return max(flag, other) if flag is not None and other is not None else flag


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What happens during the pauses of the wait, in order."""
    actions: list[Any] = []
    monkeypatch.setattr(streaming.time, "sleep", lambda _: actions.pop(0)())
    monkeypatch.setattr(setup, "steps_to_keep", lambda config: [])
    return actions


def wait(run: Run, stop: StopRequest | None = None) -> None:
    wait_for_tokens(run, stop or StopRequest())  # pyrefly: ignore


def test_a_step_waits_for_its_shards_and_says_so_once(tmp_path: Path, naps: list[Any]) -> None:
    run = Run(tmp_path, 0)
    wait(run)
    assert run.said == []
    run.state.step = 1  # its rows reach into the second window, of shards 1 and 2
    naps += [lambda: None, lambda: write_shard(tmp_path / "partial", 2)]
    with hold_lock(tmp_path / "lock"):
        wait(run)
    assert naps == [] and len(run.said) == 2
    assert "shard 3 of 8" in run.said[0]
    assert run.batches.at(1).shape == (BATCH, LENGTH + 1)


def test_all_ranks_wait_for_the_rank_that_waits(tmp_path: Path, naps: list[Any]) -> None:
    run = Run(tmp_path, 0)
    run.flags = [streaming.MISSING, streaming.MISSING]
    naps += [lambda: None, lambda: None]
    wait(run)
    assert naps == [] and run.flags == []
    run.flags = [streaming.ENDED]
    with pytest.raises(DataError, match="saved at step 0"):
        wait(run)


@pytest.mark.parametrize("step", [1, 2])
def test_the_end_of_the_writer_saves_the_run_and_names_the_way_on(
    tmp_path: Path, naps: list[Any], step: int
) -> None:
    run = Run(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000002").mkdir(parents=True)
    with pytest.raises(DataError, match=r"shard 3 of 8 is missing \(out of memory\)") as caught:
        wait(run)
    assert str(caught.value).endswith(f"muonscale train {tmp_path / 'run'} --resume")
    assert run.saved == ([1] if step == 1 else [])  # the checkpoint of step 2 is there


@pytest.mark.parametrize(("step", "also"), [(3, [3]), (4, [])])
def test_what_a_thread_still_writes_is_complete_before_the_run_is_saved(
    tmp_path: Path, naps: list[Any], step: int, also: list[int]
) -> None:
    run = Run(tmp_path, step)
    pending = [tmp_path / "checkpoints" / "step-00000004"]

    def complete() -> None:
        while pending:
            pending.pop().mkdir(parents=True)

    run.saver = SimpleNamespace(wait=complete)
    with pytest.raises(DataError, match=f"saved at step {step}"):
        wait(run)
    assert pending == [] and run.saved == also


def test_the_writer_may_end_with_the_last_shard(
    tmp_path: Path, naps: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(feed: Feed) -> bool:
        write_shard(tmp_path / "partial", 2)
        return False

    monkeypatch.setattr(Feed, "is_written", property(end))
    wait(Run(tmp_path, 1))


def test_a_signal_ends_the_wait_and_saves_the_run(tmp_path: Path, naps: list[Any]) -> None:
    run, stop = Run(tmp_path, 1), StopRequest()
    naps += [lambda: stop(signal.SIGTERM, None)]
    with hold_lock(tmp_path / "lock"), pytest.raises(Interrupted, match="--resume") as caught:
        wait(run, stop)
    assert caught.value.signum == signal.SIGTERM and run.saved == [1]


def test_epochs_are_estimated_and_baselines_are_of_the_windows_that_are_read(
    tmp_path: Path,
) -> None:
    run = Run(tmp_path, 0)
    rows = (sum(SIZES) - 1) // LENGTH
    assert run.batches.share("a")["epochs"] == 9 * BATCH / rows
    found = []
    for shards in (7, 8):  # 36 rows are read: the first seven shards have 37
        for number in range(shards):
            write_shard(tmp_path / "partial", number)
        assert run.batches.streamed is not None
        assert run.batches.streamed.missing(9 * BATCH) is None
        run.batches.streamed.stream.grow()  # also what the run does not need
        assert run.batches.sampled_rows == {"a": (sum(SIZES[:7]) - 1) // LENGTH}
        run.data.cache, run.data.sequence_length = tmp_path / f"cache{shards}", LENGTH
        found.append(ngram_baselines(run, StopRequest()))  # pyrefly: ignore
    assert found[0]["bigram_loss"] == found[1]["bigram_loss"]
    sampled = np.concatenate(list(run.batches.sample(at_most=10**6)))
    assert sampled.max() == 37 * LENGTH


def test_what_still_prepares_is_ended_with_the_run(tmp_path: Path) -> None:
    run = Run(tmp_path, 0)
    stop_preparing(run)  # pyrefly: ignore
    assert len(run.said) == 1 and "prepare" in run.said[0]
    run.corpora["a"].background = None
    stop_preparing(run)  # pyrefly: ignore
    assert len(run.said) == 1


def test_without_a_stream_the_order_is_that_of_all_rows(tmp_path: Path) -> None:
    run = Run(tmp_path, 0)
    assert run.batches.streamed is not None
    order = run.batches.streamed.order(0, 5, 0)
    assert not np.array_equal(order, sequence_indices(0, 5, (sum(SIZES) - 1) // LENGTH, 0))
