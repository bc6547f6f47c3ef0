"""Constraints of the weight after an update: a fixed norm, a braked one, magnitudes of rows.

A *constraint* replaces `W <- W - lr*U` by `W <- keep*W - move*U` with two numbers for each logical
matrix. They follow from three sums over the matrix (`MatrixSums`), so a sharded matrix needs one
all-reduce of three numbers and no part of another rank.

`W` is the weight after weight decay. A constraint by rows is in `row_magnitude`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from muonscale.optim.options import row_of


@dataclass(frozen=True)
class MatrixSums:
    """Sums over the elements of logical matrices, `[matrices]` each."""

    weight: Tensor
    """Of `W*W`."""
    update: Tensor
    """Of `U*U`."""
    product: Tensor
    """Of `W*U`."""


Factors = Callable[[MatrixSums, Mapping[str, Any]], tuple[Tensor, Tensor]]
"""From the sums and the options of a group to (keep, move), `[matrices]` each."""


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """One row of `CONSTRAINTS`."""

    factors: Factors | None
    """None if it has two numbers for each row: see `muonscale.optim.rules.row_magnitude`."""
    keeps_norm: bool = False
    """Whether the norm of a matrix never changes. There is then no weight decay."""
    source: str

    @property
    def by_rows(self) -> bool:
        """Whether it works on rows, and trains their magnitudes by a gradient of their own."""
        return self.factors is None


def _fixed_norm(sums: MatrixSums, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`W <- ||W|| * V/||V||` with `V = W - lr*||W||*U/||U||`: lr is about the angle of the step.

    A matrix of zeros has no direction to keep, and a zero update none to go.
    """
    norm = sums.weight.sqrt()
    step = float(group["lr"]) * norm * _inverse(sums.update.sqrt())
    length = (sums.weight - 2 * step * sums.product + step * step * sums.update).sqrt()
    keep = (norm * _inverse(length)).masked_fill(norm == 0, 1.0)
    return keep, keep * step


def _brake(sums: MatrixSums, group: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """`W <- V/||V|| * (||W|| + s*(||V|| - ||W||))` with `V = W - lr*U`.

    s is `outward_scale` where the norm grows, else 1.
    """
    lr, outward = float(group["lr"]), float(group["outward_scale"])
    norm = sums.weight.sqrt()
    square = sums.weight - 2 * lr * sums.product + lr * lr * sums.update
    length = square.clamp_min(0.0).sqrt()
    target = length.minimum(norm + outward * (length - norm))
    keep = (target * _inverse(length)).masked_fill(length == 0, 1.0)
    return keep, keep * lr


def _inverse(lengths: Tensor) -> Tensor:
    """Return `1/lengths`, and 0 for 0."""
    return lengths.masked_fill(lengths == 0, 1.0).reciprocal().masked_fill(lengths == 0, 0.0)


CONSTRAINTS: dict[str, Constraint] = {
    "weight_norm": Constraint(
        factors=_fixed_norm,
        keeps_norm=True,
        source="Hyperball, arXiv 2606.16899; KellerJordan/modded-nanogpt, track 3, MuonH",
    ),
    "radial_brake": Constraint(
        factors=_brake,
        source="NVIDIA Emerging-Optimizers, RadialBrakeHook; KellerJordan/modded-nanogpt, track 3",
    ),
    "row_magnitude": Constraint(
        factors=None, source="Lion et al., Muown, arXiv 2605.10797; kcc-lion/muown"
    ),
}
"""Every constraint.

A new one is a row here, its name in `muonscale.optim.options.ConstraintT`, and a branch in
`muonscale.optim.rules.reference`.
"""


def resolve_constraint(name: str | None) -> Constraint | None:
    """Return the row of `CONSTRAINTS` called `name`, or None for None.

    Raises:
        ConfigError: for an unknown name.
    """
    return row_of("constraint", name, CONSTRAINTS)
