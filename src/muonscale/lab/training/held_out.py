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
        sequences: held-out sequences to evaluate on, as many of every corpus, spread evenly; all
            when not given.

    Returns:
        The record, None if it was asked to stop. Its loss is that of the corpus, or the mean of
        those of several, weighted as the mixture.
    """
    each = None if sequences is None else max(1, sequences // len(run.corpora))
    losses: dict[str, float] = {}
    tokens = 0
    with run.state.forward.evaluation():
        for name in run.corpora:
            found = _summed(run, stop, name, each)
            if found is None:
                return None
            losses[name] = mean_loss(*found)
            tokens += int(found[1])
    loss = run.batches.mean(losses)
    return {
        "kind": "eval",
        "step": run.state.step,
        "tokens": run.config.timeline.tokens_before(run.state.step),
        "held_out_loss": loss,
        **({"held_out_losses": losses} if len(losses) > 1 else {}),
        "held_out_tokens": tokens,
        **_bits_per_byte(run, loss),
    }


def _bits_per_byte(run: Run, loss: float) -> dict[str, float]:
    """Return the loss per byte; nothing of chats, whose targets are not all of their text."""
    if run.config.data.has_chats:
        return {}
    bytes_per_token = run.batches.mean(
        {name: corpus.stats.held_out.bytes_per_token for name, corpus in run.corpora.items()}
    )
    return {"bits_per_byte": bits_per_byte(loss, bytes_per_token)}


def _summed(
    run: Run, stop: StopRequest, name: str, sequences: int | None
) -> tuple[float, float] | None:
    """Return the summed loss on a corpus over all ranks and its targets; None if asked to stop."""
    total, tokens = 0.0, 0
    for batch in run.batches.evaluation(name, sequences):
        if stop.asked() is not None:
            return None
        loss, number = _loss_of_share(run, batch)
        total, tokens = total + loss, tokens + number
    total, tokens = run.processes.sum(total, tokens)
    return total, tokens


def _loss_of_share(run: Run, batch: np.ndarray) -> tuple[float, int]:
    """Return the summed loss and the targets of this rank's sequences of a batch."""
    processes = run.processes
    share = batch[processes.data_rank :: processes.topology.data_ranks]
    # A rank without a sequence still takes part in the forward pass that others wait for.
    loss, number = summed_loss(
        run.state.forward.logits, share if len(share) else batch[:1], run.device
    )
    return (loss, number) if len(share) else (0.0, 0)
