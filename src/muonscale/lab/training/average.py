"""The average of the weights over the last part of a run, beside the weights themselves.

A learning rate that is still high leaves weights that jump around a better point; their average is
nearer to it. `ema` is an exponential moving average from a point of the run on (the tail EMA of the
modded-nanogpt optimization track); in `mean` all weights since then count the same (Izmailov et
al., arXiv 1803.05407), every `average_every` steps: with the interval of the checkpoints it is
their mean (LAWA, Kaddour, arXiv 2209.14981).
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.optim.distributed.dtensor import to_local


class WeightAverage:
    """An average of the trainable parameters: float32, sharded as they are."""

    def __init__(
        self, model: nn.Module, *, decay: float | None, first: int, every: int = 1
    ) -> None:
        """Average a model's parameters.

        Args:
            model: its trainable parameters are averaged; buffers are not.
            decay: weight of the average before an update, or None for the mean.
            first: number of steps after which the average begins, with a copy of the weights.
            every: steps between updates.
        """
        self._model, self._decay = model, decay
        self._first, self._every = first, every
        self.count = 0
        """Updates so far."""
        self.tensors: dict[str, Tensor] = {}
        """The average by name of the parameter; empty before the first update."""

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((n, p) for n, p in self._model.named_parameters() if p.requires_grad)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after a number of steps, if they are due."""
        if step < self._first or (step - self._first) % self._every:
            return
        if not self.count:
            self.allocate()
        self.count += 1
        new = 1 / self.count if self._decay is None or self.count == 1 else 1 - self._decay
        for name, parameter in self._parameters():
            to_local(self.tensors[name]).lerp_(to_local(parameter).float(), new)

    def allocate(self) -> None:
        """Make room for the average, as it is before its first update or before it is restored."""
        self.tensors = {
            name: torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            for name, parameter in self._parameters()
        }

    @contextmanager
    @torch.no_grad()
    def in_place(self) -> Generator[None]:
        """Put the average into the model, and the weights back at the end."""
        weights = {name: to_local(p).clone() for name, p in self._parameters()}
        for name, parameter in self._parameters():
            to_local(parameter).copy_(to_local(self.tensors[name]))
        try:
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters():
                    to_local(parameter).copy_(weights[name])


def first_average(config: Config) -> int:
    """Return the number of steps after which `train.average` begins."""
    return max(1, config.timeline.step_at(config.train.average_from))


def build_average(model: nn.Module, config: Config) -> WeightAverage | None:
    """Return the average that `train.average` asks for, None if it asks for none.

    Raises:
        ConfigError: if it would begin after the last step.
    """
    section = config.train
    if section.average is None:
        return None
    first = first_average(config)
    if first >= config.steps:
        raise ConfigError(
            f"train.average_from={section.average_from:g} is step {first}, and the run has "
            f"{config.steps}; give an earlier point"
        )
    decay = section.average_decay if section.average == "ema" else None
    return WeightAverage(model, decay=decay, first=first, every=section.average_every)
