"""The cost half of benchmarks/orthogonalize.py: FLOP model, rates, and a loop of addmm as baseline.

All times of a line are taken in turns within each round, so that a change in the machine's speed
meets all of them; a line gives the median over rounds of ratios within a round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from muonscale.lab.console import dtype_text
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.newton_schulz.flops import choose_segments, segment_flops
from muonscale.optim.newton_schulz.kernels.cpu import panel_rows
from muonscale.optim.newton_schulz.orthogonalize import ns_dtype, orthogonalize

STEPS = 5
# (matrices, short side, long side): aspect ratios 1, 2, 2.7, 4, 8 and 22.
SHAPES = [
    (64, 64, 64),
    (32, 128, 128),
    (16, 256, 256),
    (8, 512, 512),
    (1, 512, 512),
    (4, 768, 768),
    (16, 256, 512),
    (4, 512, 1024),
    (16, 128, 352),
    (4, 512, 1376),
    (16, 128, 512),
    (2, 512, 2048),
    (2, 768, 3072),
    (32, 64, 512),
    (8, 256, 2048),
    (64, 64, 1408),
    (1, 64, 1408),
]
# (matrices, out, in) of some layers; matrices of different layers are independent.
WORKLOADS = {
    "Llama-60M, 2 of 8 layers (d 512, ffn 1376)": [(8, 512, 512), (4, 1376, 512), (2, 512, 1376)],
    "GPT-2 small, 1 of 12 layers (d 768, q, k, v apart)": [
        (4, 768, 768),
        (1, 3072, 768),
        (1, 768, 3072),
    ],
}

Times = Mapping[str, Sequence[float]]


def in_turns(tasks: Mapping[str, Callable[[], object]], rounds: int, seconds: float) -> Times:
    """Return the seconds of every task in every round, after one round that is not counted."""
    for task in tasks.values():
        task()
    times: dict[str, list[float]] = {name: [] for name in tasks}
    began = time.perf_counter()
    count = 0
    while count < rounds or time.perf_counter() - began < seconds:
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            times[name].append(time.perf_counter() - start)
        count += 1
    return times


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def addmm_loop(X_NMK: Tensor, triples: Sequence[tuple[float, float, float]]) -> Tensor:
    """Return the direct form, one matrix and one addmm at a time, as published Muons have it."""
    results = []
    for matrix in X_NMK:
        tall = matrix.shape[0] > matrix.shape[1]
        X = matrix.mT if tall else matrix
        X = X / (X.norm() + 1e-7)
        for a, b, c in triples:
            A = X @ X.mT
            B = torch.addmm(A, A, A, beta=b, alpha=c)
            X = torch.addmm(X, B, X, beta=a)
        results.append(X.mT if tall else X)
    return torch.stack(results)


def product_tasks(count: int, short: int, long: int, dtype: torch.dtype) -> dict[str, Callable]:
    """Return whole products of the shapes in question, batched and one by one, into given memory."""
    tasks: dict[str, Callable[[], object]] = {}
    square = torch.randn(count, short, short).div_(short).to(dtype)
    for kind, columns in (("long", long), ("square", short)):
        X = torch.randn(count, short, columns).to(dtype)
        Y = torch.empty_like(X)
        tasks[f"{kind} batched"] = lambda X=X, Y=Y: torch.baddbmm(X, square, X, beta=0.5, out=Y)
        tasks[f"{kind} looped"] = lambda X=X, Y=Y: [
            torch.addmm(x, s, x, beta=0.5, out=y) for x, s, y in zip(X, square, Y, strict=True)
        ]
    return tasks


def shape_line(count: int, short: int, long: int, rounds: int, seconds: float) -> str:
    """Return one line of the table of shapes, in float32."""
    X = torch.randn(count, short, long)
    dtype = torch.float32
    tasks: dict[str, Callable[[], object]] = {
        form: lambda form=form: orthogonalize(X, "jordan", STEPS, form, dtype)
        for form in ("direct", "gram")
    }
    tasks |= product_tasks(count, short, long, dtype)
    times = in_turns(tasks, rounds, seconds)
    coefficients = resolve("jordan", STEPS)
    panel = panel_rows(short, dtype, "cpu")
    flops: dict[str, int] = {}
    rates: dict[str, float] = {}
    for form in ("direct", "gram"):
        segments = choose_segments((short, long), coefficients, form)

        def cost(columns: int, segments: tuple[int, ...] = segments) -> int:
            shape = (count, short, columns)
            return segment_flops(shape, coefficients.triples, segments, panel)

        flops[form] = cost(long)
        # The count is linear in the longer side.
        with_long = cost(2 * long) - cost(long)
        ideal = [
            with_long / (2 * count * short * short * long) * min(long_times)
            + (cost(long) - with_long) / (2 * count * short**3) * min(square_times)
            for long_times, square_times in zip(
                zip(times["long batched"], times["long looped"], strict=True),
                zip(times["square batched"], times["square looped"], strict=True),
                strict=True,
            )
        ]
        rates[form] = median_ratio(ideal, times[form])
    model = flops["direct"] / flops["gram"]
    measured = median_ratio(times["direct"], times["gram"])
    chosen = "gram" if model > 1 else "direct"
    best = statistics.median(times[chosen]) * 1e3
    return (
        f"| {count} x {short} x {long} | {long / short:.1f} | {chosen} | {model:.2f} | {measured:.2f} "
        f"| {best:.1f} | {rates['direct']:.2f} | {rates['gram']:.2f} |"
    )


def workload_times(
    shapes: Sequence[tuple[int, int, int]], rounds: int, dtypes: Sequence[torch.dtype]
) -> Times:
    """Return seconds of the whole workload per round, shape by shape in turns."""
    triples = resolve("jordan", STEPS).triples
    totals: dict[str, list[float]] = {}
    for shape in shapes:
        X = torch.randn(shape)
        tasks: dict[str, Callable[[], object]] = {}
        for dtype in dtypes:
            name = dtype_text(dtype)
            tasks[f"loop {name}"] = lambda X=X, dtype=dtype: addmm_loop(X.to(dtype), triples)
            for form in ("direct", "auto"):
                tasks[f"{form} {name}"] = lambda X=X, dtype=dtype, form=form: orthogonalize(
                    X, "jordan", STEPS, form, dtype
                )
        for name, seconds in in_turns(tasks, rounds, 0.0).items():
            before = totals.get(name, [0.0] * rounds)
            totals[name] = [a + b for a, b in zip(before, seconds, strict=True)]
    return totals


def workload_lines(rounds: int) -> list[str]:
    dtypes = [torch.float32]
    if ns_dtype("cpu") == torch.bfloat16:
        dtypes.append(torch.bfloat16)
    lines = [
        "| workload | products | loop of addmm, ms | direct, ms | auto, ms | loop / direct "
        "| **loop / auto** (quartiles) |",
        "|---|---|---|---|---|---|---|",
    ]
    for title, shapes in WORKLOADS.items():
        times = workload_times(shapes, rounds, dtypes)
        for dtype in dtypes:
            name = dtype_text(dtype)
            loop, direct, auto = (times[f"{kind} {name}"] for kind in ("loop", "direct", "auto"))
            ratios = [a / b for a, b in zip(loop, auto, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
            seconds = " | ".join(f"{statistics.median(t) * 1e3:.0f}" for t in (loop, direct, auto))
            lines.append(
                f"| {title} | {name} | {seconds} | {median_ratio(loop, direct):.2f} "
                f"| **{middle:.2f}** ({low:.2f}-{high:.2f}) |"
            )
    return lines


def spectra(short: int, long: int) -> dict[str, Tensor]:
    """Return float64 matrices with flat and decaying singular values."""
    generator = torch.Generator().manual_seed(0)
    U, V = (
        torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64)).Q
        for n in (short, long)
    )
    rank = torch.arange(1, short + 1, dtype=torch.float64)
    values = {
        "all equal": torch.ones_like(rank),
        "1/rank": 1 / rank,
        "1/rank^2": 1 / rank**2,
        "geometric to 1e-6": torch.logspace(0, -6, short, dtype=torch.float64),
        "one, then 1e-3": torch.where(rank < 2, 1.0, 1e-3),
    }
    random = torch.randn(short, long, generator=generator, dtype=torch.float64)
    return {"gaussian": random, **{name: (U * s) @ V.mT for name, s in values.items()}}


def rounding_lines() -> list[str]:
    """Return the table of relative distances from float64 of the same polynomial."""
    matrices = spectra(256, 704)
    names = list(matrices)
    lines = [
        f"| form, products | {' | '.join(names)} |",
        f"|---|{'---|' * len(names)}",
    ]
    truth = {name: orthogonalize(X, form="direct") for name, X in matrices.items()}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for form in ("direct", "gram"):
            cells = []
            for name, X in matrices.items():
                found = orthogonalize(X, "jordan", STEPS, form, dtype).double()
                cells.append(f"{(found - truth[name]).norm() / truth[name].norm():.0e}")
            lines.append(f"| {form}, {dtype_text(dtype)} | {' | '.join(cells)} |")
    return lines


def report(head: str, rounds: int, seconds: float) -> str:
    """Return the whole result as Markdown."""
    return "\n".join(
        [
            "# Newton-Schulz: cost",
            "",
            head,
            "",
            "Five Jordan steps. Times are medians over rounds in which the sides take turns.",
            "",
            "## Against one addmm per product and matrix",
            "",
            *workload_lines(rounds),
            "",
            "## The FLOP model, float32",
            "",
            "`choice` is what `auto` takes, by the fewer operations; the two ratios should be on the "
            "same side of 1. The last columns are executed FLOP/s over those of whole `addmm` or "
            "`baddbmm` products (whichever is faster) of the same shapes in the same round; panels "
            "count only what they compute.",
            "",
            "| matrices | aspect | choice | direct / gram, model | measured | ms | direct: of addmm "
            "rate | gram: of addmm rate |",
            "|---|---|---|---|---|---|---|---|",
            *(shape_line(*shape, rounds, seconds) for shape in SHAPES),
            "",
            "## Relative distance from float64 of the same polynomial, 256 x 704",
            "",
            *rounding_lines(),
            "",
        ]
    )
