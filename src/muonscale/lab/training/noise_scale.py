"""The gradient noise scale: the batch size above which a larger batch saves few steps.

McCandlish et al., arXiv 1812.06162: B_simple = tr(Sigma) / |G|^2 (eq. 2.9), for the mean gradient G
and the covariance Sigma of the gradients of single examples, here tokens. Both follow from the
gradient norms of two batch sizes (appendix A.1): here those of a micro-batch and of the whole
batch.
"""

from __future__ import annotations

import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import Topology
from muonscale.lab.training.gradients import gradient_norms

DECAY = 0.95
"""Decay of the running averages per measured step; they cover about the last 20."""


def check_noise_scale(config: Config, topology: Topology) -> None:
    """Check that `telemetry.noise_scale_every` can be measured.

    Raises:
        ConfigError: for chats, or for a batch that has one sequence per rank.
    """
    every = config.telemetry.noise_scale_every
    if every is None:
        return
    if config.data.has_chats:
        raise ConfigError(
            f"telemetry.noise_scale_every={every} with data.format=chat: the noise scale compares "
            "equal parts of a batch, and parts of chats have different numbers of targets; "
            "accepted: null"
        )
    length, ranks = config.data.sequence_length, topology.data_ranks
    for phase in config.timeline.phases:
        if phase.batch // ranks < 2:
            raise ConfigError(
                f"telemetry.noise_scale_every={every} compares parts of a rank's share of the "
                f"batch, and train.batch_tokens={phase.batch * length} is a single sequence of "
                f"{length} for each of {ranks} data-parallel ranks; accepted: null, or a larger "
                "batch"
            )


class NoiseEstimate(NamedTuple):
    """The estimate of one step. It is unbiased and noisy: either value may be negative."""

    gradient_sq: float
    """|G|^2, the squared norm of the mean gradient."""
    trace: float
    """tr(Sigma), the sum of the variances of the gradient of one token."""


def estimate_noise(small_sq: float, big_sq: float, *, small: int, big: int) -> NoiseEstimate:
    """Return the estimate from squared gradient norms (McCandlish et al., appendix A.1).

    The squared norm of a gradient of B examples has the expectation |G|^2 + tr(Sigma) / B, so two
    batch sizes give both terms. Gradients are means over their batch.

    Args:
        small_sq: squared norm of the gradient of a small batch, or the mean over several.
        big_sq: squared norm of the gradient of the big batch, which may be all the small ones.
        small: examples of a small batch.
        big: examples of the big batch, more than `small`.
    """
    return NoiseEstimate(
        (big * big_sq - small * small_sq) / (big - small),
        (small_sq - big_sq) * small * big / (big - small),
    )


@dataclass
class NoiseScale:
    """Running averages of a run. Checkpoints contain them, so that a resumed run continues them.

    Numerator and denominator are averaged separately: the mean of their ratios would be biased and
    unbounded where |G|^2 comes near zero. Both averages decay, since both quantities change during
    a run. They decay equally, so their ratio needs no correction at the start.
    """

    gradient_sq: float = 0.0
    trace: float = 0.0

    def add(self, estimate: NoiseEstimate) -> None:
        """Add the estimate of a step; one that is not finite is ignored."""
        if all(map(math.isfinite, estimate)):
            self.gradient_sq = DECAY * self.gradient_sq + (1 - DECAY) * estimate.gradient_sq
            self.trace = DECAY * self.trace + (1 - DECAY) * estimate.trace

    @property
    def scale(self) -> float | None:
        """The noise scale in examples; None while an average is not positive."""
        positive = self.gradient_sq > 0 and self.trace > 0
        return self.trace / self.gradient_sq if positive else None

    def measure(self, small_sq: float, big_sq: float, *, small: int, big: int) -> dict[str, Any]:
        """Add the squared gradient norms of a step and return the entry of its metrics record.

        Args:
            small_sq: mean squared norm of the gradients of the micro-batches.
            big_sq: squared norm of the gradient of the batch.
            small: tokens of a micro-batch.
            big: tokens of the batch.

        Returns:
            gradient_sq and trace of this step, tokens_small, tokens_big, and the scale of the run
            so far in tokens, or None.
        """
        estimate = estimate_noise(small_sq, big_sq, small=small, big=big)
        self.add(estimate)
        sizes = {"tokens_small": small, "tokens_big": big}
        return {**estimate._asdict(), **sizes, "scale": self.scale}


class MicroBatchNorms:
    """Measures the gradient norm of each micro-batch while gradients are accumulated.

    A micro-batch comprises the shares of all ranks. Measuring takes the memory of one more
    gradient.

    Args:
        optimizer: optimizer of the parameters.
        processes: the processes of the run.
    """

    def __init__(self, optimizer: Optimizer, processes: Processes) -> None:
        self._optimizer, self._processes = optimizer, processes
        self._squares: list[Tensor] = []

    @property
    def count(self) -> int:
        """Number of micro-batches measured."""
        return len(self._squares)

    @contextmanager
    def measure(self) -> Generator[None]:
        """Measure the gradient that the block computes, then add it to the earlier gradients.

        A collective of all ranks. The sum equals that of plain accumulation bit for bit.
        """
        earlier: list[tuple[Tensor, Tensor]] = []
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # A copy: DDP writes every gradient to the same place.
                    earlier.append((parameter, parameter.grad.clone()))
                    parameter.grad = None
        yield
        norms = gradient_norms(self._optimizer, self._processes)
        self._squares.append(torch.stack(list(norms.values())).double().square().sum())
        for parameter, gradient in earlier:
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)

    def mean_square(self) -> float:
        """Return the mean squared norm of the gradients of the micro-batches' own mean losses.

        What was measured of a micro-batch is its contribution to the mean over all of them, which
        is smaller by their number.
        """
        return float(torch.stack(self._squares).mean()) * self.count**2
