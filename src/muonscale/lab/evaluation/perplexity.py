"""Loss, perplexity and bits per byte of a model on the texts of a configuration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
from transformers import PreTrainedConfig

from muonscale.errors import ConfigError, DataError
from muonscale.lab.data.prepare import Corpus, Report, SplitStats, prepare
from muonscale.lab.evaluation.config import Settings
from muonscale.lab.evaluation.target import Subject
from muonscale.lab.models.loss import bits_per_byte
from muonscale.lab.models.packed import check_isolates_conversations
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.text_loss import TextLoss, batches_of, losses_on, weighted_mean
from muonscale.lab.training.setup import fingerprint


def measure_texts(
    subject: Subject,
    forward: Parallelized,
    processes: Processes,
    settings: Settings,
    *,
    whole: bool,
    report: Report,
) -> dict[str, Any]:
    """Return the loss on every corpus and their weighted mean, as eval/result.json has it.

    Args:
        subject: the model.
        forward: the model as it is called.
        processes: this process.
        settings: with the `data` to evaluate on.
        whole: evaluate on all of the text, not on its held-out split; of a foreign text alone.
        report: as of `prepare`.

    Raises:
        DataError: if a text cannot be used, or the run's own data are not what they were.
        ConfigError: for what the model cannot read, and for `whole` on data it was trained on.
    """
    data = settings.config.data
    _check_model(subject, settings)
    corpora = prepare(data, seed=settings.config.run.seed, report=report)
    marks = fingerprint(corpora)
    own = _is_own(subject, settings, marks)
    if whole and own:
        raise ConfigError(
            f"--all would evaluate on what run {subject.folder} was trained on: leave it out for the "
            "held-out split of its data, or name another text"
        )
    batches = {name: _batches(corpus, settings, whole) for name, corpus in corpora.items()}
    found = losses_on(forward, batches, processes)
    assert found is not None
    total = sum(data.weights.values())
    weights = {name: weight / total for name, weight in data.weights.items()}
    sizes = {name: _size(corpus, whole) for name, corpus in corpora.items()}
    return {
        "data": "own" if own else "foreign",
        "split": "all" if whole else "held_out",
        "fingerprint": marks,
        "sequence_length": data.sequence_length,
        "precision": str(forward.precision)[len("torch.") :],
        **_figures(found, weights, sizes, chats=data.has_chats),
        **_baselines(subject, settings, marks if own else None),
    }


def _check_model(subject: Subject, settings: Settings) -> None:
    length, shape = settings.config.data.sequence_length, subject.model.config
    assert isinstance(shape, PreTrainedConfig)
    if subject.positions is not None and length > subject.positions:
        raise ConfigError(
            f"data.sequence_length={length} is more than the {subject.positions} positions of the "
            "model; give a shorter one"
        )
    if len(subject.tokenizer) > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer in {subject.folder} has {len(subject.tokenizer):,} tokens and its model "
            f"embeddings for {shape.vocab_size:,}; give a folder in which they belong together"
        )
    if settings.config.data.has_chats:
        check_isolates_conversations(shape)


def _is_own(subject: Subject, settings: Settings, marks: str | dict[str, str]) -> bool:
    """Return whether this is the data of the run, by its fingerprint where that is known."""
    if settings.gives_text:
        return settings.names_own or not _single(marks).isdisjoint(_single(subject.trained_on))
    if subject.trained_on is not None and marks != subject.trained_on:
        raise DataError(
            f"the data of run {subject.folder} have changed (fingerprint {marks}, the run has "
            f"{subject.trained_on}), so that its held-out split is gone; name another text to "
            "evaluate on with data.path=PATH"
        )
    return True


def _single(marks: str | dict[str, str] | None) -> set[str]:
    """Return the fingerprints of single corpora."""
    if marks is None:
        return set()
    return {marks} if isinstance(marks, str) else set(marks.values())


def _batches(corpus: Corpus, settings: Settings, whole: bool) -> Iterator[np.ndarray]:
    length = settings.config.data.sequence_length
    splits = [corpus.train, corpus.held_out] if whole else [corpus.held_out]
    return chain.from_iterable(
        batches_of(split.rows(length), settings.batch_rows) for split in splits
    )


def _size(corpus: Corpus, whole: bool) -> SplitStats:
    train, held_out = corpus.stats.train, corpus.stats.held_out
    if not whole:
        return held_out
    return SplitStats(
        documents=train.documents + held_out.documents,
        bytes=train.bytes + held_out.bytes,
        tokens=train.tokens + held_out.tokens,
    )


def _figures(
    found: dict[str, TextLoss],
    weights: dict[str, float],
    sizes: dict[str, SplitStats],
    *,
    chats: bool,
) -> dict[str, Any]:
    """Return the figures of all texts together and of each."""
    losses = {name: each.loss for name, each in found.items()}
    ratios = {name: size.bytes_per_token for name, size in sizes.items()}
    each = {
        name: {
            "weight": weights[name],
            **_units(losses[name], None if chats else ratios[name]),
            "tokens": found[name].targets,
            "bytes": sizes[name].bytes,
        }
        for name in found
    }
    loss, ratio = weighted_mean(weights, losses), weighted_mean(weights, ratios)
    return {
        **_units(loss, None if chats else ratio),
        "tokens": sum(one.targets for one in found.values()),
        "bytes": sum(size.bytes for size in sizes.values()),
        "corpora": each,
    }


def _units(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """Return a loss in its units; without bits per byte where not all of a text is predicted."""
    bits = (
        {} if bytes_per_token is None else {"bits_per_byte": bits_per_byte(loss, bytes_per_token)}
    )
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **bits}


def _baselines(
    subject: Subject, settings: Settings, own: str | dict[str, str] | None
) -> dict[str, float]:
    """Return the run's own baselines where they are of the same targets."""
    length = settings.config.data.sequence_length
    same_text = own is not None and (own == subject.trained_on or not settings.gives_text)
    if subject.baselines is None or not same_text:
        return {}
    from muonscale.lab.config.load import load_config

    same = load_config(str(subject.folder)).data.sequence_length == length
    return subject.baselines if same else {}
