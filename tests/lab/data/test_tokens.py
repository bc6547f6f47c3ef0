"""Token shards: written in any pieces, read at any place."""

from __future__ import annotations

import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonscale.errors import DataError
from muonscale.lab.data.tokens import Sequences, TokenStore, TokenWriter, token_dtype


def store_of(
    folder: Path, *parts: np.ndarray, vocab: int = 1000, shard_bytes: int = 20
) -> TokenStore:
    dtype = token_dtype(vocab)
    with TokenWriter(folder, "train", dtype, shard_bytes) as writer:
        for part in parts:
            writer.write(part)
    return TokenStore(folder, "train", dtype)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.integers(0, 25), max_size=6),
    st.integers(2, 30),
    st.tuples(st.integers(0, 150), st.integers(0, 150)),
)
def test_any_range_reads_back_across_shards(
    sizes: list[int], shard_bytes: int, ends: tuple[int, int]
) -> None:
    tokens = np.arange(sum(sizes)) + 7
    parts = np.split(tokens, np.cumsum(sizes)[:-1]) if sizes else []
    start, stop = sorted(min(end, len(tokens)) for end in ends)
    with tempfile.TemporaryDirectory() as folder:
        store = store_of(Path(folder), *parts, shard_bytes=shard_bytes)
        assert len(store) == len(tokens)
        found = store.read(start, stop - start)
    assert found.dtype == np.int64
    assert np.array_equal(found, tokens[start:stop])


def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    store_of(tmp_path, np.arange(25))
    sizes = {path.name: path.stat().st_size for path in tmp_path.iterdir()}
    assert sizes == {"train-00000.bin": 20, "train-00001.bin": 20, "train-00002.bin": 10}


@pytest.mark.parametrize(("vocab", "size"), [(65536, 2), (65537, 4)])
def test_type_on_disk_holds_the_largest_token(tmp_path: Path, vocab: int, size: int) -> None:
    assert token_dtype(vocab).itemsize == size
    assert store_of(tmp_path, np.array([vocab - 1]), vocab=vocab).read(0, 1)[0] == vocab - 1


@pytest.mark.parametrize(("start", "count"), [(-1, 2), (0, 26), (25, 1), (3, -1)])
def test_reading_outside_is_an_error(tmp_path: Path, start: int, count: int) -> None:
    store = store_of(tmp_path, np.arange(25))
    with pytest.raises(IndexError, match="of 25"):
        store.read(start, count)


def test_store_travels_to_other_processes_as_its_folder(tmp_path: Path) -> None:
    store = store_of(tmp_path, np.arange(25))
    copied = pickle.dumps(store)
    assert len(copied) < 1000
    assert np.array_equal(pickle.loads(copied).read(0, 25), store.read(0, 25))


def test_unreadable_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "train-00000.bin").touch()
    with pytest.raises(DataError, match=r"train-00000\.bin"):
        TokenStore(tmp_path, "train", token_dtype(10))


@pytest.mark.parametrize(("tokens", "count"), [(0, 0), (1, 0), (4, 0), (5, 1), (8, 1), (9, 2)])
def test_sequences_need_a_target_for_their_last_token(
    tmp_path: Path, tokens: int, count: int
) -> None:
    assert len(Sequences(store_of(tmp_path, np.arange(tokens)), 4)) == count


def test_batch_holds_inputs_and_next_tokens(tmp_path: Path) -> None:
    sequences = Sequences(store_of(tmp_path, np.arange(25)), 4)
    batch = sequences.batch(np.array([5, 0]))
    assert batch.tolist() == [[20, 21, 22, 23, 24], [0, 1, 2, 3, 4]]
    assert batch.dtype == np.int64
    assert sequences.batch(np.array([], dtype=np.int64)).shape == (0, 5)
    for bad in (6, -1):
        with pytest.raises(IndexError, match=f"sequence {bad} of 6"):
            sequences.batch(np.array([bad]))


def test_a_token_that_the_vocabulary_has_not_names_the_file(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, "train", np.dtype("<u2"), shard_bytes=8) as writer:
        writer.write(np.array([1, 2, 3, 4, 5, 999, 6, 7]))
    store = TokenStore(tmp_path, "train", np.dtype("<u2"), 999)
    assert store.read(0, 5).tolist() == [1, 2, 3, 4, 5]
    with pytest.raises(DataError, match=r"train-00001\.bin .*token 999 of a vocabulary of 999"):
        store.read(3, 4)
    assert pickle.loads(pickle.dumps(store)).limit == 999
