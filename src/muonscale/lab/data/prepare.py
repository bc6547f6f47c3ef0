"""From a data section to tokens on disk, once.

`prepare` reads a corpus, splits it, trains or loads the tokenizer and writes both splits as token
shards. A later call finds them by its request (settings and file states). They are identified by a
fingerprint of texts, tokenizer, split and versions, which a copy of the same files elsewhere
shares.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Collection, Generator, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonscale.errors import DataError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data import cache
from muonscale.lab.data.background import BackgroundPreparation
from muonscale.lab.data.chat.store import ChatStore
from muonscale.lab.data.chat.template import find_template, read_template
from muonscale.lab.data.chat.tokenize import ChatEncoder, encode_chats
from muonscale.lab.data.document_store import DocumentStore, Range, total_bytes
from muonscale.lab.data.encode import count_shards, encode_split
from muonscale.lab.data.encode_chunk import PARTIAL
from muonscale.lab.data.sources import identify, known_bytes, read_documents
from muonscale.lab.data.stream import Feed, StreamedStore
from muonscale.lab.data.token_files import TokenFiles, copy_tokens, divide, find_token_files
from muonscale.lab.data.tokenizer import (
    id_limit,
    load_tokenizer,
    open_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)
from muonscale.lab.data.tokens import TokenStore, token_dtype
from muonscale.lab.files import hold_lock, is_locked, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Increased whenever the same text gives other files.
FORMAT = 2
CHAT_FORMAT = 2
"""The format of conversations."""
SAMPLE_BYTES = 25_000_000
REPORT_BYTES = 1 << 18

SPLITS = ("train", "validation")
STREAM = "stream.json"
"""File in the folder of an unfinished corpus, for runs that read its shards already."""
STREAM_LOCK = "stream.lock"
"""File that a process has locked once it has removed what a killed one left of the former."""
PAUSE = 0.1
"""Seconds between looks at a corpus that another process prepares."""
STAGES = ("reading", "training tokenizer", "tokenizing", "copying tokens")
"""The stages of `prepare`, measured in bytes. Any other stage is a sentence for the console."""

OnProgress = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class SplitStats:
    """Size of one split."""

    documents: int
    """Documents, or parts of documents, in the split."""
    bytes: int
    """Bytes of UTF-8 text."""
    tokens: int
    """Tokens, with one end of text before every document; for chats those of the template."""
    targets: int | None = None
    """For chats, the tokens of the assistant."""
    estimated: bool = False
    """Whether `tokens` is estimated from the validation split, since not all are written yet."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token: turns nats per token into bits per byte."""
        return self.bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class CorpusStats:
    """Sizes of a prepared corpus."""

    source: str
    """data.source, or data.path."""
    vocab_size: int
    """Tokens of the tokenizer; below data.vocab_size if the corpus allows no more merges."""
    duplicates: int
    """Documents dropped because an earlier one has the same text."""
    train: SplitStats
    validation: SplitStats
    left_out: dict[str, int] = field(default_factory=dict)
    """Files that were not read, by the reason."""


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    """Folder of its files."""
    fingerprint: str
    """SHA-256 of everything that determines its tokens; a run resumes only with the same one."""
    train: TokenStore | ChatStore
    validation: TokenStore | ChatStore
    stats: CorpusStats
    background: BackgroundPreparation | None = None
    """The process that still prepares it, if this one has started it."""

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded on first use."""
        return open_tokenizer(self.folder / "tokenizer")


def prepare(
    data: DataSection,
    *,
    seed: int,
    report: OnProgress,
    before: Collection[str] = (),
    processes: int | None = None,
    stream: bool = False,
) -> dict[str, Corpus]:
    """Return the prepared corpora of a data section by name, from the cache or newly prepared.

    All have one tokenizer. A document in several corpora belongs to the first. Several processes
    may prepare the same corpora at once; they use the folders of the first to finish. After a
    process was killed, the next one goes on with its text, its tokenizer and its shards.

    Args:
        data: the `data` section of a config.
        seed: seed of the split.
        report: called with (stage, bytes done, bytes in total or None), see `STAGES`.
        before: fingerprints of the corpora as an earlier run had them, in order. If the texts
            cannot be read now, the tokens of these are used, as far as the cache has them.
        processes: processes that tokenize; None for one for each CPU, if there is much text.
        stream: return the only corpus, of text, as soon as training can begin, while another
            process prepares the rest of it. Its training split is a `StreamedStore`.

    Raises:
        DataError: if a corpus or the tokenizer cannot be used, a split is too short for one
            sequence, or the cache cannot be written.
    """
    folder = cache.cache_folder(data.cache)
    try:
        if stream:
            return {data.title: _stream(folder, data, seed, report, processes)}
        found = _find_or_build(folder, data, seed, report, processes)
    except DataError as error:
        prepared = [cache.find_prepared(folder, fingerprint) for fingerprint in before]
        found = [item for item in prepared if item is not None]
        if not found or len(found) < len(data.corpora):
            raise
        report(f"{error}; using the tokens prepared before, in {folder}", 0, None)
    corpora = [_open(folder, *pair) for pair in zip(found, data.corpora, strict=True)]
    for corpus in corpora:
        _check_length(corpus, data)
    if stream:
        corpora = [_as_stream(corpus) for corpus in corpora]
    return dict(zip(data.weights, corpora, strict=True))


def _stream(
    folder: Path, data: DataSection, seed: int, report: OnProgress, processes: int | None
) -> Corpus:
    """Return a corpus when its validation split is written; start to prepare it if nobody does."""
    keys = _request_keys(data, seed)
    partial, background = cache.keyed_folder(folder, _work_key(keys)), None
    while True:
        if is_locked(partial / cache.LOCK):
            if background is None:
                report("waiting for a process that prepares the same data", 0, None)
            place = partial / keys[0]
            known = cache.read_json(place / STREAM) if is_locked(partial / STREAM_LOCK) else None
            if known is not None:
                corpus = _open_unfinished(folder, place, known, data)
                if corpus is not None:
                    _check_length(corpus, data)
                    return replace(corpus, background=background)
        elif background is None or not background.is_running:
            if (known := _find(folder, keys[0], report)) is not None:
                corpus = _open(folder, known, data)
                _check_length(corpus, data)
                return _as_stream(corpus)
            if background is not None:
                raise DataError(background.error)
            background = BackgroundPreparation(data, seed, processes)
        time.sleep(PAUSE)
        for made in background.reports() if background is not None else ():
            report(*made)


def _open_unfinished(
    home: Path, place: Path, known: dict[str, Any], data: DataSection
) -> Corpus | None:
    """Open a corpus that is being written; None if it has just been finished."""
    final, limit = cache.entry_path(home, known["fingerprint"]), known["id_limit"]
    feed = Feed(known["shards"], final, place, place.parent / cache.LOCK)
    train = StreamedStore(feed, token_dtype(limit), limit, known["stats"]["train"]["tokens"])
    try:
        corpus = _open_folder(place, known, known, data, train)
        _ = corpus.tokenizer  # before its folder is renamed
    except (DataError, OSError):
        if place.is_dir():
            raise
        return None
    return corpus


def _as_stream(corpus: Corpus) -> Corpus:
    """Return a finished corpus whose training split is read in the order of a stream."""
    store = corpus.train
    assert isinstance(store, TokenStore) and store.limit is not None
    feed = Feed(store.shards, corpus.folder, corpus.folder, corpus.folder / cache.LOCK)
    return replace(corpus, train=StreamedStore(feed, store.dtype, store.limit, len(store)))


def _find_or_build(
    folder: Path, data: DataSection, seed: int, report: OnProgress, processes: int | None
) -> list[dict[str, Any]]:
    keys = _request_keys(data, seed)
    known = [_find(folder, key, report) for key in keys]
    found = [item for item in known if item is not None]
    try:
        if len(found) == len(known):
            return found
        return _build(folder, keys, data, seed, report, processes)
    except OSError as error:
        raise cache.cache_error(folder, error) from error


def _request_keys(data: DataSection, seed: int) -> list[str]:
    requests = [_request(part, seed) for part in data.corpora]
    if len(requests) > 1:  # tokenizer and dropped duplicates depend on the other corpora
        requests = [{**request, "among": requests} for request in requests]
    return [
        hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        for request in requests
    ]


def _work_key(keys: list[str]) -> str:
    """Return the key of the folder in which corpora are prepared."""
    return hashlib.sha256("".join(keys).encode()).hexdigest()


def _request(data: DataSection, seed: int) -> dict[str, Any]:
    settings = data.model_dump(
        mode="json", include={"max_bytes", "errors", "format", "token_dtype"}
    )
    chat = {"chat": CHAT_FORMAT, "template": read_template(data)} if data.format == "chat" else {}
    return {
        "format": FORMAT,
        "corpus": identify(data),
        "settings": {**settings, "field": data.text_field, **chat},
        "validation": data.validation,
        "tokenizer": tokenizer_identity(data.tokenizer),
        "vocab_size": data.vocab_size if data.tokenizer is None else None,
        "seed": seed,
        "tokenizers": version("tokenizers"),
    }


def _find(folder: Path, key: str, report: OnProgress) -> dict[str, Any] | None:
    known = cache.find_request(folder, key)
    if known is None:
        return None
    place = cache.entry_path(folder, known["fingerprint"])
    problem = cache.find_cache_damage(place, known["fingerprint"])
    if problem is not None:
        report(f"preparing {place} again: {problem}", 0, None)
        return None
    return known


def _build(
    folder: Path,
    keys: list[str],
    data: DataSection,
    seed: int,
    report: OnProgress,
    processes: int | None,
) -> list[dict[str, Any]]:
    """Write corpora into the cache, and return the answers to their requests."""
    with cache.partial_folder(folder, _work_key(keys)) as partial, _own_streams(partial, keys):
        stores = _read(data, partial, report)
        splits = [
            documents.split(data.validation, seed, whole=part.format == "chat")
            if isinstance(documents, DocumentStore)
            else ([], [])
            for documents, part in zip(stores, data.corpora, strict=True)
        ]
        trained_on = [
            (documents, train)
            for documents, (train, _) in zip(stores, splits, strict=True)
            if isinstance(documents, DocumentStore)
        ]
        tokenizer = _make_tokenizer(data, trained_on, partial, report)
        known = []
        for key, part, documents, split in zip(keys, data.corpora, stores, splits, strict=True):
            fingerprint = _fingerprint(documents, tokenizer, data, seed)
            answer = {
                "fingerprint": fingerprint,
                "duplicates": documents.duplicates,
                "left_out": documents.left_out.counts,
            }
            if (
                cache.find_cache_damage(cache.entry_path(folder, fingerprint), fingerprint)
                is not None
            ):
                place = partial / key
                place.mkdir(exist_ok=True)
                tokenizer.save_pretrained(str(place / "tokenizer"))
                if isinstance(documents, DocumentStore):
                    meta = _encode(
                        documents, split, tokenizer, part, place, report, processes, answer
                    )
                else:
                    meta = _copy(documents, tokenizer, part, place, report)
                (place / STREAM).unlink(missing_ok=True)
                cache.write_meta(place, {"fingerprint": fingerprint, **meta})
                cache.install(place, folder, fingerprint)
            known.append(answer)
            cache.save_request(folder, key, answer)
    return known


@contextmanager
def _own_streams(partial: Path, keys: list[str]) -> Generator[None]:
    """Hold the lock that says that what can be read as a stream is not of a killed process."""
    for key in keys:
        (partial / key / STREAM).unlink(missing_ok=True)
    with hold_lock(partial / STREAM_LOCK):
        yield


def _read(data: DataSection, folder: Path, report: OnProgress) -> list[DocumentStore | TokenFiles]:
    seen: set[bytes] = set()
    stores: list[DocumentStore | TokenFiles] = []
    for number, part in enumerate(data.corpora):
        if part.format == "tokens":
            files = find_token_files(part)
            if files.left_out.counts:
                report(f"{part.title}: {files.left_out}", 0, None)
            stores.append(files)
            continue
        documents = DocumentStore(folder / f"text-{number}")
        if not documents.load():
            progress = _throttle("reading", known_bytes(part), report)
            documents.fill(read_documents(part, documents.left_out), progress, seen)
            documents.save()
        seen.update(documents.digests)
        report("reading", documents.size, documents.size)
        if documents.left_out.counts:
            report(f"{part.title}: {documents.left_out}", 0, None)
        if not documents.size:
            others = " that no other corpus of the mixture has" if documents.duplicates else ""
            raise DataError(f"{part.title} holds no text{others}")
        stores.append(documents)
    return stores


def _throttle(stage: str, total: int | None, report: OnProgress) -> Callable[[int], None]:
    last = 0
    report(stage, 0, total)

    def progress(done: int) -> None:
        nonlocal last
        if done - last >= REPORT_BYTES:
            last = done
            report(stage, done, total)

    return progress


def _make_tokenizer(
    data: DataSection,
    texts: list[tuple[DocumentStore, list[Range]]],
    folder: Path,
    report: OnProgress,
) -> PreTrainedTokenizerFast:
    """Load the tokenizer, or train it on equal amounts of every corpus, or all of a smaller one.

    A trained one is kept in the folder.
    """
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer, own_begin=data.has_chats)
        if data.has_chats:
            tokenizer.chat_template = find_template(data, tokenizer).jinja
        return tokenizer
    kept = folder / "tokenizer"
    if kept.is_dir():
        return open_tokenizer(kept)
    sizes = [total_bytes(ranges) for _, ranges in texts]
    wanted = _divide_evenly(sizes, SAMPLE_BYTES)
    progress = _throttle("training tokenizer", sum(wanted), report)

    def sample() -> Iterator[str]:
        done = 0
        for (documents, ranges), size in zip(texts, wanted, strict=True):
            for piece in documents.sample(ranges, size):
                yield piece.text
                done += piece.size
                progress(done)

    tokenizer = train_tokenizer(sample(), data.vocab_size)
    report("training tokenizer", sum(wanted), sum(wanted))
    temporary = folder / "tokenizer.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    tokenizer.save_pretrained(str(temporary))
    temporary.rename(kept)
    if len(tokenizer) < data.vocab_size:
        report(
            f"vocabulary of {len(tokenizer)} tokens instead of data.vocab_size={data.vocab_size}: "
            "the corpus has no more pairs to merge",
            0,
            None,
        )
    return tokenizer


def _divide_evenly(sizes: list[int], total: int) -> list[int]:
    """Divide a total evenly; the part that exceeds a size goes to the others."""
    parts = [0] * len(sizes)
    for done, number in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        parts[number] = min(sizes[number], total // (len(sizes) - done))
        total -= parts[number]
    return parts


def _fingerprint(
    documents: DocumentStore | TokenFiles,
    tokenizer: PreTrainedTokenizerFast,
    data: DataSection,
    seed: int,
) -> str:
    settings = {
        "format": FORMAT,
        "validation": data.validation,
        "seed": seed,
        "end_of_text": tokenizer.eos_token,
        "tokenizers": version("tokenizers"),
    }
    if data.has_chats:
        settings |= {"chat": CHAT_FORMAT, "template": tokenizer.chat_template}
        settings |= {"special": tokenizer.special_tokens_map}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for document in documents.digests:
        digest.update(document)
    return digest.hexdigest()


def _copy(
    files: TokenFiles,
    tokenizer: PreTrainedTokenizerFast,
    data: DataSection,
    folder: Path,
    report: OnProgress,
) -> dict[str, Any]:
    """Copy tokens into the shards of a corpus, and return its meta.json."""
    divide(files, data.validation, tokenizer.eos_token_id)
    progress = _throttle("copying tokens", files.size, report)
    stats, before = {}, 0
    for name, parts in zip(SPLITS, (files.train, files.validation), strict=True):

        def done(size: int, before: int = before) -> None:
            progress(before + size)

        counted = copy_tokens(parts, tokenizer, folder, name, done)
        before += sum(ids.nbytes for _, ids in parts)
        stats[name] = asdict(SplitStats(*counted))
    report("copying tokens", files.size, files.size)
    return {"vocab_size": len(tokenizer), "id_limit": id_limit(tokenizer), "stats": stats}


def _encode(
    documents: DocumentStore,
    splits: tuple[list[Range], list[Range]],
    tokenizer: PreTrainedTokenizerFast,
    data: DataSection,
    folder: Path,
    report: OnProgress,
    processes: int | None,
    answer: dict[str, Any],
) -> dict[str, Any]:
    """Tokenize a corpus, the validation split first, and return its meta.json.

    From then on `stream.json` says how many shards the training split will have, so that a run can
    begin; `answer` is what the request will be answered with.
    """
    chat = data.format == "chat"
    encoder = ChatEncoder(tokenizer, find_template(data, tokenizer)) if chat else None
    progress = _throttle("tokenizing", documents.size, report)
    meta = {"vocab_size": len(tokenizer), "id_limit": id_limit(tokenizer)}
    stats: dict[str, Any] = {}
    before = 0
    for name, ranges in reversed(list(zip(SPLITS, splits, strict=True))):
        if name == "train" and not chat:
            about = _estimate(ranges, SplitStats(**stats["validation"]))
            content = {**answer, **meta, "stats": {**stats, "train": asdict(about)}}
            write_json(folder / STREAM, {**content, "shards": count_shards(documents, ranges)})

        def done(size: int, before: int = before) -> None:
            progress(before + size)

        targets = None
        if encoder is None:
            tokens = encode_split(documents, ranges, tokenizer, folder, name, done, processes)
        else:
            tokens, targets = encode_chats(
                documents.texts(ranges), encoder, folder, name, id_limit(tokenizer), done
            )
        size = total_bytes(ranges)
        before += size
        stats[name] = asdict(SplitStats(len(ranges), size, tokens, targets))
    for left in folder.glob(f"*{PARTIAL}"):  # of a process that was killed
        left.unlink()
    report("tokenizing", documents.size, documents.size)
    end = {"end": tokenizer.eos_token_id} if chat else {}
    return {**meta, "stats": stats, **end}


def _estimate(ranges: list[Range], like: SplitStats) -> SplitStats:
    """Return the sizes of a split, with as many tokens for a byte as in another one."""
    size = total_bytes(ranges)
    return SplitStats(len(ranges), size, round(size / (like.bytes_per_token or 1)), estimated=True)


def _open(home: Path, known: dict[str, Any], data: DataSection) -> Corpus:
    folder = cache.entry_path(home, known["fingerprint"])
    return _open_folder(folder, known, cache.read_meta(folder), data)


def _open_folder(
    folder: Path,
    known: dict[str, Any],
    meta: dict[str, Any],
    data: DataSection,
    train: TokenStore | ChatStore | None = None,
) -> Corpus:
    limit = meta["id_limit"]

    def open_split(split: str) -> TokenStore | ChatStore:
        if data.format == "chat":
            return ChatStore(folder, split, limit, meta["end"])
        return TokenStore(folder, split, token_dtype(limit), limit)

    splits = [SplitStats(**meta["stats"][name]) for name in SPLITS]
    stats = CorpusStats(
        source=data.title,
        vocab_size=meta["vocab_size"],
        duplicates=known["duplicates"],
        train=splits[0],
        validation=splits[1],
        left_out=known.get("left_out", {}),
    )
    train = open_split("train") if train is None else train
    return Corpus(folder, known["fingerprint"], train, open_split("validation"), stats)


def _check_length(corpus: Corpus, data: DataSection) -> None:
    for name, tokens in (("training", corpus.train), ("validation", corpus.validation)):
        if len(tokens.rows(data.sequence_length)):
            continue
        if isinstance(tokens, StreamedStore) and not tokens.is_complete:
            continue  # `StreamedSequences` checks it
        if isinstance(tokens, ChatStore):
            raise DataError(
                f"no conversation of the {name} split of {corpus.stats.source} has words of the "
                f"assistant within data.sequence_length={data.sequence_length} tokens"
            )
        raise DataError(
            f"the {name} split of {corpus.stats.source} has {len(tokens)} tokens; one sequence "
            f"needs {data.sequence_length + 1}; give more text, a shorter "
            f"data.sequence_length={data.sequence_length}, or another data.validation={data.validation}"
        )
