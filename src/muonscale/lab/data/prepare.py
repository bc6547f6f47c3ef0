"""From a data section to tokens on disk, once.

`prepare` reads a corpus, holds a part of it out, trains or loads the tokenizer and writes both
splits as token shards. What it wrote is found again by the request (settings and file states), and
identified by its fingerprint (texts, tokenizer, split, versions), which a copy of the same files
elsewhere shares.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from muonscale.errors import DataError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data import cache as store
from muonscale.lab.data.chat.store import ChatStore
from muonscale.lab.data.chat.template import chat_template, given_template
from muonscale.lab.data.chat.tokenize import ChatEncoder, encode_chats
from muonscale.lab.data.document_store import Piece, Range, Spool
from muonscale.lab.data.encode import encode_split
from muonscale.lab.data.sources import identify, known_bytes, read_documents
from muonscale.lab.data.tokenizer import (
    load_tokenizer,
    open_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)
from muonscale.lab.data.tokens import TokenStore, token_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Raised whenever the same text would give other files: folders of older formats are left alone.
FORMAT = 1
CHAT_FORMAT = 1
"""The same for conversations."""
SAMPLE_BYTES = 25_000_000
REPORT_BYTES = 1 << 18

SPLITS = ("train", "held_out")
STAGES = ("reading", "training tokenizer", "tokenizing")
"""The stages of `prepare`, counted in bytes. Any other stage is a sentence to be shown once."""

Report = Callable[[str, int, int | None], None]


@dataclass(frozen=True)
class SplitStats:
    """Size of one split."""

    documents: int
    """Documents, or ends of documents, in the split."""
    bytes: int
    """Bytes of UTF-8 text."""
    tokens: int
    """Tokens, with one end of text before every document; of chats those of the template."""
    targets: int | None = None
    """Of chats: how many tokens the assistant has said."""

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text for each token: turns nats per token into bits per byte."""
        return self.bytes / self.tokens if self.tokens else 0.0


@dataclass(frozen=True)
class CorpusStats:
    """What a prepared corpus holds."""

    source: str
    """data.source, or data.path."""
    vocab_size: int
    """Tokens of the tokenizer; below data.vocab_size where the corpus gives no more merges."""
    duplicates: int
    """Documents dropped because an earlier one has the same text."""
    train: SplitStats
    held_out: SplitStats


@dataclass(frozen=True)
class Corpus:
    """A prepared corpus."""

    folder: Path
    """Where its files are."""
    fingerprint: str
    """SHA-256 of what determines its tokens; a run is resumed only on the same one."""
    train: TokenStore | ChatStore
    held_out: TokenStore | ChatStore
    stats: CorpusStats

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer, loaded when first asked for."""
        return open_tokenizer(self.folder / "tokenizer")


def prepare(data: DataSection, *, seed: int, report: Report) -> dict[str, Corpus]:
    """Return the tokens of the corpora of a section by name, from the cache or made now.

    They share a tokenizer, and no document: what several hold belongs to the first. Processes may
    prepare the same corpora at once: the first to finish wins, the others use its folders.

    Args:
        data: the `data` section of a config.
        seed: chooses the held-out documents.
        report: called as (stage, bytes done, bytes in total or None), see `STAGES`.

    Raises:
        DataError: if a corpus or the tokenizer cannot be used, a split is too short for one
            sequence, or the cache cannot be written.
    """
    folder = store.cache_folder(data.cache)
    keys = _request_keys(data, seed)
    known = [_find(folder, key, report) for key in keys]
    try:
        found = [item for item in known if item is not None]
        if len(found) < len(known):
            found = _build(folder, keys, data, seed, report)
    except OSError as error:
        raise store.cache_error(folder, error) from error
    corpora = [_open(folder, *pair) for pair in zip(found, data.corpora, strict=True)]
    for corpus in corpora:
        _check_length(corpus, data)
    return dict(zip(data.weights, corpora, strict=True))


def _request_keys(data: DataSection, seed: int) -> list[str]:
    requests = [_request(part, seed) for part in data.corpora]
    if len(requests) > 1:  # of the others depend the tokenizer and which documents are left out
        requests = [{**request, "among": requests} for request in requests]
    return [
        hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
        for request in requests
    ]


def _request(data: DataSection, seed: int) -> dict[str, Any]:
    settings = data.model_dump(mode="json", include={"max_bytes", "errors"})
    chat = {"chat": CHAT_FORMAT, "template": given_template(data)} if data.format == "chat" else {}
    return {
        "format": FORMAT,
        "corpus": identify(data),
        "settings": {**settings, "field": data.text_field, **chat},
        "held_out": data.held_out,
        "tokenizer": tokenizer_identity(data.tokenizer),
        "vocab_size": data.vocab_size if data.tokenizer is None else None,
        "seed": seed,
        "tokenizers": version("tokenizers"),
    }


def _find(folder: Path, key: str, report: Report) -> dict[str, Any] | None:
    known = store.find_request(folder, key)
    if known is None:
        return None
    place = store.entry(folder, known["fingerprint"])
    problem = store.damage(place, known["fingerprint"])
    if problem is not None:
        report(f"preparing {place} again: {problem}", 0, None)
        return None
    return known


def _build(
    folder: Path, keys: list[str], data: DataSection, seed: int, report: Report
) -> list[dict[str, Any]]:
    """Write corpora into the cache; return what their requests are to be answered with."""
    partial = store.new_partial(folder)
    try:
        spools = _read(data, partial, report)
        splits = [
            spool.split(data.held_out, seed, whole=part.format == "chat")
            for spool, part in zip(spools, data.corpora, strict=True)
        ]
        trained_on = [(spool, train) for spool, (train, _) in zip(spools, splits, strict=True)]
        tokenizer = _make_tokenizer(data, trained_on, report)
        known = []
        for key, part, spool, split in zip(keys, data.corpora, spools, splits, strict=True):
            fingerprint = _fingerprint(spool, tokenizer, data, seed)
            if store.damage(store.entry(folder, fingerprint), fingerprint) is not None:
                place = partial / key
                place.mkdir()
                meta = _encode(spool, split, tokenizer, part, place, report)
                tokenizer.save_pretrained(str(place / "tokenizer"))
                store.write_meta(place, {"fingerprint": fingerprint, **meta})
                store.install(place, folder, fingerprint)
            known.append({"fingerprint": fingerprint, "duplicates": spool.duplicates})
            store.save_request(folder, key, known[-1])
            spool.path.unlink()
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return known


def _read(data: DataSection, folder: Path, report: Report) -> list[Spool]:
    seen: set[bytes] = set()
    spools = []
    for number, part in enumerate(data.corpora):
        spool = Spool(folder / f"text-{number}")
        progress = _throttled("reading", known_bytes(part), report)
        spool.fill(read_documents(part), progress, seen)
        report("reading", spool.size, spool.size)
        if not spool.size:
            others = ", but what other corpora of the mixture have" if spool.duplicates else ""
            raise DataError(
                f"{part.source or part.path} holds no text{others}, so there is nothing to train on; give a corpus with text"
            )
        spools.append(spool)
    return spools


def _throttled(stage: str, total: int | None, report: Report) -> Callable[[int], None]:
    last = 0
    report(stage, 0, total)

    def progress(done: int) -> None:
        nonlocal last
        if done - last >= REPORT_BYTES:
            last = done
            report(stage, done, total)

    return progress


def _make_tokenizer(
    data: DataSection, texts: list[tuple[Spool, list[Range]]], report: Report
) -> PreTrainedTokenizerFast:
    """Load the tokenizer, or train it on as much of every corpus, as far as it has that much."""
    if data.tokenizer is not None:
        tokenizer = load_tokenizer(data.tokenizer, own_begin=data.has_chats)
        if data.has_chats:
            tokenizer.chat_template = chat_template(data, tokenizer).jinja
        return tokenizer
    sizes = [sum(end - start for start, end in ranges) for _, ranges in texts]
    wanted = _even_parts(sizes, SAMPLE_BYTES)
    progress = _throttled("training tokenizer", sum(wanted), report)
    samples = (
        spool.sample(ranges, size) for (spool, ranges), size in zip(texts, wanted, strict=True)
    )
    tokenizer = train_tokenizer(_counted(chain.from_iterable(samples), progress), data.vocab_size)
    report("training tokenizer", sum(wanted), sum(wanted))
    if len(tokenizer) < data.vocab_size:
        report(
            f"vocabulary of {len(tokenizer)} tokens: the corpus has no more pairs to merge "
            f"(data.vocab_size={data.vocab_size})",
            0,
            None,
        )
    return tokenizer


def _even_parts(sizes: list[int], total: int) -> list[int]:
    """Divide a total evenly; what one cannot take goes to the others."""
    parts = [0] * len(sizes)
    for done, number in enumerate(sorted(range(len(sizes)), key=sizes.__getitem__)):
        parts[number] = min(sizes[number], total // (len(sizes) - done))
        total -= parts[number]
    return parts


def _counted(pieces: Iterable[Piece], progress: Callable[[int], None]) -> Iterator[str]:
    done = 0
    for piece in pieces:
        yield piece.text
        done += piece.size
        progress(done)


def _fingerprint(
    spool: Spool, tokenizer: PreTrainedTokenizerFast, data: DataSection, seed: int
) -> str:
    settings = {
        "format": FORMAT,
        "held_out": data.held_out,
        "seed": seed,
        "end_of_text": tokenizer.eos_token,
        "tokenizers": version("tokenizers"),
    }
    if data.has_chats:
        settings |= {"chat": CHAT_FORMAT, "template": tokenizer.chat_template}
        settings |= {"special": tokenizer.special_tokens_map}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    for document in spool.digests:
        digest.update(document)
    return digest.hexdigest()


def _encode(
    spool: Spool,
    splits: tuple[list[Range], list[Range]],
    tokenizer: PreTrainedTokenizerFast,
    data: DataSection,
    folder: Path,
    report: Report,
) -> dict[str, Any]:
    chat = data.format == "chat"
    encoder = ChatEncoder(tokenizer, chat_template(data, tokenizer)) if chat else None
    progress = _throttled("tokenizing", spool.size, report)
    stats: dict[str, Any] = {}
    before = 0
    for name, ranges in zip(SPLITS, splits, strict=True):

        def done(size: int, before: int = before) -> None:
            progress(before + size)

        targets = None
        if encoder is None:
            tokens = encode_split(spool.pieces(ranges), tokenizer, folder, name, done)
        else:
            tokens, targets = encode_chats(
                spool.texts(ranges), encoder, folder, name, len(tokenizer), done
            )
        size = sum(end - start for start, end in ranges)
        before += size
        stats[name] = asdict(SplitStats(len(ranges), size, tokens, targets))
    report("tokenizing", spool.size, spool.size)
    end = {"end": tokenizer.eos_token_id} if chat else {}
    return {"vocab_size": len(tokenizer), "stats": stats, **end}


def _open(cache: Path, known: dict[str, Any], data: DataSection) -> Corpus:
    folder = store.entry(cache, known["fingerprint"])
    meta = store.read_meta(folder)
    dtype = token_dtype(meta["vocab_size"])

    def opened(split: str) -> TokenStore | ChatStore:
        if data.format == "chat":
            return ChatStore(folder, split, dtype, meta["end"])
        return TokenStore(folder, split, dtype)

    stats = CorpusStats(
        source=str(data.source or data.path),
        vocab_size=meta["vocab_size"],
        duplicates=known["duplicates"],
        train=SplitStats(**meta["stats"]["train"]),
        held_out=SplitStats(**meta["stats"]["held_out"]),
    )
    return Corpus(
        folder=folder,
        fingerprint=known["fingerprint"],
        train=opened("train"),
        held_out=opened("held_out"),
        stats=stats,
    )


def _check_length(corpus: Corpus, data: DataSection) -> None:
    for name, tokens in (("training", corpus.train), ("held-out", corpus.held_out)):
        if len(tokens.rows(data.sequence_length)):
            continue
        if isinstance(tokens, ChatStore):
            raise DataError(
                f"no conversation of the {name} split of {corpus.stats.source} comes to words of the "
                f"assistant within data.sequence_length={data.sequence_length} tokens; give a longer "
                "one, or other conversations"
            )
        raise DataError(
            f"the {name} split of {corpus.stats.source} has {len(tokens)} tokens; one sequence "
            f"needs {data.sequence_length + 1}. Give more text, a shorter data.sequence_length "
            f"(now {data.sequence_length}), or another data.held_out (now {data.held_out})"
        )
