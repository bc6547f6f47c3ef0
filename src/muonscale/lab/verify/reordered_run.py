"""The same steps in one process with the sums in other orders: how much rounding alone comes to.

A twin takes the sequences of every batch in another order, one at a time, and adds up every matrix
product in two parts.
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
class Twin:
    """One way to add up."""

    order: Callable[[np.ndarray], np.ndarray]
    """Of the sequences of a batch."""
    divisor: int
    """The first part of a sum of n terms has n // divisor of them."""


TWINS = (
    Twin(lambda batch: batch[::-1].copy(), 2),
    Twin(lambda batch: np.concatenate([batch[1::2], batch[::2]]), 3),
)
"""Two, so that a sum that happens to round alike in one of them does not lower the limit."""


def twin_config(config: Config) -> Config:
    """Return a configuration that takes one sequence at a time through a model that is not compiled.

    Compiled products are out of reach of `SumsInParts`, and sum in an order of their own anyway.
    """
    train = config.train.model_copy(
        update={"micro_batch_tokens": config.data.sequence_length, "compile": False}
    )
    return config.model_copy(update={"train": train})


def take_twin_steps(run: Run, steps: int, twin: Twin) -> Trajectory:
    """Train a fresh run of one process, configured by `twin_config`, as a twin."""
    with SumsInParts(twin.divisor):
        return take_steps(run, steps, lambda step: twin.order(run.batches.at(step)))


class SumsInParts(TorchDispatchMode):
    """Adds up every matrix product in two parts, as tensor parallelism on two ranks does.

    Forward, backward and in the optimizer. Another order of the sequences alone would leave the
    forward pass as it is to the last bit.

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
        """Carry out an operation."""
        if func in (aten.mm.default, aten.bmm.default):
            return self._product(func, *args)
        if func in (aten.addmm.default, aten.baddbmm.default) and not kwargs:
            return self._added(func, *args)
        return func(*args, **(kwargs or {}))

    def _product(self, func: Any, left: Tensor, right: Tensor) -> Tensor:
        (left_1, right_1), rest = self._parts(left, right)
        first = func(left_1, right_1)
        return first if rest is None else first + func(*rest)

    def _added(self, func: Any, added: Tensor, left: Tensor, right: Tensor) -> Tensor:
        (left_1, right_1), rest = self._parts(left, right)
        first = func(added, left_1, right_1)
        return first if rest is None else func(first, *rest)

    def _parts(
        self, left: Tensor, right: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
        number = left.shape[-1] // self._divisor
        if number == 0:
            return (left, right), None
        first = left[..., :number], right[..., :number, :]
        return first, (left[..., number:], right[..., number:, :])
