"""The held-out loss of a run, as a metrics record."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from muonscale.lab.evaluation.evaluate import bits_per_byte, held_out_loss
from muonscale.lab.training.setup import Run
from muonscale.lab.training.signals import StopRequest


def held_out_record(
    run: Run, *, sequences: int | None = None, stop: StopRequest | None = None
) -> dict[str, Any]:
    """Evaluate the model as it is now.

    Args:
        run: the run.
        sequences: held-out sequences to evaluate on, spread evenly; all when not given.
        stop: asked before every batch, so that a long evaluation can be left.

    Raises:
        Interrupted: if `stop` was asked to stop.
    """
    batches = run.batches.evaluation(sequences)
    loss, tokens = held_out_loss(
        run.state.model, _until_stopped(batches, stop) if stop else batches
    )
    return {
        "kind": "eval",
        "step": run.state.step,
        "tokens": run.state.step * run.config.train.batch_tokens,
        "held_out_loss": loss,
        "held_out_tokens": tokens,
        "bits_per_byte": bits_per_byte(loss, run.corpus.stats.held_out.bytes_per_token),
    }


def _until_stopped(batches: Iterator[np.ndarray], stop: StopRequest) -> Iterator[np.ndarray]:
    for batch in batches:
        stop.raise_if_asked("stopped in the final evaluation; all steps are saved: use --resume")
        yield batch
