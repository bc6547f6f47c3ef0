"""The matrix products of Newton-Schulz, and the choice of one for a device.

- `torch`: products by torch's own kernels, on any device.
- `cpu`: symmetric products by panels, and one thread per matrix.

A new kernel is a module here, a branch in `symmetric_product`, and its operations in
`muonscale.optim.newton_schulz.flops`, which decide between the direct and the Gram form.
"""

from __future__ import annotations

import functools
from typing import Protocol

import torch
from torch import Tensor

from muonscale.optim.newton_schulz.kernels.cpu import panel_product_, panel_rows
from muonscale.optim.newton_schulz.kernels.torch import product_


class Product(Protocol):
    """A matrix product, see `product_`."""

    def __call__(
        self,
        out: Tensor,
        left: Tensor,
        right: Tensor,
        *,
        bias: Tensor | None = None,
        beta: float = 0.0,
        alpha: float = 1.0,
    ) -> None:
        """Write `beta * bias + alpha * left @ right` into `out`."""
        ...


def symmetric_product(
    side: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[Product, int]:
    """Return the product for symmetric results of `side` rows, and the rows of its panels.

    The plain product has one panel of all rows.
    """
    panel = panel_rows(side, dtype, device)
    if panel < side:
        return functools.partial(panel_product_, panel=panel), panel
    return product_, panel
