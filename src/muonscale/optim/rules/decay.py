"""Decoupled weight decay: how much, and of what.

Letters: W weight, U a tensor with the sign of the update.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def decay_rate(group: Mapping[str, Any]) -> float:
    """Return the part of a weight that one step takes away, from the options of its group.

    | decay       | rate                  |                                                          |
    |-------------|-----------------------|----------------------------------------------------------|
    | coupled     | lr * wd               | as in torch.optim.AdamW                                  |
    | independent | wd * lr / peak_lr     | Loshchilov and Hutter, Decoupled Weight Decay            |
    |             |                       | Regularization, arXiv 1711.05101, algorithm 2: `wd` times|
    |             |                       | the schedule's multiplier                                |

    `peak_lr` is the learning rate that the group was added with. (torch's `initial_lr` is not: under
    OneCycleLR it is the learning rate that the warm-up starts from.)
    """
    lr, weight_decay = float(group["lr"]), float(group["weight_decay"])
    if group["decay"] == "coupled":
        return lr * weight_decay
    return weight_decay * lr / float(group["peak_lr"])


def decay_(W: list[Tensor], U: list[Tensor], rate: float, *, cautious: bool) -> None:
    """Write `W <- (1 - rate)*W`; if `cautious` only where `W*U >= 0`, where the update agrees.

    Args:
        W: weights, in the dtype of `U`.
        U: what is about to be subtracted, or anything of its sign; not written to.
        rate: from `decay_rate`.
        cautious: leave alone what the update is about to lengthen.

    References:
        Chen et al., Cautious Weight Decay, arXiv 2510.12402, algorithm 1.
    """
    if not cautious:
        torch._foreach_mul_(W, 1 - rate)
        return
    agreeing = [product.ge_(0) for product in torch._foreach_mul(W, U)]
    torch._foreach_addcmul_(W, list(W), agreeing, value=-rate)
