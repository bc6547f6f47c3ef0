"""Preparing a corpus: split, fingerprint, cache."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from muonscale.errors import DataError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data import cache, document_store, encode, prepare
from muonscale.lab.data.encode_chunk import Encoder
from muonscale.lab.data.prepare import STAGES, Corpus

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "rivers",
    "run",
]


def story(seed: int, lines: int = 30) -> str:
    rng = np.random.default_rng(seed)
    return "".join(f"{seed} {' '.join(rng.choice(WORDS, 8))}\n" for _ in range(lines))


@pytest.fixture
def corpus_folder(tmp_path: Path) -> Path:
    """Forty stories of about 1.3 kB."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(story(number))
    return folder


def run(path: Path, *, seed: int = 0, reports: list[Any] | None = None, **options: Any) -> Corpus:
    """Prepare a path with a cache beside it."""
    settings = {"cache": path.parent / "cache", "vocab_size": 300, "sequence_length": 16}
    data = DataSection(path=path, **(settings | options))
    seen: list[Any] = [] if reports is None else reports
    (corpus,) = prepare.prepare(
        data, seed=seed, report=lambda *report: seen.append(report)
    ).values()
    return corpus


def documents(corpus: Corpus, split: str) -> list[str]:
    """The texts of a split, decoded and parted at the end of text."""
    tokens = getattr(corpus, split)
    text = corpus.tokenizer.decode(tokens.read(0, len(tokens)))
    start, *texts = text.split("<|endoftext|>")
    assert start == ""
    return texts


def test_splits_hold_every_document_once_and_share_none(corpus_folder: Path) -> None:
    corpus = run(corpus_folder, validation=0.2)
    train, validation = documents(corpus, "train"), documents(corpus, "validation")
    assert sorted(train + validation) == sorted(story(number) for number in range(40))
    assert not set(train) & set(validation)
    total = sum(map(len, train + validation))
    assert 0.2 <= sum(map(len, validation)) / total <= 0.3


def test_stats_count_documents_bytes_and_tokens(corpus_folder: Path) -> None:
    stats = run(corpus_folder).stats
    corpus = run(corpus_folder)
    for name in ("train", "validation"):
        texts, split = documents(corpus, name), getattr(stats, name)
        assert split.documents == len(texts)
        assert split.bytes == sum(map(len, texts))
        assert split.tokens == len(getattr(corpus, name))
        assert split.bytes_per_token == split.bytes / split.tokens
    assert stats.source == str(corpus_folder)
    assert stats.vocab_size == len(corpus.tokenizer) == 300


def test_copies_of_a_document_are_dropped(corpus_folder: Path) -> None:
    plain = run(corpus_folder)
    for number in (0, 1, 2):
        (corpus_folder / f"copy-{number}.txt").write_text(story(number))
    copied = run(corpus_folder)
    assert (plain.stats.duplicates, copied.stats.duplicates) == (0, 3)
    assert copied.fingerprint == plain.fingerprint


def test_seed_chooses_the_validation_documents(corpus_folder: Path) -> None:
    chosen = [set(documents(run(corpus_folder, seed=seed), "validation")) for seed in range(3)]
    assert chosen[0] != chosen[1] or chosen[1] != chosen[2]
    assert chosen[0] == set(documents(run(corpus_folder, seed=0), "validation"))


def test_few_documents_give_their_last_lines(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.txt").write_text(story(number, lines=100))
    corpus = run(folder, validation=0.1)
    heads, tails = documents(corpus, "train"), documents(corpus, "validation")
    for number in range(3):
        assert heads[number] + tails[number] == story(number, lines=100)
        assert 9 <= tails[number].count("\n") <= 11
        assert heads[number].endswith("\n")


def test_one_line_is_cut_between_words_or_characters(tmp_path: Path) -> None:
    for text in (" ".join(WORDS * 40), "\u20ac" * 2003):
        path = tmp_path / "x.txt"
        path.write_text(text, encoding="utf-8")
        corpus = run(path, validation=0.1, vocab_size=257)
        (head,), (tail,) = documents(corpus, "train"), documents(corpus, "validation")
        assert head + tail == text
        assert 0.08 < len(tail) / len(text) < 0.12
        assert " " not in text or head.endswith(" ")


def test_one_huge_document_among_many_is_not_validation(corpus_folder: Path) -> None:
    (corpus_folder / "huge.txt").write_text(story(99, lines=3000))
    for seed in range(5):
        corpus = run(corpus_folder, seed=seed, validation=0.1)
        assert corpus.stats.validation.bytes < 0.16 * corpus.stats.train.bytes


def test_large_documents_are_tokenized_in_pieces_without_loss(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(document_store, "PIECE_BYTES", 100)
    monkeypatch.setattr(encode, "BATCH_BYTES", 1000)
    monkeypatch.setattr(encode, "CHUNK_BYTES", 5000)
    corpus = run(corpus_folder)
    assert len(list(corpus.folder.glob("train-*.bin"))) > 8
    texts = documents(corpus, "train") + documents(corpus, "validation")
    assert sorted(texts) == sorted(story(number) for number in range(40))


def test_spelt_end_of_text_does_not_end_a_document(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text(("<|endoftext|> " + " ".join(WORDS) + "\n") * 100)
    corpus = run(path)
    assert np.count_nonzero(corpus.train.read(0, len(corpus.train)) == 0) == 1


def test_tokenizer_learns_from_the_training_split_alone(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    train_tokenizer = prepare.train_tokenizer

    def listen(pieces: Any, vocab_size: int) -> Any:
        texts.extend(pieces)
        return train_tokenizer(texts, vocab_size)

    monkeypatch.setattr(prepare, "train_tokenizer", listen)
    assert sorted(documents(run(corpus_folder), "train")) == sorted(texts)


def test_tokenizer_sample_is_bounded_and_spread(corpus_folder: Path, tmp_path: Path) -> None:
    from muonscale.lab.data.files import Document

    pool = document_store.DocumentStore(tmp_path / "text")
    pool.fill((Document(str(n), story(n)) for n in range(40)), lambda _: None)
    ranges = pool.split(0.1, 0)[0]
    total = sum(end - start for start, end in ranges)
    sample = list(pool.sample(ranges, total // 4))
    assert abs(sum(piece.size for piece in sample) - total // 4) < 1500
    assert {int(piece.text.split()[0]) // 10 for piece in sample} == {0, 1, 2, 3}


def test_second_call_finds_the_tokens_at_once(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(corpus_folder)
    monkeypatch.setattr(prepare, "_build", None)
    reports: list[Any] = []
    second = run(corpus_folder, reports=reports)
    assert (second.fingerprint, second.stats) == (first.fingerprint, first.stats)
    assert reports == []


def test_copy_elsewhere_has_the_same_fingerprint_and_is_not_tokenized_again(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(corpus_folder)
    other = tmp_path / "elsewhere"
    shutil.copytree(corpus_folder, other)
    monkeypatch.setattr(prepare, "encode_split", None)
    assert run(other).fingerprint == first.fingerprint


def test_fingerprint_changes_with_whatever_changes_the_tokens(corpus_folder: Path) -> None:
    plain = run(corpus_folder)
    plain.tokenizer.add_tokens(["quick"])
    plain.tokenizer.save_pretrained(corpus_folder.parent / "other")
    changed = [
        run(corpus_folder, vocab_size=310),
        run(corpus_folder, validation=0.1),
        run(corpus_folder, seed=1),
        run(corpus_folder, max_bytes=30_000),
        run(corpus_folder, tokenizer=str(corpus_folder.parent / "other")),
    ]
    (corpus_folder / "00.txt").write_text(story(0) + "one more line\n")
    changed.append(run(corpus_folder))
    assert len({corpus.fingerprint for corpus in [plain, *changed]}) == 7


def test_fingerprint_changes_with_the_split_where_the_tokenizer_is_given(
    corpus_folder: Path,
) -> None:
    given = str(run(corpus_folder).folder / "tokenizer")
    splits = [{}, {"validation": 0.2}, {"seed": 1}]
    found = {run(corpus_folder, tokenizer=given, **split).fingerprint for split in splits}
    assert len(found) == 3


def test_sequence_length_needs_no_new_tokens(corpus_folder: Path) -> None:
    folders = {run(corpus_folder, sequence_length=length).folder for length in (8, 16, 32)}
    assert len(folders) == 1


def overwrite(path: Path, at: int, content: bytes) -> None:
    """Change bytes of a file, and leave its size and times as they were, as a bad disk does."""
    status = path.stat()
    with path.open("rb+") as file:
        file.seek(at)
        file.write(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


HARMS = ["truncate", "remove", "meta", "all", "zeros", "flip", "tokenizer", "stats", "more"]


@pytest.mark.parametrize("harm", HARMS)
def test_damaged_cache_is_said_and_rebuilt(corpus_folder: Path, harm: str) -> None:
    first = run(corpus_folder)
    expected = documents(first, "train")
    shard = first.folder / "train-00000.bin"
    if harm == "truncate":
        os.truncate(shard, 10)
    elif harm == "remove":
        shard.unlink()
    elif harm == "meta":
        (first.folder / "meta.json").write_text("{")
    elif harm == "zeros":
        overwrite(shard, 0, bytes(shard.stat().st_size))
    elif harm == "flip":
        at = shard.stat().st_size // 3
        overwrite(shard, at, bytes([shard.read_bytes()[at] ^ 1]))
    elif harm == "tokenizer":
        overwrite(first.folder / "tokenizer" / "tokenizer.json", 40, b" ")
    elif harm == "stats":
        path = first.folder / "meta.json"
        path.write_text(path.read_text().replace('"documents": ', '"documents": 1'))
    elif harm == "more":
        shutil.copy(shard, first.folder / "train-00001.bin")
    else:
        shutil.rmtree(first.folder)
    reports: list[Any] = []
    again = run(corpus_folder, reports=reports)
    assert f"preparing {first.folder} again" in reports[0][0]
    assert documents(again, "train") == expected
    assert sorted(path.name for path in first.folder.parent.iterdir()) == [
        first.fingerprint[:16],
        "requests",
    ]


def test_a_large_file_is_compared_by_blocks_and_wholly_once_it_was_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "HASHED_BYTES", 1000)
    monkeypatch.setattr(cache, "BLOCK_BYTES", 8)
    shard = tmp_path / "train-00000.bin"
    shard.write_bytes(os.urandom(64_000))
    cache.write_meta(tmp_path, {"fingerprint": "f"})
    assert cache.find_cache_damage(tmp_path, "f") is None
    content = shard.read_bytes()
    between = 500  # in no block: they begin every 1,016 bytes
    overwrite(shard, between, bytes([content[between] ^ 1]))
    assert cache.find_cache_damage(tmp_path, "f") is None
    os.utime(shard)
    assert "has changed" in str(cache.find_cache_damage(tmp_path, "f"))
    overwrite(shard, between, content[between : between + 1])
    assert cache.find_cache_damage(tmp_path, "f") is None
    for at in (0, 64_000 - 1):
        (tmp_path / "meta.json").unlink()
        cache.write_meta(tmp_path, {"fingerprint": "f"})
        overwrite(shard, at, bytes([shard.read_bytes()[at] ^ 1]))
        assert str(shard) in str(cache.find_cache_damage(tmp_path, "f"))


def test_what_is_renamed_into_place_is_on_the_disk(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[int] = set()
    fsync = os.fsync

    def record(handle: int) -> None:
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    corpus = run(corpus_folder)
    files = [path for path in corpus.folder.rglob("*") if path.is_file()]
    assert len(files) > 3
    assert {path.stat().st_ino for path in [*files, corpus.folder.parent]} <= synced


def test_damaged_request_is_answered_anew(corpus_folder: Path) -> None:
    first = run(corpus_folder)
    for path in (first.folder.parent / "requests").iterdir():
        path.write_text(json.dumps({"fingerprint": first.fingerprint}))
    assert run(corpus_folder).fingerprint == first.fingerprint


def test_failure_leaves_no_partial_folder(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(encode.Encoder, "write", full)
    with pytest.raises(DataError, match="No space left on device") as caught:
        run(corpus_folder)
    where = corpus_folder.parent / "cache"
    assert str(where) in str(caught.value)
    assert "data.cache" in str(caught.value)
    assert list(where.iterdir()) == []


def shards(corpus: Corpus) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in corpus.folder.glob("*.bin")}


def test_several_processes_write_the_same_shards(
    corpus_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK_BYTES", 5000)
    alone = run(corpus_folder)
    data = DataSection(
        path=corpus_folder, cache=tmp_path / "other", vocab_size=300, sequence_length=16
    )
    (many,) = prepare.prepare(data, seed=0, report=lambda *_: None, processes=2).values()
    assert shards(many) == shards(alone) and len(shards(many)) > 8
    assert many.fingerprint == alone.fingerprint and many.stats == alone.stats


def test_a_process_that_ends_or_a_full_disk_is_an_error(
    corpus_folder: Path, tmp_path: Path
) -> None:
    chunk = [(0, 10, True)]
    (tmp_path / "tokenizer.json").write_text(
        run(corpus_folder).tokenizer.backend_tokenizer.to_str()
    )
    setting = {"tokenizer": str(tmp_path / "tokenizer.json"), "dtype": "<u2", "end": 0}
    setting |= {"text": str(corpus_folder / "00.txt"), "batch_bytes": 100}
    with encode.Worker(setting) as worker:
        assert worker.write(chunk, tmp_path / "a.bin") == len(
            np.fromfile(tmp_path / "a.bin", "<u2")
        )
        with pytest.raises(OSError, match="No such file"):
            worker.write(chunk, tmp_path / "none" / "a.bin")
        worker._process.kill()
        with pytest.raises(DataError, match=r"signal 9, .*--processes"):
            worker.write(chunk, tmp_path / "b.bin")
    with (
        encode.Worker(setting | {"tokenizer": str(tmp_path / "gone")}) as worker,
        pytest.raises(FileNotFoundError, match="gone"),
    ):
        worker.write(chunk, tmp_path / "c.bin")


@pytest.mark.parametrize("stop", ["training tokenizer", "tokenizing"])
def test_a_preparation_that_was_stopped_goes_on(
    corpus_folder: Path, stop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encode, "CHUNK_BYTES", 5000)
    monkeypatch.setattr(prepare, "REPORT_BYTES", 10_000)

    def interrupt(stage: str, done: int, total: int | None) -> None:
        if stage == stop and done >= 20_000:
            raise KeyboardInterrupt

    data = DataSection(
        path=corpus_folder, cache=corpus_folder.parent / "cache", vocab_size=300, sequence_length=16
    )
    with pytest.raises(KeyboardInterrupt):
        prepare.prepare(data, seed=0, report=interrupt)
    done = sum(1 for _ in data.cache.rglob("*.bin"))  # pyrefly: ignore
    assert bool(done) == (stop == "tokenizing")
    monkeypatch.setattr(prepare, "read_documents", lambda *_: pytest.fail("read again"))
    encoded: list[Path] = []
    write = encode.Encoder.write

    def count(self: Any, chunk: Any, path: Path) -> int:
        encoded.append(path)
        return write(self, chunk, path)

    monkeypatch.setattr(encode.Encoder, "write", count)
    reports: list[Any] = []
    corpus = run(corpus_folder, reports=reports)
    assert len(encoded) == len(shards(corpus)) - done
    assert not list(corpus.folder.parent.glob(".partial-*"))
    monkeypatch.undo()
    monkeypatch.setattr(encode, "CHUNK_BYTES", 5000)
    again = run(corpus_folder, cache=corpus_folder.parent / "other")
    assert shards(again) == shards(corpus)


def test_cache_that_cannot_be_made_is_named(corpus_folder: Path) -> None:
    with pytest.raises(DataError, match=r"/dev/null/x.*data\.cache"):
        run(corpus_folder, cache=Path("/dev/null/x"))


def test_a_folder_that_is_being_removed_is_not_used_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, next_one = shutil.rmtree, ExitStack()

    def remove_slowly(path: Path, **options: Any) -> None:
        monkeypatch.undo()
        (path / cache.LOCK).unlink()
        taken = next_one.enter_context(cache.partial_folder(tmp_path, "key"))
        (taken / "text").touch()
        remove(path, **options)
        assert (taken / "text").exists()

    monkeypatch.setattr(shutil, "rmtree", remove_slowly)
    with next_one, cache.partial_folder(tmp_path, "key"):
        pass
    assert not list(tmp_path.iterdir())


def test_stale_partial_folders_are_removed_and_fresh_ones_stay(corpus_folder: Path) -> None:
    folder = corpus_folder.parent / "cache"
    old, fresh = folder / ".partial-old", folder / ".partial-fresh"
    for path in (old, fresh):
        path.mkdir(parents=True)
        (path / "text").touch()
    before = time.time() - 2 * cache.STALE_SECONDS
    for path in (old / "text", old, fresh):
        os.utime(path, (before, before))
    run(corpus_folder)
    assert not old.exists()
    assert fresh.exists()


def test_a_clock_that_jumps_removes_no_folder_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = time.time() + 2 * cache.STALE_SECONDS
    with cache.partial_folder(tmp_path) as live:
        monkeypatch.setattr(time, "time", lambda: late)
        with cache.partial_folder(tmp_path):
            assert live.exists()
        (tmp_path / ".partial-killed").mkdir()
        with cache.partial_folder(tmp_path):
            assert not (tmp_path / ".partial-killed").exists()
            assert live.exists()
    assert list(tmp_path.iterdir()) == []


def _race(path: Path, barrier: Any, results: Any) -> None:
    barrier.wait()
    corpus = run(path)
    results.put((corpus.fingerprint, corpus.train.read(0, len(corpus.train)).tolist()))


@pytest.mark.slow
def test_processes_at_once_agree_and_leave_one_folder(corpus_folder: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_race, args=(corpus_folder, barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    found = [results.get(timeout=40) for _ in processes]
    for process in processes:
        process.join()
    assert found[0] == found[1]
    assert len(list((corpus_folder.parent / "cache").iterdir())) == 2  # tokens and requests


@pytest.mark.parametrize("whole", [True, False])
def test_loser_of_a_race_uses_the_winners_folder_unless_it_is_damaged(
    tmp_path: Path, whole: bool
) -> None:
    for name in ("winner", "loser"):
        with cache.partial_folder(tmp_path) as partial:
            folder = partial / "corpus"
            folder.mkdir()
            (folder / "who").write_text(name)
            cache.write_meta(folder, {"fingerprint": "f" * 64})
            if name == "loser" and not whole:
                (cache.entry_path(tmp_path, "f" * 64) / "who").unlink()
            cache.install(folder, tmp_path, "f" * 64)
    found = (cache.entry_path(tmp_path, "f" * 64) / "who").read_text()
    assert found == ("winner" if whole else "loser")


@pytest.mark.parametrize(("length", "split"), [(200_000, "training"), (2000, "validation")])
def test_split_too_short_for_a_sequence_is_an_error(
    corpus_folder: Path, length: int, split: str
) -> None:
    with pytest.raises(DataError) as caught:
        run(corpus_folder, sequence_length=length)
    message = str(caught.value)
    assert f"the {split} split" in message
    assert "data.sequence_length" in message
    assert "data.validation" in message


def test_corpus_without_text_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": ""}\n')
    with pytest.raises(DataError, match="holds no text"):
        run(path)


def test_small_corpus_says_that_its_vocabulary_is_smaller(corpus_folder: Path) -> None:
    reports: list[Any] = []
    corpus = run(corpus_folder, vocab_size=5000, reports=reports)
    size = len(corpus.tokenizer)
    assert corpus.stats.vocab_size == size < 5000
    notes = [stage for stage, _, _ in reports if stage not in STAGES]
    assert len(notes) == 1
    assert f"vocabulary of {size} tokens" in notes[0]
    assert "data.vocab_size=5000" in notes[0]


def test_progress_counts_up_to_its_total(
    corpus_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare, "REPORT_BYTES", 5000)
    reports: list[Any] = []
    run(corpus_folder, reports=reports)
    assert list(dict.fromkeys(stage for stage, _, _ in reports)) == list(STAGES[:3])
    for stage in STAGES[:3]:
        done = [report[1] for report in reports if report[0] == stage]
        totals = {report[2] for report in reports if report[0] == stage}
        assert done == sorted(done)
        assert totals == {done[-1]}
        assert stage == "tokenizing" or len(done) > 5


def test_cache_folder_follows_option_then_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MUONSCALE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder(Path("given")) == Path("given")
    assert cache.cache_folder(None) == tmp_path / "own"
    monkeypatch.delenv("MUONSCALE_CACHE")
    assert cache.cache_folder(None) == tmp_path / "xdg" / "muonscale"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.cache_folder(None) == tmp_path / ".cache" / "muonscale"


@pytest.fixture
def three(tmp_path: Path) -> DataSection:
    """Three corpora of 30, 30 and 4 stories; the second repeats ten of the first."""
    for name, numbers in (("a", range(30)), ("b", range(20, 50)), ("c", range(60, 64))):
        (tmp_path / name).mkdir()
        for number in numbers:
            (tmp_path / name / f"{number:02d}.txt").write_text(story(number))
    return DataSection.model_validate(
        {
            "mixture": [{"path": tmp_path / name, "weight": 1} for name in "abc"],
            "cache": tmp_path / "cache",
            "vocab_size": 300,
            "sequence_length": 16,
        }
    )


def mixture(data: DataSection) -> dict[str, Corpus]:
    return prepare.prepare(data, seed=0, report=lambda *report: None)


def test_corpora_of_a_mixture_share_a_tokenizer_and_no_document(three: DataSection) -> None:
    corpora = mixture(three)
    assert list(corpora) == ["a", "b", "c"]
    held = {name: documents(corpus, "validation") for name, corpus in corpora.items()}
    trained = {name: documents(corpus, "train") for name, corpus in corpora.items()}
    assert sorted(trained["b"] + held["b"]) == sorted(story(number) for number in range(30, 50))
    assert corpora["b"].stats.duplicates == 10
    everything = [text for part in (held, trained) for texts in part.values() for text in texts]
    assert len(everything) == len(set(everything))
    states = {c.tokenizer.backend_tokenizer.to_str() for c in corpora.values()}
    assert len(states) == 1
    assert all(item.stats.vocab_size == 300 for item in corpora.values())


def test_a_mixture_is_found_again_and_a_change_of_one_is_noticed(
    three: DataSection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = {name: corpus.fingerprint for name, corpus in mixture(three).items()}
    with monkeypatch.context() as patched:
        patched.setattr(prepare, "read_documents", lambda data: pytest.fail("read again"))
        assert {name: c.fingerprint for name, c in mixture(three).items()} == first
    (tmp_path / "c" / "60.txt").write_text(story(99))
    second = {name: corpus.fingerprint for name, corpus in mixture(three).items()}
    assert second["c"] != first["c"]
    assert second["a"] != first["a"]  # its tokenizer is another


def test_weights_change_nothing_that_is_prepared(three: DataSection) -> None:
    first = mixture(three)
    assert three.mixture is not None
    weighed = [item.model_copy(update={"weight": 3.5}) for item in three.mixture[:2]]
    again = mixture(three.model_copy(update={"mixture": [*weighed, three.mixture[2]]}))
    assert [c.folder for c in again.values()] == [c.folder for c in first.values()]


def test_a_corpus_that_an_earlier_one_holds_is_refused(three: DataSection, tmp_path: Path) -> None:
    shutil.rmtree(tmp_path / "b")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with pytest.raises(DataError, match="b holds no text"):
        mixture(three)


def test_every_corpus_gives_the_tokenizer_as_much() -> None:
    assert prepare._divide_evenly([100, 1000, 10], 90) == [40, 40, 10]
    assert prepare._divide_evenly([5, 6], 100) == [5, 6]
    assert prepare._divide_evenly([50], 30) == [30]


def test_a_meta_json_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"meta\.json"):
        cache.read_meta(tmp_path)


def test_a_tokenizer_that_cannot_be_read_is_an_error_of_files(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    setting = {"tokenizer": str(tmp_path), "text": str(tmp_path / "text")}
    with pytest.raises(OSError, match=str(tmp_path)):
        Encoder(setting)
