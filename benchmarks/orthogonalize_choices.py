"""The constants of muonscale.optim that decide how Newton-Schulz is run, each beside its alternatives.

Panel rows and the side from which panels pay (kernels/cpu.py), bytes of a batch (orthogonalize.py), and
how long a segment of the Gram form may be (flops.py).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from orthogonalize_cost import in_turns, median_ratio, spectra

from muonscale.lab.console import dtype_text
from muonscale.optim.newton_schulz import orthogonalize as orthogonalize_module
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.newton_schulz.flops import gram_segments
from muonscale.optim.newton_schulz.kernels.cpu import empty_squares, panel_product_
from muonscale.optim.newton_schulz.orthogonalize import orthogonalize

PANELS = (64, 96, 128, 192, 256)
SIDES = (128, 192, 256, 384, 512, 768, 1024)
BATCH_MIB = (1, 2, 4, 8, 16, 64)
BATCHES = ((64, 64, 64), (32, 128, 352), (64, 64, 1408), (8, 256, 688), (4, 512, 512))
SETS = (("jordan", 5), ("you5", 5), ("polar_express", 5), ("cans", 5), ("polar_express", 8))
RESTARTS: tuple[tuple[int, ...], ...] = ((), (1,), (2,), (3,), (2, 4))


def panel_line(side: int, dtype: torch.dtype, rounds: int, seconds: float) -> str:
    """Return the speed of A @ A by panels, mirrored, over the whole product."""
    A = torch.randn(1, side, side)
    A = (A + A.mT).div_(side).to(dtype)
    tasks: dict[str, Callable[[], object]] = {}
    for panel in (side, *PANELS):
        C = empty_squares(A, 1, side, panel)
        tasks[str(panel)] = lambda C=C, panel=panel: panel_product_(C, A, A, panel=panel)
    times = in_turns(tasks, rounds, seconds)
    whole = times[str(side)]
    cells = [
        f"{median_ratio(whole, times[str(panel)]):.2f}" if panel < side else "-" for panel in PANELS
    ]
    rate = 2 * side**3 / statistics.median(whole) / 1e9
    return f"| {side} | {dtype_text(dtype)} | {rate:.0f} | {' | '.join(cells)} |"


def batch_line(shape: tuple[int, int, int], rounds: int, seconds: float) -> str:
    """Return the speed with each size of batch over that with the largest."""
    X = torch.randn(shape)
    chosen = orthogonalize_module.CACHE_BYTES

    def run(mib: int) -> None:
        orthogonalize_module.CACHE_BYTES = mib * 2**20
        orthogonalize(X, dtype=torch.float32)

    try:
        tasks = {str(mib): (lambda mib=mib: run(mib)) for mib in BATCH_MIB}
        times = in_turns(tasks, rounds, seconds)
    finally:
        orthogonalize_module.CACHE_BYTES = chosen
    largest = times[str(BATCH_MIB[-1])]
    cells = [f"{median_ratio(largest, times[str(mib)]):.2f}" for mib in BATCH_MIB]
    return f"| {' x '.join(map(str, shape))} | {' | '.join(cells)} |"


def segment_lines(name: str, steps: int, dtype: torch.dtype) -> list[str]:
    """Return the error of every placing of restarts over that of the direct form."""
    lines = []
    direct = errors(name, steps, "direct", None, dtype)
    for restarts in RESTARTS:
        coefficients = replace(resolve(name, steps), restarts=restarts)
        slope, first = 0.0, 0
        for length in gram_segments(coefficients, dtype, 128):
            slopes = [a for a, _, _ in coefficients.triples[first : first + length]]
            slope, first = max(slope, math.prod(slopes)), first + length
        found = errors(name, steps, "gram", restarts, dtype)
        ratios = [a / b for a, b in zip(found, direct, strict=True)]
        worst = math.inf if any(map(math.isnan, ratios)) else max(ratios)
        cells = " | ".join(f"{error:.0e}" for error in found)
        label = dtype_text(dtype)
        lines.append(
            f"| {name}, {steps} | {label} | {restarts or 'none'} | {slope:.0f} | {worst:.2g} | {cells} |"
        )
    return lines


def errors(
    name: str, steps: int, form: str, restarts: tuple[int, ...] | None, dtype: torch.dtype
) -> Sequence[float]:
    """Return the relative distance from float64 of the same polynomial, by spectrum."""
    coefficients = replace(resolve(name, steps), restarts=restarts)
    found = []
    for X in spectra(128, 352).values():
        truth = orthogonalize(X, coefficients, steps, "direct", torch.float64)
        O_MK = orthogonalize(X, coefficients, steps, form, dtype).double()
        found.append(float((O_MK - truth).norm() / truth.norm()))
    return found


def report(head: str, rounds: int, seconds: float) -> str:
    """Return the whole result as Markdown."""
    names = list(spectra(4, 4))
    return "\n".join(
        [
            "# Newton-Schulz: the constants",
            "",
            head,
            "",
            "## Panels: speed of a symmetric product by panels of that many rows over the whole one",
            "",
            f"| side | products | whole, GFLOP/s | {' | '.join(map(str, PANELS))} |",
            f"|---|---|---|{'---|' * len(PANELS)}",
            *(panel_line(side, torch.float32, rounds, seconds) for side in SIDES),
            *(panel_line(side, torch.bfloat16, rounds, seconds) for side in SIDES[2:]),
            "",
            f"## Batches: speed with temporaries of that many MiB over {BATCH_MIB[-1]} MiB, float32",
            "",
            f"| matrices | {' | '.join(map(str, BATCH_MIB))} |",
            f"|---|{'---|' * len(BATCH_MIB)}",
            *(batch_line(shape, rounds, seconds) for shape in BATCHES),
            "",
            "## Segments of the Gram form: relative distance from float64, 128 x 352",
            "",
            "`slope`: the largest slope at 0 of a segment; `worst`: largest error over that of the "
            "direct form in the same dtype, over the spectra.",
            "",
            f"| set, steps | products | restarts after | slope | worst | {' | '.join(names)} |",
            f"|---|---|---|---|---|{'---|' * len(names)}",
            *(
                line
                for dtype in (torch.float32, torch.bfloat16)
                for name, steps in SETS
                for line in segment_lines(name, steps, dtype)
            ),
            "",
        ]
    )
