"""The matrix products of Newton-Schulz, and the choice of one for a device.

- `torch`: products by torch's own kernels, on any device.
- `cpu`: symmetric products by panels, and one thread per matrix.
- `triton`: symmetric products of half the tiles, on CUDA; imported when it is asked for.

A new kernel is a module here, a branch in `symmetric_product`, and its operations in
`muonscale.optim.newton_schulz.flops`, which decide between the direct and the Gram form.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Protocol

import torch
from torch import Tensor, bfloat16, float16

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.kernels.cpu import panel_product_, panel_rows
from muonscale.optim.newton_schulz.kernels.torch import product_

TILE = 64
"""Rows and columns of a tile of the Triton kernel. An assumption; not measured on a GPU."""

LARGEST_SIDE = 2**20
"""Largest side of a matrix for the Triton kernel: its tiles are counted in 32 bits."""


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


def taken_kernel(kernel: str) -> str:
    """Return the kernel that an option takes: "auto" is "torch", with panels on a CPU.

    The Triton kernel has not been measured on a GPU, so "auto" does not take it yet.
    """
    return "torch" if kernel == "auto" else kernel


def rows_of_panel(
    side: int, dtype: torch.dtype, device: torch.device | str, kernel: str = "auto"
) -> int:
    """Return the rows of a panel, or of a tile, of symmetric products of `side`; see `cpu`."""
    if taken_kernel(kernel) == "triton":
        return TILE
    return panel_rows(side, dtype, device)


def symmetric_product(
    side: int, dtype: torch.dtype, device: torch.device | str, kernel: str = "auto"
) -> tuple[Product, int]:
    """Return the product for symmetric results of `side` rows, and the rows of its panels.

    The plain product has one panel of all rows.

    Raises:
        ConfigError: if the kernel is "triton" and cannot run.
    """
    panel = rows_of_panel(side, dtype, device, kernel)
    if taken_kernel(kernel) == "triton":
        return _triton_product(side, dtype, device), panel
    if panel < side:
        return functools.partial(panel_product_, panel=panel), panel
    return product_, panel


def _triton_product(side: int, dtype: torch.dtype, device: torch.device | str) -> Product:
    """Return the product of `kernels.triton`.

    Raises:
        ConfigError: if Triton is not installed, or cannot run on such matrices.
    """
    if importlib.util.find_spec("triton") is None:
        raise ConfigError(
            f"ns_kernel is 'triton', but Triton is not installed for {sys.executable}: run `pip "
            "install triton`, or give 'torch'"
        )
    if dtype not in (
        bfloat16,
        float16,
    ):  # not torch.bfloat16: here torch is the module kernels.torch
        raise ConfigError(
            f"ns_kernel is 'triton', whose products are in bfloat16 or float16, and ns_dtype is "
            f"{str(dtype).removeprefix('torch.')}: give ns_dtype='bfloat16', or ns_kernel='torch'"
        )
    if side > LARGEST_SIDE:
        raise ConfigError(
            f"ns_kernel is 'triton', and a matrix has at least {side} rows and columns: it takes "
            f"at most {LARGEST_SIDE}; give 'torch'"
        )
    from muonscale.optim.newton_schulz.kernels.triton import is_interpreted, triton_product_

    if not str(device).startswith("cuda") and not is_interpreted():
        raise ConfigError(
            f"ns_kernel is 'triton', and the matrices are on {device}: it runs on CUDA, and "
            "elsewhere only in Triton's interpreter (TRITON_INTERPRET=1); give 'torch'"
        )
    return triton_product_
