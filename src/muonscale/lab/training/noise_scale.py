"""The gradient noise scale: from which batch size on a larger batch stops paying for itself.

McCandlish et al., arXiv 1812.06162: B_simple = tr(Sigma) / |G|^2 (eq. 2.9), of the mean gradient G and
the covariance Sigma of the gradients of single examples, here tokens. Both are had from lengths of
gradients of two batch sizes (appendix A.1).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

DECAY = 0.95
"""What of the running averages stays when a step is measured: they are of about the last 20."""


class Estimate(NamedTuple):
    """What one step says, unbiased and noisy: either may be negative."""

    gradient_sq: float
    """|G|^2, the squared length of the mean gradient."""
    trace: float
    """tr(Sigma), the sum of the variances of the gradient of one token."""


def estimate(small_sq: float, big_sq: float, *, small: int, big: int) -> Estimate:
    """Return the estimates of squared lengths of gradients (McCandlish et al., appendix A.1).

    A gradient of B examples has the expected squared length |G|^2 + tr(Sigma) / B; two batch sizes
    give both terms. Gradients are means over their batch.

    Args:
        small_sq: squared length of the gradient of a small batch; the mean over several.
        big_sq: likewise of the big batch, which may be the small ones together.
        small: examples of a small batch.
        big: examples of the big batch, more than `small`.
    """
    return Estimate(
        (big * big_sq - small * small_sq) / (big - small),
        (small_sq - big_sq) * small * big / (big - small),
    )


@dataclass
class NoiseScale:
    """Running averages of a run. Part of its checkpoints, so that a resumed run measures alike.

    Numerator and denominator are averaged apart: the mean of their ratios would be biased, and has
    no bound where |G|^2 comes near zero. Both change in the course of a run, so that the averages
    forget; as they do so alike, their ratio needs no correction at the start.
    """

    gradient_sq: float = 0.0
    trace: float = 0.0

    def add(self, found: Estimate) -> None:
        """Take in the estimates of a step; ones that are not finite are left out."""
        if all(map(math.isfinite, found)):
            self.gradient_sq = DECAY * self.gradient_sq + (1 - DECAY) * found.gradient_sq
            self.trace = DECAY * self.trace + (1 - DECAY) * found.trace

    @property
    def scale(self) -> float | None:
        """The noise scale, in examples; None while an average is not positive."""
        known = self.gradient_sq > 0 and self.trace > 0
        return self.trace / self.gradient_sq if known else None

    def measure(self, small_sq: float, big_sq: float, *, small: int, big: int) -> dict[str, Any]:
        """Take in the squared lengths of a step, and return what its record says.

        Args:
            small_sq: mean squared length of the gradients of the parts of the batch.
            big_sq: squared length of the gradient of the batch.
            small: tokens of a part.
            big: tokens of the batch.

        Returns:
            gradient_sq and trace of this step, tokens_small, tokens_big, and the scale of the run so
            far in tokens, None where there is none.
        """
        found = estimate(small_sq, big_sq, small=small, big=big)
        self.add(found)
        return {
            **found._asdict(),
            "tokens_small": small,
            "tokens_big": big,
            "scale": self.scale,
        }

    def facts(self) -> dict[str, float]:
        """Return it as JSON."""
        return asdict(self)

    def restore(self, facts: dict[str, float] | None) -> None:
        """Take over what `facts` gave; nothing where a checkpoint has none."""
        self.gradient_sq, self.trace = 0.0, 0.0
        if facts:
            self.gradient_sq, self.trace = facts["gradient_sq"], facts["trace"]
