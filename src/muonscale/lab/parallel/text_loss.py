"""The loss of a model on texts, measured by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from muonscale.lab.data.tokens import Rows
from muonscale.lab.models.loss import mean_loss, summed_loss
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes


@dataclass(frozen=True)
class TextLoss:
    """The loss of a model on a text."""

    loss: float
    """Nats per target."""
    targets: int


def losses_on(
    forward: Parallelized,
    texts: Mapping[str, Iterable[np.ndarray]],
    processes: Processes,
    *,
    stopped: Callable[[], bool] = lambda: False,
) -> dict[str, TextLoss] | None:
    """Return the loss on every text: a collective of all ranks, which share every batch.

    Args:
        forward: the model on this rank.
        texts: batches of rows, int64 `[B, L + 1]`, by name; the same on all ranks.
        processes: the processes of the run.
        stopped: checked before every batch, so that a long evaluation can be stopped; a collective.

    Returns:
        The losses by name; None if it was stopped.

    Raises:
        DataError: for a text without targets.
    """
    losses: dict[str, TextLoss] = {}
    with forward.evaluation():
        for name, batches in texts.items():
            total, targets = 0.0, 0
            for batch in batches:
                if stopped():
                    return None
                share = batch[processes.data_rank :: processes.topology.data_ranks]
                # A rank without a row takes part in the forward pass that the others wait for.
                rows = share if len(share) else batch[:1]
                loss, number = summed_loss(forward.logits, rows, processes.device)
                if len(share):
                    total, targets = total + loss, targets + number
            sums = processes.sum(total, targets)
            losses[name] = TextLoss(mean_loss(*sums), int(sums[1]))
    return losses


def batches_of(rows: Rows, batch_rows: int, *, at_most: int | None = None) -> Iterator[np.ndarray]:
    """Yield rows of a text in batches `[B, L + 1]`.

    Args:
        rows: rows of the text.
        batch_rows: rows of a batch.
        at_most: maximum number of rows, spread evenly over the text; all by default.
    """
    total = len(rows)
    count = total if at_most is None else max(1, min(at_most, total))
    indices = np.linspace(0, total - 1, count).round().astype(np.int64)
    for start in range(0, count, batch_rows):
        yield rows.batch(indices[start : start + batch_rows])


def weighted_mean(weights: Mapping[str, float], values: Mapping[str, float]) -> float:
    """Return the weighted mean of values by name. Weights sum to 1; those of 0 may be missing."""
    return sum(weight * values[name] for name, weight in weights.items() if weight)
