"""The held-out loss of a run, as a metrics record."""

from __future__ import annotations

from typing import Any

import numpy as np

from muonscale.lab.evaluation.evaluate import bits_per_byte, mean_loss, summed_loss
from muonscale.lab.training.setup import Run
from muonscale.lab.training.signals import StopRequest


def held_out_record(
    run: Run, stop: StopRequest, *, sequences: int | None = None
) -> dict[str, Any] | None:
    """Evaluate the model as it is now: a collective of all ranks, which share every batch.

    Args:
        run: the run.
        stop: asked before every batch, so that a long evaluation can be left.
        sequences: held-out sequences to evaluate on, spread evenly; all when not given.

    Returns:
        The record, None if it was asked to stop.
    """
    total, tokens = 0.0, 0
    with run.state.forward.evaluation():
        for batch in run.batches.evaluation(sequences):
            if stop.asked() is not None:
                return None
            loss, number = _loss_of_share(run, batch)
            total, tokens = total + loss, tokens + number
    sums = run.processes.sum(total, tokens)
    loss = mean_loss(*sums)
    return {
        "kind": "eval",
        "step": run.state.step,
        "tokens": run.state.step * run.config.train.batch_tokens,
        "held_out_loss": loss,
        "held_out_tokens": int(sums[1]),
        "bits_per_byte": bits_per_byte(loss, run.corpus.stats.held_out.bytes_per_token),
    }


def _loss_of_share(run: Run, batch: np.ndarray) -> tuple[float, int]:
    """Return the summed loss and the targets of this rank's sequences of a batch."""
    processes = run.processes
    share = batch[processes.data_rank :: processes.topology.data_ranks]
    # A rank without a sequence still takes part in the forward pass that others wait for.
    loss, number = summed_loss(
        run.state.forward.logits, share if len(share) else batch[:1], run.device
    )
    return (loss, number) if len(share) else (0.0, 0)
