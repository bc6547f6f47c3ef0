"""How fast a device multiplies matrices, the reference for the speed of Newton-Schulz."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable

import torch

from muonscale.lab.bench.measure import CPU, wait_for

RATE_SECONDS = 0.02
"""The least time over which a rate is measured."""


def direct_flops(out: int, in_: int, steps: int = 5) -> int:
    """Return the operations of Newton-Schulz steps in their direct form, each `4*S^2*L + 2*S^3`."""
    short, long = sorted((out, in_))
    return steps * (4 * short * short * long + 2 * short**3)


def addmm_rate(out: int, in_: int, dtype: torch.dtype, device: torch.device = CPU) -> float:
    """Return the FLOP/s of `addmm` of S x S with S x L, as in a direct Newton-Schulz step."""
    short, long = sorted((out, in_))
    X = torch.randn(short, long, device=device).to(dtype)
    B = torch.randn(short, short, device=device).to(dtype)
    calls = 0
    torch.addmm(X, B, X)
    wait_for(device)
    start = time.perf_counter()
    while calls == 0 or time.perf_counter() - start < RATE_SECONDS:
        torch.addmm(X, B, X)
        wait_for(device)
        calls += 1
    return calls * 2 * short * short * long / (time.perf_counter() - start)


def weighted_rate(
    shapes: Iterable[tuple[int, int, int]], dtype: torch.dtype, device: torch.device = CPU
) -> float:
    """Return the FLOP/s of `addmm` over matrices (number, out, in), by `direct_flops`."""
    work: Counter[tuple[int, int]] = Counter()
    for count, out, in_ in shapes:
        work[out, in_] += count * direct_flops(out, in_)
    seconds = sum(flops / addmm_rate(*shape, dtype, device) for shape, flops in work.items())
    return sum(work.values()) / seconds
