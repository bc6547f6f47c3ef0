"""Gradients of parts of a batch, measured one by one while they are accumulated."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.optim import Optimizer

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import Topology
from muonscale.lab.training.gradients import gradient_norms


def check_parts(config: Config, topology: Topology) -> None:
    """Refuse `telemetry.noise_scale_every` where batches have no parts that could be compared.

    Raises:
        ConfigError: naming what stands against it.
    """
    every = config.telemetry.noise_scale_every
    if every is None:
        return
    if config.data.has_chats:
        raise ConfigError(
            f"telemetry.noise_scale_every={every} with data.format=chat: parts of a batch have "
            "different numbers of targets, and the noise scale is of equal parts; accepted: null"
        )
    length, ranks = config.data.sequence_length, topology.data_ranks
    for phase in config.timeline.phases:
        if phase.batch // ranks < 2:
            raise ConfigError(
                f"telemetry.noise_scale_every={every} compares parts of a rank's share of the batch, "
                f"and train.batch_tokens={phase.batch * length} is a single sequence of {length} for "
                f"each of {ranks} data-parallel ranks; accepted: null, or a larger batch"
            )


def part_size(sequences: int, micro_batch: int) -> int:
    """Return the sequences of a part: of a micro-batch, or of half of the only one.

    What has no half has thirds, or the next larger equal parts there are.

    Args:
        sequences: of a rank's share of the batch, at least 2.
        micro_batch: a divisor of them.
    """
    if micro_batch < sequences:
        return micro_batch
    return next(size for size in range(sequences // 2, 0, -1) if sequences % size == 0)


class PartLengths:
    """Measures the gradients of the parts of one batch.

    A part is what all ranks have of it, in whatever way they hold its gradient. It takes the memory
    of one more gradient, as the ranks hold it.

    Args:
        optimizer: of the parameters.
        processes: this one and the others.
    """

    def __init__(self, optimizer: Optimizer, processes: Processes) -> None:
        self._optimizer, self._processes = optimizer, processes
        self._squares: list[Tensor] = []

    @property
    def count(self) -> int:
        """How many parts there were."""
        return len(self._squares)

    @contextmanager
    def apart(self) -> Generator[None]:
        """Keep the gradient made in this block apart from what was there, measure it, and add both.

        A collective of all ranks. The sum is bit for bit what accumulating would have made of them.
        """
        before = self._set_aside()
        yield
        norms = gradient_norms(self._optimizer, self._processes)
        self._squares.append(torch.stack(list(norms.values())).double().square().sum())
        for parameter, former in before:
            if parameter.grad is None:
                parameter.grad = former
            else:
                parameter.grad.add_(former)

    def _set_aside(self) -> list[tuple[Tensor, Tensor]]:
        before = []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # A copy: DDP writes every gradient to the same place.
                    before.append((parameter, parameter.grad.clone()))
                    parameter.grad = None
        return before

    def mean_square(self) -> float:
        """Return the mean over the parts of the squared length of their gradients.

        Of each it is the gradient of its own mean loss, where what was measured is its share in the
        mean over all parts.
        """
        return float(torch.stack(self._squares).mean()) * self.count**2
