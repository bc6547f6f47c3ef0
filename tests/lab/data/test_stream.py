"""A training split that is read while it is written: the same rows whenever its shards come."""

from __future__ import annotations

import pickle
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from muonscale.errors import ConfigError, DataError
from muonscale.lab.config.load import load_config
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data import encode, prepare
from muonscale.lab.data.cache import LOCK
from muonscale.lab.data.shuffle import sequence_indices
from muonscale.lab.data.stream import Feed, StreamedSequences, StreamedStore, window_ends
from muonscale.lab.data.tokens import Sequences, TokenStore, shard_path
from muonscale.lab.files import hold_lock
from tests.lab.data.test_prepare import run as prepare_whole
from tests.lab.data.test_prepare import shards as shards_of
from tests.lab.data.test_prepare import story

LENGTH = 4
SIZES = [23, 9, 31, 4, 17, 26, 40, 12]
"""Tokens of the shards."""
DTYPE = np.dtype("<u2")


def write_shard(folder: Path, number: int) -> None:
    folder.mkdir(exist_ok=True)
    start = sum(SIZES[:number])
    np.arange(start, start + SIZES[number], dtype=DTYPE).tofile(shard_path(folder, "train", number))


def feed_of(tmp_path: Path) -> Feed:
    return Feed(len(SIZES), tmp_path / "final", tmp_path / "partial", tmp_path / "lock")


def stream_of(tmp_path: Path, shards: int) -> StreamedSequences:
    """Rows of a split whose first shards are written."""
    for number in range(shards):
        write_shard(tmp_path / "partial", number)
    return StreamedStore(feed_of(tmp_path), DTYPE, 1000, 150).rows(LENGTH)


def whole_of(tmp_path: Path) -> Sequences:
    folder = tmp_path / "whole"
    for number in range(len(SIZES)):
        write_shard(folder, number)
    return Sequences(TokenStore(folder, "train", DTYPE), LENGTH)


@given(st.integers(1, 2000))
def test_windows_grow_to_their_size_and_hold_every_shard(shards: int) -> None:
    sizes = np.diff([0, *window_ends(shards)])
    assert sizes.sum() == shards and (sizes > 0).all()
    expected = np.minimum(2 ** np.minimum(np.arange(len(sizes)), 10), 16)
    assert np.array_equal(sizes[:-1], expected[:-1]) and sizes[-1] <= expected[-1]


def test_an_epoch_reads_every_row_once_and_a_window_after_the_other(tmp_path: Path) -> None:
    stream, whole = stream_of(tmp_path, len(SIZES)), whole_of(tmp_path)
    count = len(whole)
    order = stream.order(0, count, seed=3)
    assert sorted(order) == list(range(count)) and len(stream) == stream.size == count
    assert np.array_equal(stream.batch(order), whole.batch(order))
    start = 0
    for end in window_ends(len(SIZES)):
        stop = (sum(SIZES[:end]) - 1) // LENGTH
        assert sorted(order[start:stop]) == list(range(start, stop))
        assert stream.span(start + 1) == stream.span(stop) == stop
        start = stop
    assert not np.array_equal(order, np.arange(count))
    assert not np.array_equal(order, stream.order(0, count, seed=4))
    assert np.array_equal(  # later epochs are shuffled whole
        stream.order(count, 2 * count, seed=3), sequence_indices(count, 2 * count, count, 3)
    )
    assert stream.span(10 * count) == count


def test_the_rows_of_a_position_do_not_depend_on_when_shards_are_written(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    complete = stream_of(tmp_path / "a", len(SIZES))
    (tmp_path / "b").mkdir()
    growing = stream_of(tmp_path / "b", 1)
    position, batch, total = 0, 3, 2 * len(complete)
    while position < total:
        missing = growing.missing(position + batch)
        if missing is not None:
            with pytest.raises(IndexError, match=f"needs shard {missing}"):
                growing.order(position, batch, 0)
            write_shard(tmp_path / "b" / "partial", missing)
            continue
        again = stream_of(tmp_path / "b", 0)  # what a run that resumes here sees
        for rows in (growing, again):
            assert rows.missing(position + batch) is None
            found = rows.batch(rows.order(position, batch, 0))
            assert np.array_equal(found, complete.batch(complete.order(position, batch, 0)))
        position += batch


def test_a_window_waits_for_all_of_its_shards_in_any_order(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 1)
    first = (SIZES[0] - 1) // LENGTH
    assert stream.missing(first) is None and stream.missing(first + 1) == 1
    write_shard(tmp_path / "partial", 2)
    assert stream.missing(first + 1) == 1
    write_shard(tmp_path / "partial", 1)
    assert stream.missing(first + 1) is None
    assert stream.missing(10_000) == 3
    assert stream.size == (150 - 1) // LENGTH  # estimated


def test_shards_are_found_after_their_folder_was_renamed(tmp_path: Path) -> None:
    stream = stream_of(tmp_path, 2)
    for number in range(2, len(SIZES)):
        write_shard(tmp_path / "partial", number)
    (tmp_path / "partial").rename(tmp_path / "final")
    assert stream.missing(10_000) is None
    copied = pickle.loads(pickle.dumps(stream.store))
    assert copied.is_complete and np.array_equal(copied.read(0, 162), np.arange(162))


def test_a_split_without_a_row_is_an_error_once_it_is_complete(tmp_path: Path) -> None:
    feed = feed_of(tmp_path)
    write_shard(feed.partial, 0)
    short = Feed(1, feed.folder, feed.partial, feed.lock)
    with pytest.raises(DataError, match=r"23 tokens.*data\.sequence_length=50"):
        StreamedStore(short, DTYPE, 1000, 9).rows(50).missing(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.epochs=1"], "train.epochs=1.0 needs"),
        (["data.format=tokens", "data.tokenizer=gpt2"], "data.format=tokens is prepared whole"),
        (
            ["data.source=null", "data.path=null", "data.mixture=[{path: a, weight: 1}]"],
            "data.mixture is",
        ),
    ],
)
def test_what_cannot_be_streamed_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config("demo", ["data.path=x.txt", "data.stream=true", *words])


class Background:
    """Prepares in a thread of this process; a test lets it write shards with `permits`."""

    permits = threading.Semaphore(0)
    started = 0
    fails = False

    def __init__(self, data: DataSection, seed: int, processes: int | None) -> None:
        type(self).started += 1
        self.error = "the process ended with code -9"

        def work() -> None:
            if not self.fails:
                prepare.prepare(data, seed=seed, report=lambda *_: None, processes=processes)

        self._thread = threading.Thread(target=work, daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def reports(self) -> Iterator[tuple[str, int, int]]:
        yield "tokenizing", 1, 2

    def finish(self) -> None:
        self.permits.release(1000)
        self._thread.join()


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DataSection:
    """A corpus of ten shards, of which a thread writes the training split one by one."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(story(number))
    monkeypatch.setattr(encode, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(prepare, "PAUSE", 0.005)
    monkeypatch.setattr(prepare, "BackgroundPreparation", Background)
    monkeypatch.setattr(Background, "permits", threading.Semaphore(0))
    monkeypatch.setattr(Background, "started", 0)
    write = encode.Encoder.write

    def write_if_permitted(self: Any, chunk: Any, path: Path) -> int:
        if path.name.startswith("train"):
            Background.permits.acquire()
        return write(self, chunk, path)

    monkeypatch.setattr(encode.Encoder, "write", write_if_permitted)
    return DataSection(
        path=str(folder),
        cache=tmp_path / "cache",
        vocab_size=300,
        sequence_length=16,
        stream=True,
    )


def stream(data: DataSection) -> prepare.Corpus:
    (found,) = prepare.prepare(data, seed=0, report=lambda *_: None, stream=True).values()
    return found


def test_training_begins_with_a_corpus_that_is_not_complete(
    corpus: DataSection, tmp_path: Path
) -> None:
    found = stream(corpus)
    assert isinstance(found.train, StreamedStore) and len(found.train) == 0
    background: Any = found.background
    second = stream(corpus)  # of another process, which follows the first
    assert Background.started == 1 and second.background is None
    assert found.stats.train.estimated and found.train.feed.is_written
    rows = found.train.rows(16)
    for number in range(found.train.feed.shards):
        assert found.train.shards == number
        Background.permits.release()
        while found.train.shards == number:
            rows.missing(10**9)
            time.sleep(0.002)
    background.finish()
    assert not found.train.feed.is_written
    third = stream(corpus)  # begins when all is there
    whole = prepare_whole(Path(str(corpus.path)), cache=tmp_path / "other")
    assert third.fingerprint == found.fingerprint == second.fingerprint == whole.fingerprint
    assert third.stats == whole.stats
    assert shards_of(third) == shards_of(whole)
    assert abs(found.stats.train.tokens / whole.stats.train.tokens - 1) < 0.1
    for other in (second, third):
        assert other.train.rows(16).missing(1) is None
        for name in ("train", "validation"):
            expected = getattr(whole, name)
            read = getattr(other, name).read(0, len(expected))
            assert np.array_equal(read, expected.read(0, len(expected)))
    order = [item.train.rows(16).order(0, 50, 0) for item in (found, third)]
    assert np.array_equal(*order)


def test_a_preparation_that_fails_before_training_begins_is_the_error_of_the_run(
    corpus: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Background, "fails", True)
    with pytest.raises(DataError, match="ended with code -9"):
        stream(corpus)


def test_what_a_killed_preparation_left_is_not_read_before_another_goes_on(
    corpus: DataSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = stream(corpus)
    partial = whole.train.feed.partial  # pyrefly: ignore
    left = partial / prepare.STREAM
    content = left.read_text()
    whole.background.finish()  # pyrefly: ignore
    assert not (whole.train.feed.folder / prepare.STREAM).exists()  # pyrefly: ignore
    shutil.rmtree(str(corpus.cache))
    partial.mkdir(parents=True)
    left.write_text(content)
    claimed, removed = threading.Event(), threading.Event()

    def claim() -> None:  # another process has begun, and not removed yet what was left
        with hold_lock(partial.parent / LOCK):
            claimed.set()
            assert removed.wait(60)

    other = threading.Thread(target=claim)
    other.start()
    assert claimed.wait(60)
    looks = iter([lambda: None, lambda: (removed.set(), other.join())])
    pause = SimpleNamespace(sleep=lambda _: next(looks, lambda: time.sleep(0.002))())
    monkeypatch.setattr(prepare, "time", pause)
    again = stream(corpus)
    assert Background.started == 2 and again.background is not None
    again.background.finish()  # pyrefly: ignore
    assert stream(corpus).fingerprint == whole.fingerprint
