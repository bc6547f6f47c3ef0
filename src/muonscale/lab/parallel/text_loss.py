"""The loss of a model on texts, measured by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muonscale.lab.data.tokens import Rows
from muonscale.lab.models.loss import mean_loss, row_losses
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes


@dataclass(frozen=True)
class TextLoss:
    """The loss of a model on a text."""

    loss: float
    """Nats per target."""
    targets: int
    standard_error: float | None
    """Of the loss, over its rows as independent draws; None for a single row."""


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
            moments = np.zeros(6)
            for batch in batches:
                if stopped():
                    return None
                share = batch[processes.data_rank :: processes.topology.data_ranks]
                # A rank without a row takes part in the forward pass that the others wait for.
                rows = share if len(share) else batch[:1]
                summed_B, targets_B = row_losses(forward.logits, rows, processes.device)
                if len(share):
                    moments += row_moments(summed_B, targets_B)
            losses[name] = text_loss(*processes.sum(*moments))
    return losses


def row_moments(summed_B: NDArray[np.float64], targets_B: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the sums over rows that `text_loss` takes, float64 `[6]`; they can be added up.

    Args:
        summed_B: summed loss of each row, nats.
        targets_B: targets of each row.
    """
    s, n = summed_B, targets_B.astype(np.float64)
    return np.array([s.sum(), n.sum(), len(s), s @ s, s @ n, n @ n])


def text_loss(s: float, n: float, rows: float, ss: float, sn: float, nn: float) -> TextLoss:
    """Return the mean loss of a text and its standard error from the sums of `row_moments`.

    The loss is a ratio of two sums over rows, since rows of chats have different numbers of
    targets: its standard error is that of the residuals s - loss * n (Cochran, Sampling Techniques,
    3rd edition, equation 6.10, without its correction for a finite population).

    Raises:
        DataError: if there are no targets.
    """
    loss = mean_loss(s, n)
    if rows < 2:
        return TextLoss(loss, int(n), None)
    residuals = max(0.0, ss - 2 * loss * sn + loss**2 * nn)
    return TextLoss(loss, int(n), math.sqrt(residuals * rows / (rows - 1)) / n)


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
