"""Faster Newton-Schulz on a CPU: symmetric products by panels, and one thread per matrix.

`X @ X.T` is symmetric, and so is the product of two polynomials of one symmetric matrix. Row panel
i of such a product is computed only up to the end of panel i, and the rest is mirrored. With p
panels that is (p + 1) / (2p) of the multiplications.

If one core updates a matrix, the matrix stays in its cache. If all cores share every product, each
core reads what others have just written. Measured: EXPERIMENTS.md, "A core per matrix".

Shapes: N matrices, S side of the product, K contracted side.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from torch import Tensor

from muonscale.optim.newton_schulz.kernels.torch import product_

T = TypeVar("T")

PANEL_ROWS = 128
"""Rows of a panel. Measured: EXPERIMENTS.md, "Symmetric products by panels"."""

ROW_GAP_BYTES = 64
"""Unused bytes between rows. Same measurement."""

SMALLEST_SIDE: dict[torch.dtype, int] = {torch.float32: 256, torch.float64: 256}
"""Smallest side for which panels are faster on a CPU. Same measurement."""
SMALLEST_SIDE_IN_16_BITS = 512
"""The same in 16 bits, where products are faster but mirroring is not."""


def panel_rows(side: int, dtype: torch.dtype, device: torch.device | str) -> int:
    """Return the rows per panel for a product of `side`: all rows if panels are not faster.

    Panels have been tried only on a CPU.
    """
    faster = side >= SMALLEST_SIDE.get(dtype, SMALLEST_SIDE_IN_16_BITS)
    return PANEL_ROWS if faster and torch.device(device).type == "cpu" else max(side, 1)


def empty_squares(like: Tensor, count: int, side: int, panel: int) -> Tensor:
    """Return an uninitialized `[count, side, side]` with the dtype and device of `like`.

    For panels a cache line separates the rows. Otherwise rows whose length is a power of two would
    compete for the same few cache lines while a block is mirrored.
    """
    gap = ROW_GAP_BYTES // like.dtype.itemsize if panel < side else 0
    return like.new_empty(count, side, side + gap)[..., :side]


def symmetric_flops(side: int, contracted: int, panel: int) -> int:
    """Return the floating-point operations of one symmetric product with panels of `panel` rows.

    Examples:
        >>> symmetric_flops(256, 10, 256), symmetric_flops(256, 10, 128)
        (1310720, 983040)
    """
    return sum(2 * (stop - start) * contracted * stop for start, stop in _spans(side, panel))


def is_on_host(tensor: Tensor) -> bool:
    """Return whether the host can read a tensor without waiting for a device."""
    return tensor.device.type == "cpu"


def panel_product_(
    C_NSS: Tensor,
    A_NSK: Tensor,
    B_NKS: Tensor,
    *,
    panel: int,
    bias: Tensor | None = None,
    beta: float = 0.0,
    alpha: float = 1.0,
) -> None:
    """Write `beta * bias + alpha * A @ B` into `C`. It must be symmetric, which is not checked.

    Args:
        C_NSS: `[N, S, S]`, contiguous along its last axis; overwritten.
        A_NSK: `[N, S, K]`.
        B_NKS: `[N, K, S]`.
        panel: rows of a panel.
        bias: `[N, S, S]`, symmetric and not `C`; or None.
        beta: factor of `bias`.
        alpha: factor of the product.
    """
    for start, stop in _spans(C_NSS.shape[-1], panel):
        rows, columns = slice(start, stop), slice(0, stop)
        added = None if bias is None else bias[:, rows, columns]
        left, right = A_NSK[:, rows], B_NKS[:, :, columns]
        product_(C_NSS[:, rows, columns], left, right, bias=added, beta=beta, alpha=alpha)
        if start:
            C_NSS[:, :start, rows].copy_(C_NSS[:, rows, :start].mT)


def _spans(side: int, panel: int) -> list[tuple[int, int]]:
    return [(start, min(start + panel, side)) for start in range(0, side, panel)]


def can_run_side_by_side(parts: int) -> bool:
    """Return whether several threads can each work on some of `parts` parts.

    They cannot under `torch.compile` or a dispatch mode, which sees only its own thread.
    """
    observed = torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0
    return 1 < torch.get_num_threads() <= parts and not observed


def run_side_by_side(work: Callable[[list[T]], None], parts: list[T]) -> None:
    """Call `work` on all of `parts`, in lists that run in parallel.

    Each worker has one thread and gets the same number of parts. The remainder runs on all threads.
    If `can_run_side_by_side` is false, this is `work(parts)`.

    Args:
        work: a function of tensors on a CPU. Several threads call it, without autograd.
        parts: must be independent of each other. Their division into lists is deterministic.
    """
    if not can_run_side_by_side(len(parts)):
        work(parts)
        return
    threads = torch.get_num_threads()
    whole = len(parts) - len(parts) % threads
    pool = _pool(threads)
    running = [pool.submit(work, parts[n:whole:threads]) for n in range(threads)]
    for future in running:
        future.result()
    if whole < len(parts):
        work(parts[whole:])


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Return `threads` workers of one thread each."""
    workers = ThreadPoolExecutor(threads, "muonscale", _set_up_worker)
    barrier = threading.Barrier(threads)
    for future in [workers.submit(barrier.wait) for _ in range(threads)]:
        future.result()
    # The setting of a worker would also be the default of threads that start later.
    torch.set_num_threads(threads)
    return workers


def _set_up_worker() -> None:
    torch.get_num_threads()  # the first call in a thread sets the default of all threads
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
