"""The loss of a model on one text or several, as all ranks measure it together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from muonscale.lab.data.tokens import Rows
from muonscale.lab.models.loss import mean_loss, summed_loss

if TYPE_CHECKING:
    from muonscale.lab.parallel.forward import Parallelized
    from muonscale.lab.parallel.processes import Processes


@dataclass(frozen=True)
class TextLoss:
    """What a model came to on a text."""

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
        forward: the model as this rank has it.
        texts: batches of rows, int64 `[B, L + 1]`, by name; the same on all ranks.
        processes: this one and the others.
        stopped: asked before every batch, so that a long evaluation can be left; a collective.

    Returns:
        The losses by name; None if it was stopped.

    Raises:
        DataError: for a text without targets.
    """
    found: dict[str, TextLoss] = {}
    with forward.evaluation():
        for name, batches in texts.items():
            total, targets = 0.0, 0
            for batch in batches:
                if stopped():
                    return None
                loss, number = _loss_of_share(forward, batch, processes)
                total, targets = total + loss, targets + number
            sums = processes.sum(total, targets)
            found[name] = TextLoss(mean_loss(*sums), int(sums[1]))
    return found


def batches_of(rows: Rows, batch_rows: int, *, at_most: int | None = None) -> Iterator[np.ndarray]:
    """Yield rows of a text in batches `[B, L + 1]`.

    Args:
        rows: of the text.
        batch_rows: rows of a batch.
        at_most: so many of them, spread evenly over the text; all when not given.
    """
    total = len(rows)
    count = total if at_most is None else max(1, min(at_most, total))
    indices = np.linspace(0, total - 1, count).round().astype(np.int64)
    for start in range(0, count, batch_rows):
        yield rows.batch(indices[start : start + batch_rows])


def weighted_mean(weights: Mapping[str, float], values: Mapping[str, float]) -> float:
    """Return the mean of figures by name; weights sum to 1, and what weighs nothing may be missing."""
    return sum(weight * values[name] for name, weight in weights.items() if weight)


def _loss_of_share(
    forward: Parallelized, batch: np.ndarray, processes: Processes
) -> tuple[float, int]:
    """Return the summed loss and the targets of this rank's rows of a batch."""
    share = batch[processes.data_rank :: processes.topology.data_ranks]
    # A rank without a sequence still takes part in the forward pass that others wait for.
    loss, number = summed_loss(forward.logits, share if len(share) else batch[:1], processes.device)
    return (loss, number) if len(share) else (0.0, 0)
