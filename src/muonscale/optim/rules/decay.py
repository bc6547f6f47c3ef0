"""Decoupled weight decay: how much, and of what.

Letters: W weight, U a tensor with the sign of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonscale.optim.rules.nonfinite import number_if, zero_unless_


@dataclass(frozen=True, kw_only=True)
class Decay:
    """One row of `DECAYS`."""

    rate: Callable[[float, float, float], float]
    """The part of a weight that one step subtracts, from lr, weight_decay and peak_lr."""
    source: str


DECAYS: dict[str, Decay] = {
    "coupled": Decay(
        rate=lambda lr, weight_decay, peak_lr: lr * weight_decay, source="torch.optim.AdamW"
    ),
    "independent": Decay(
        rate=lambda lr, weight_decay, peak_lr: weight_decay * lr / peak_lr,
        source="Loshchilov and Hutter, Decoupled Weight Decay Regularization, arXiv 1711.05101, "
        "algorithm 2: weight_decay times the multiplier of the schedule",
    ),
}
"""Every way to couple weight decay with the learning rate."""


def decay_rate(group: Mapping[str, Any]) -> float:
    """Return the part of a weight that one step subtracts, from the options of its group.

    `peak_lr` is the learning rate that the group was added with. (torch's `initial_lr` is not:
    under OneCycleLR it is the learning rate at which the warm-up starts.)
    """
    decay = DECAYS[group["decay"]]
    return decay.rate(float(group["lr"]), float(group["weight_decay"]), float(group["peak_lr"]))


def decay_(
    W: list[Tensor],
    U: list[Tensor],
    rate: float,
    *,
    cautious: bool,
    mask: Tensor | None = None,
) -> None:
    """Write `W <- (1 - rate)*W`; if `cautious`, only where `W*U >= 0`: decay and update agree.

    Args:
        W: weights, in the dtype of `U`.
        U: the update, or any tensor with its sign; not written to.
        rate: from `decay_rate`.
        cautious: do not decay elements whose magnitude the update increases.
        mask: 0-D bool; false leaves `W` as it is. None counts as true.

    References:
        Chen et al., Cautious Weight Decay, arXiv 2510.12402, algorithm 1.
    """
    if not cautious:
        torch._foreach_mul_(W, number_if(mask, 1 - rate, 1.0, W))
        return
    agreeing = list(torch._foreach_mul(W, U))  # 1 where the product is not negative, else 0
    torch._foreach_sign_(agreeing)
    torch._foreach_add_(agreeing, 1.0)
    torch._foreach_clamp_max_(agreeing, 1.0)
    zero_unless_(mask, agreeing)
    torch._foreach_addcmul_(W, list(W), agreeing, value=-rate)
