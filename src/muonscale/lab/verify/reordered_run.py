"""The same steps in one process with sums in other orders, which measures rounding.

A reordered run takes the sequences of every batch in another order, one at a time, and adds up
every matrix product in two parts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from muonscale.lab.config.load import Config
from muonscale.lab.training.setup import Run
from muonscale.lab.verify.trajectory import Trajectory, take_steps

aten = torch.ops.aten


@dataclass(frozen=True)
class Reordering:
    """One order of summation."""

    order: Callable[[np.ndarray], np.ndarray]
    """Reorders the sequences of a batch."""
    divisor: int
    """The first part of a sum of n terms has n // divisor of them."""


REORDERINGS = (
    Reordering(lambda batch: batch[::-1].copy(), 2),
    Reordering(lambda batch: np.concatenate([batch[1::2], batch[::2]]), 3),
)
"""Two, so that a sum that happens to round the same way in one of them does not lower the limit."""


def reordered_config(config: Config) -> Config:
    """Return a configuration that takes one sequence at a time through a model that is not
    compiled.

    `SplitSums` cannot reach compiled products, which have an order of their own anyway.
    """
    train = config.train.model_copy(
        update={"micro_batch_tokens": config.data.sequence_length, "compile": False}
    )
    return config.model_copy(update={"train": train})


def take_reordered_steps(run: Run, steps: int, reordering: Reordering) -> Trajectory:
    """Train a fresh run of one process, configured by `reordered_config`, with reordered sums."""
    with SplitSums(reordering.divisor):
        return take_steps(run, steps, lambda step: reordering.order(run.batches.at(step)))


class SplitSums(TorchDispatchMode):
    """Adds up every matrix product in two parts, as tensor parallelism on two ranks does.

    This applies to the forward and backward passes and to the optimizer. Another order of the
    sequences alone would not change a bit of the forward pass.

    Args:
        divisor: the first part of n terms has n // divisor of them.
    """

    def __init__(self, divisor: int) -> None:
        super().__init__()
        self._divisor = divisor

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Execute an operation."""
        added: tuple[Tensor, ...] = ()
        if func in (aten.addmm.default, aten.baddbmm.default) and not kwargs:
            added, args = args[:1], args[1:]
        elif func not in (aten.mm.default, aten.bmm.default):
            return func(*args, **(kwargs or {}))
        left, right = args
        number = left.shape[-1] // self._divisor
        if number == 0:
            return func(*added, left, right)
        first = func(*added, left[..., :number], right[..., :number, :])
        rest = left[..., number:], right[..., number:, :]
        return func(first, *rest) if added else first + func(*rest)
