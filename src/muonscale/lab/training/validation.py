"""The validation loss of a run, as a metrics record."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from muonscale.lab.models.loss import bits_per_byte
from muonscale.lab.parallel.text_loss import TextLoss, losses_on
from muonscale.lab.training.setup import Run
from muonscale.lab.training.signals import StopRequest


def measure_validation(
    run: Run,
    stop: StopRequest,
    *,
    sequences: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any] | None:
    """Measure the validation loss of the model: a collective of all ranks, which share every batch.

    Args:
        run: the run.
        stop: checked before every batch, so that a long evaluation can be stopped.
        sequences: sequences to evaluate on, divided equally among the corpora and spread evenly
            over each; all by default.
        report: called with the number of sequences that are done, and of all.

    Returns:
        The record, or None if a stop was requested. Its loss is that of the corpus, or the mean
        over several, weighted as the mixture; on the whole split of plain text,
        `validation_loss_se` is its standard error over documents. Chats have no bits per byte,
        since not all of their text is a target.
    """
    each = None if sequences is None else max(1, sequences // len(run.corpora))
    whole = sequences is None and not run.config.data.has_chats
    start = run.tokenizer.bos_token_id if whole else None
    total = sum(min(each or len(rows), len(rows)) for rows in run.batches.validation.values())
    done = 0

    def counted(batches: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        nonlocal done
        for batch in batches:
            report(done, total)
            yield batch
            done += len(batch)
        report(done, total)

    def measure() -> dict[str, TextLoss] | None:
        nonlocal done
        done = 0
        return losses_on(
            run.state.forward,
            {name: counted(run.batches.evaluation(name, each)) for name in run.corpora},
            run.processes,
            stopped=lambda: stop.requested() is not None,
            document_start=start,
        )

    results = measure()
    if results is None:
        return None
    losses = {name: each.loss for name, each in results.items()}
    errors = {name: each.standard_error for name, each in results.items()}
    loss = run.batches.mean(losses)
    record = {
        "kind": "eval",
        "step": run.state.step,
        "tokens": run.config.timeline.tokens_before(run.state.step),
        "validation_loss": loss,
        **({} if start is None else {"validation_loss_se": run.batches.mean_error(errors)}),
        **({"validation_losses": losses} if len(losses) > 1 else {}),
        "validation_tokens": sum(each.targets for each in results.values()),
    }
    average = run.state.average
    if average is not None and average.count:
        with average.in_place():
            averaged = measure()
        if averaged is None:
            return None
        record["average_validation_loss"] = run.batches.mean(
            {name: each.loss for name, each in averaged.items()}
        )
    if not run.config.data.has_chats:
        bytes_per_token = run.batches.mean(
            {name: corpus.stats.validation.bytes_per_token for name, corpus in run.corpora.items()}
        )
        record["bits_per_byte"] = bits_per_byte(loss, bytes_per_token)
    return record
