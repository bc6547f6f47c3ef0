"""The loss of a model on texts, measured by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
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
    standard_error: float | None = None
    """Of the loss, over documents; None if it is not asked for, or there is one document."""


def losses_on(
    forward: Parallelized,
    texts: Mapping[str, Iterable[np.ndarray]],
    processes: Processes,
    *,
    stopped: Callable[[], bool] = lambda: False,
    document_start: int | None = None,
) -> dict[str, TextLoss] | None:
    """Return the loss on every text: a collective of all ranks, which share every batch.

    Args:
        forward: the model on this rank.
        texts: batches of rows, int64 `[B, L + 1]`, by name; the same on all ranks.
        processes: the processes of the run.
        stopped: checked before every batch, so that a long evaluation can be stopped; a collective.
        document_start: token before every document, for standard errors. The batches are then all
            rows of each text, in order and without loss masks.

    Returns:
        The losses by name; None if it was stopped.

    Raises:
        DataError: for a text without targets.
    """
    losses: dict[str, TextLoss] = {}
    rank, ranks = processes.data_rank, processes.topology.data_ranks
    with forward.evaluation():
        for name, batches in texts.items():
            measured, starts = [np.zeros((2, 0))], [np.zeros((2, 0), np.int64)]
            for batch in batches:
                if stopped():
                    return None
                share = batch[rank::ranks]
                # A rank without a row takes part in the forward pass that the others wait for.
                rows = share if len(share) else batch[:1]
                values_2B = np.stack(row_losses(forward.logits, rows, processes.device))
                own_2B = np.zeros((2, len(batch)))  # 0 for rows of other ranks
                own_2B[:, rank::ranks] = values_2B[:, : len(share)]
                measured.append(own_2B)
                if document_start is not None:
                    begins_BL = batch[:, :-1] == document_start
                    starts.append(np.stack([begins_BL[:, 0], begins_BL.sum(1)]))
            own_2R = torch.from_numpy(np.concatenate(measured, 1)).to(processes.device)
            summed_R, targets_R = processes.sum_tensor(own_2R).cpu().numpy()
            loss = mean_loss(float(summed_R.sum()), float(targets_R.sum()))
            error = None
            if document_start is not None:
                at_first_R, in_row_R = np.concatenate(starts, 1)
                document_R = np.cumsum(in_row_R) - in_row_R + at_first_R
                error = standard_error(summed_R, targets_R, document_R)
            losses[name] = TextLoss(loss, int(targets_R.sum()), error)
    return losses


def standard_error(
    summed_R: NDArray[np.float64], targets_R: NDArray[np.float64], document_R: NDArray[np.int64]
) -> float | None:
    """Return the standard error of the loss per target over documents; None for one document.

    A split is drawn by documents, and the rows of one document resemble each other: over rows as
    independent draws the error would be far too small. The loss is the ratio of two sums over
    documents, so the error is that of the residuals (Cochran, Sampling Techniques, 3rd edition,
    equation 6.10, without its correction for a finite population).

    Args:
        summed_R: summed loss of each row, nats.
        targets_R: targets of each row.
        document_R: number of the document that each row begins in.
    """
    loss = summed_R.sum() / targets_R.sum()
    _, inverse_R = np.unique(document_R, return_inverse=True)
    residuals = np.bincount(inverse_R, summed_R - loss * targets_R)
    count = len(residuals)
    if count < 2:
        return None
    return math.sqrt(float(residuals @ residuals) * count / (count - 1)) / float(targets_R.sum())


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
