"""The held-out loss of a run, as a metrics record."""

from __future__ import annotations

from typing import Any

from muonscale.lab.models.loss import bits_per_byte
from muonscale.lab.parallel.text_loss import losses_on
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
    found = losses_on(
        run.state.forward,
        {name: run.batches.evaluation(name, each) for name in run.corpora},
        run.processes,
        stopped=lambda: stop.asked() is not None,
    )
    if found is None:
        return None
    losses = {name: each.loss for name, each in found.items()}
    loss = run.batches.mean(losses)
    return {
        "kind": "eval",
        "step": run.state.step,
        "tokens": run.config.timeline.tokens_before(run.state.step),
        "held_out_loss": loss,
        **({"held_out_losses": losses} if len(losses) > 1 else {}),
        "held_out_tokens": sum(each.targets for each in found.values()),
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
