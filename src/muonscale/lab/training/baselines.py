"""The loss of n-gram models of the training corpus, to compare the model of a run with.

They are fitted on the corpus and not on what the run has read: a run of a few steps, or one that
starts from a trained model, would otherwise be compared with counts of a few batches. The losses
depend on the corpora alone, so that they are counted once and kept in the cache of the data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from muonscale.errors import MuonscaleError
from muonscale.lab.data.cache import cache_folder
from muonscale.lab.data.ngram import fit_ngrams
from muonscale.lab.files import read_object, write_json
from muonscale.lab.training.setup import Run
from muonscale.lab.training.signals import Interrupted, StopRequest

NGRAM_TOKENS = 50_000_000
"""Maximum number of training tokens that the n-gram models are fitted on."""

FORMAT = 1
"""Increased whenever the same corpora give other losses."""

KEYS = ("unigram_loss", "bigram_loss")


def ngram_baselines(run: Run, stop: StopRequest) -> dict[str, float]:
    """Return `unigram_loss` and `bigram_loss` on the validation split, in nats per token.

    The models are fitted on at most 50 million tokens of the training corpora, spread evenly over
    each and divided among them by their weights, whatever the run has read. Of a stream, the
    windows that the run does not read are left out.

    Raises:
        Interrupted: if this process was told to stop.
    """
    length = run.config.data.sequence_length
    facts: dict[str, Any] = {
        "format": FORMAT,
        "corpora": [
            (run.corpora[name].fingerprint, run.batches.weights[name]) for name in run.corpora
        ],
        "vocab_size": len(run.tokenizer),
        "sequence_length": length,
        "tokens": NGRAM_TOKENS,
    }
    if run.batches.streamed is not None:
        facts["rows"] = run.batches.sampled_rows
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = cache_folder(run.config.data.cache) / "ngrams" / f"{key[:32]}.json"
    if (known := _read(path)) is not None:
        return known
    run.console.log("fitting the n-gram baselines on the training corpus")

    def unless_stopped(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        for batch in batches:
            if stop.signum is not None:
                message = "stopped in the n-gram baselines; all steps are saved: use --resume"
                raise Interrupted(stop.signum, message)
            yield batch

    sample = run.batches.sample(at_most=NGRAM_TOKENS // length)
    ngrams = fit_ngrams(unless_stopped(sample), len(run.tokenizer))
    found = {
        key: run.batches.mean(
            {name: loss(unless_stopped(run.batches.evaluation(name))) for name in run.corpora}
        )
        for key, loss in zip(KEYS, (ngrams.unigram_loss, ngrams.bigram_loss), strict=True)
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found, shared=True)
    except OSError as error:
        run.console.warn(
            f"the n-gram baselines cannot be kept in {path}: {error.strerror or error}"
        )
    return found


def _read(path: Path) -> dict[str, float] | None:
    """Return the losses in a file, None if there are none that can be used."""
    try:
        found = read_object(path, "it is written again") or {}
    except MuonscaleError:
        return None
    usable = all(type(found.get(key)) is float for key in KEYS)
    return {key: found[key] for key in KEYS} if usable else None
