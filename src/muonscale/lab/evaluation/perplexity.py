"""Loss, perplexity and bits per byte of a model on texts."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError, DataError
from muonscale.lab.config.load import load_config
from muonscale.lab.console import dtype_text
from muonscale.lab.data.prepare import OnProgress, SplitStats, prepare
from muonscale.lab.evaluation.target import EvalSettings, EvalTarget
from muonscale.lab.models.loss import bits_per_byte
from muonscale.lab.models.packed_rows import check_isolates_conversations
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.text_loss import TextLoss, batches_of, losses_on, weighted_mean
from muonscale.lab.training.setup import corpus_fingerprint


def measure_texts(
    target: EvalTarget,
    forward: Parallelized,
    processes: Processes,
    settings: EvalSettings,
    *,
    whole: bool,
    report: OnProgress,
) -> dict[str, Any]:
    """Return the loss on every corpus and their weighted mean, in the format of eval/result.json.

    Args:
        target: the model.
        forward: the model on its device.
        processes: this process.
        settings: configuration with the `data` to evaluate on.
        whole: evaluate on all of the text, not only its validation split. Not for the run's own
            data.
        report: as for `prepare`.

    Raises:
        DataError: if a text cannot be used, or the run's own data have changed.
        ConfigError: for data that the model does not support, and for `whole` on its training data.
    """
    data = settings.config.data
    _check_model(target, settings)
    known = target.trained_on
    before = list(known.values()) if isinstance(known, dict) else [known] if known else []
    before = [] if settings.gives_text else before
    corpora = prepare(data, seed=settings.config.run.seed, report=report, before=before)
    prints = corpus_fingerprint(corpora)
    own = _is_own(target, settings, prints)
    if whole and own:
        raise ConfigError(
            f"--all would evaluate run {target.folder} on its training data; leave it out, or give "
            "another text"
        )
    batches, sizes = {}, {}
    for name, corpus in corpora.items():
        splits = [corpus.train, corpus.validation] if whole else [corpus.validation]
        batches[name] = chain.from_iterable(
            batches_of(split.rows(data.sequence_length), settings.batch_rows) for split in splits
        )
        train, validation = corpus.stats.train, corpus.stats.validation
        sizes[name] = validation
        if whole:
            sizes[name] = SplitStats(
                documents=train.documents + validation.documents,
                bytes=train.bytes + validation.bytes,
                tokens=train.tokens + validation.tokens,
            )
    if data.document_mask:
        forward.document_start = target.tokenizer.bos_token_id
    losses = losses_on(forward, batches, processes)
    assert losses is not None
    return {
        "data": "own" if own else "foreign",
        "split": "all" if whole else "validation",
        "fingerprint": prints,
        "sequence_length": data.sequence_length,
        "precision": dtype_text(forward.precision),
        **_figures(losses, data.shares, sizes, chats=data.has_chats),
        **_baselines(target, settings, prints if own else None),
    }


def _check_model(target: EvalTarget, settings: EvalSettings) -> None:
    length, shape = settings.config.data.sequence_length, target.model.config
    assert isinstance(shape, PreTrainedConfig)
    if target.positions is not None and length > target.positions:
        raise ConfigError(
            f"data.sequence_length={length} is more than the {target.positions} positions of the "
            "model"
        )
    if len(target.tokenizer) > shape.vocab_size:
        raise ConfigError(
            f"the tokenizer in {target.folder} has {len(target.tokenizer):,} tokens, and the "
            f"model has embeddings for {shape.vocab_size:,}"
        )
    check_isolates_conversations(shape, settings.config.data)


def _is_own(target: EvalTarget, settings: EvalSettings, prints: str | dict[str, str]) -> bool:
    """Return whether the data are the run's own, by fingerprint if that is known."""
    if settings.gives_text:
        return settings.names_own or not _as_set(prints).isdisjoint(_as_set(target.trained_on))
    if target.trained_on is not None and prints != target.trained_on:
        raise DataError(
            f"the data of run {target.folder} have changed (fingerprint {prints}, the run has "
            f"{target.trained_on}), so its validation split is lost; give another text with "
            "data.path=PATH"
        )
    return True


def _as_set(prints: str | dict[str, str] | None) -> set[str]:
    """Return the fingerprints of all corpora."""
    if prints is None:
        return set()
    return {prints} if isinstance(prints, str) else set(prints.values())


def _figures(
    texts: dict[str, TextLoss],
    weights: dict[str, float],
    sizes: dict[str, SplitStats],
    *,
    chats: bool,
) -> dict[str, Any]:
    """Return the figures of all texts together, and of each text."""
    losses = {name: each.loss for name, each in texts.items()}
    ratios = {name: size.bytes_per_token for name, size in sizes.items()}
    each = {
        name: {
            "weight": weights[name],
            **_units(losses[name], None if chats else ratios[name]),
            "tokens": texts[name].targets,
            "bytes": sizes[name].bytes,
        }
        for name in texts
    }
    loss, ratio = weighted_mean(weights, losses), weighted_mean(weights, ratios)
    return {
        **_units(loss, None if chats else ratio),
        "tokens": sum(one.targets for one in texts.values()),
        "bytes": sum(size.bytes for size in sizes.values()),
        "corpora": each,
    }


def _units(loss: float, bytes_per_token: float | None) -> dict[str, float]:
    """Return a loss in several units; bits per byte only if all of a text is predicted."""
    bits = (
        {} if bytes_per_token is None else {"bits_per_byte": bits_per_byte(loss, bytes_per_token)}
    )
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), **bits}


def _baselines(
    target: EvalTarget, settings: EvalSettings, own: str | dict[str, str] | None
) -> dict[str, float]:
    """Return the run's own baselines if they are for the same targets."""
    length = settings.config.data.sequence_length
    same_text = own is not None and (own == target.trained_on or not settings.gives_text)
    if target.baselines is None or not same_text:
        return {}
    same = load_config(str(target.folder)).data.sequence_length == length
    return target.baselines if same else {}
