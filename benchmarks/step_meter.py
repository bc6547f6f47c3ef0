"""What benchmarks/optimizer_step.py measures of one workload, and how.

A *side* (`peers.py`) steps the *matrices* of a *workload*. All sides share parameters and
full-rank random gradients, which are put back before every step, since some sides overwrite them.
A *round* times every side right beside a step of ours with products of the same dtype, and changes
the order from round to round, so that a change in the machine's speed meets both.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from peers import Side, Triple
from torch import Tensor
from torch.nn import Parameter

from muonscale.lab.bench.measure import executed_flops, peak_extra_bytes, state_bytes
from muonscale.lab.bench.rates import addmm_rate, direct_flops, weighted_rate
from muonscale.lab.console import dtype_text

QUICK_PART, QUICK_ROUNDS = 16, 2
SLOWER = 5
"""A dtype this many times slower than float32 has no instructions of its own."""

Rows = dict[str, dict[str, Any]]
"""By side: what was measured, or `not_run` and why."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Matrices of a model: (number, out, in)."""

    name: str
    title: str
    shapes: tuple[tuple[int, int, int], ...]
    rounds: int

    @property
    def largest_batch_bytes(self) -> int:
        """Bytes of the matrices of the shape that has most of them, in float32."""
        return max(count * out * in_ * 4 for count, out, in_ in self.shapes)

    @property
    def numel(self) -> int:
        return sum(count * out * in_ for count, out, in_ in self.shapes)

    @property
    def flops(self) -> int:
        """Operations of the Newton-Schulz steps of all matrices, in the direct form."""
        return sum(count * direct_flops(out, in_) for count, out, in_ in self.shapes)

    @property
    def quick(self) -> Workload:
        """The same with fewer matrices and rounds."""
        shapes = tuple((max(1, n // QUICK_PART), out, in_) for n, out, in_ in self.shapes)
        return replace(self, shapes=shapes, rounds=QUICK_ROUNDS)


class MatrixSet:
    """The parameters and gradients of a workload, which all sides share."""

    def __init__(self, workload: Workload) -> None:
        generator = torch.Generator().manual_seed(0)
        shapes = [(out, in_) for count, out, in_ in workload.shapes for _ in range(count)]
        self.parameters = [Parameter(torch.zeros(shape)) for shape in shapes]
        self._pristine = [torch.randn(shape, generator=generator) for shape in shapes]
        self._gradients = [torch.empty(shape) for shape in shapes]

    def restore_gradients(self) -> None:
        torch._foreach_copy_(self._gradients, self._pristine)
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            parameter.grad = gradient

    def zero(self) -> None:
        with torch.no_grad():
            torch._foreach_zero_(self.parameters)

    def one_of_each_shape(self) -> list[tuple[Parameter, Tensor]]:
        """Return a parameter and its gradient for every shape."""
        pairs = zip(self.parameters, self._pristine, strict=True)
        return list({tuple(p.shape): (p, G) for p, G in pairs}.values())


class Runner:
    """A side, built on the matrices of a workload."""

    def __init__(self, side: Side, matrices: MatrixSet) -> None:
        self.side = side
        self.matrices = matrices
        with side.patch():
            self.optimizer = side.build(list(matrices.parameters))

    def seconds(self) -> float:
        """Take one step; return its seconds."""
        self.matrices.restore_gradients()
        with self.side.patch():
            start = time.perf_counter()
            self.optimizer.step()
            return time.perf_counter() - start

    def facts(self) -> dict[str, Any]:
        """Take the first steps; return what is measured but once."""
        self.matrices.zero()
        flops = None
        if self.side.compiled:
            self.seconds()
        else:
            flops = executed_flops(self.seconds)
        error = direction_error(self.matrices, self.side.triples)
        for _ in range(self.side.warmup):
            self.seconds()
        return {
            "error": error,
            "flops": flops,
            "extra_bytes": peak_extra_bytes(self.seconds),
            "state_bytes": state_bytes(self.optimizer.state),
        }


def direction_error(matrices: MatrixSet, triples: Iterable[Triple]) -> float:
    """Return how far the first update of parameters that were zero is from the reference.

    `||U/||U|| - R/||R||||`, the largest over all shapes, R being Newton-Schulz in float64. Shape
    factors cancel, and so does the momentum, of which the first is a multiple of the gradient.
    """
    errors = []
    for parameter, G in matrices.one_of_each_shape():
        U = -parameter.detach().double()
        R = reference(G, triples)
        errors.append(float((U / U.norm() - R / R.norm()).norm()))
    return max(errors)


def reference(G: Tensor, triples: Iterable[Triple]) -> Tensor:
    """Return NS(G) in float64, step by step."""
    X = G.double() / G.double().norm()
    for a, b, c in triples:
        left = X.shape[0] <= X.shape[1]
        A = X @ X.T if left else X.T @ X
        polynomial = b * A + c * A @ A
        X = a * X + (polynomial @ X if left else X @ polynomial)
    return X


def measure(
    workload: Workload, sides: Sequence[Side], limit: float, *, quick: bool = False
) -> dict[str, Any]:
    """Return the rows of all sides, by name, and the rates of `addmm`, by dtype.

    Args:
        workload: what is stepped.
        sides: ours in float32 among them.
        limit: seconds for a step, beyond which a side whose dtype is emulated is left out, and its
            row says so. Below it such a side takes part in the first rounds alone.
        quick: leave out, with such a row, what compiles for minutes.
    """
    matrices = MatrixSet(workload)
    rows: Rows = {side.name: {} for side in sides}
    runners = []
    slow = emulated(side.products for side in sides)
    for side in sides:
        rate = slow.get(side.products, math.inf)
        if workload.flops / rate > limit:
            rows[side.name]["not_run"] = (
                f"not run: {dtype_text(side.products)} products at {rate / 1e9:.1f} GFLOP/s make it "
                f"about {workload.flops / rate:.0f} s"
            )
            continue
        if quick and side.compiled:
            rows[side.name]["not_run"] = "not run: compiles for minutes, and this is a quick run"
            continue
        tell(workload, f"first steps of {side.name}")
        with failures_reported(side, rows):
            runner = Runner(side, matrices)
            rows[side.name] |= runner.facts() | {"seconds": [], "pairs": []}
            runners.append(runner)
    rates: dict[str, list[float]] = {}
    for number in range(workload.rounds):
        tell(workload, f"round {number + 1} of {workload.rounds}")
        playing = [r for r in runners if number < QUICK_ROUNDS or r.side.products not in slow]
        for dtype in {runner.side.products for runner in playing}:
            rates.setdefault(str(dtype), []).append(weighted_rate(workload.shapes, dtype))
        play_round(playing, rows, number)
    return {
        "rows": rows,
        "rates": {dtype: statistics.median(values) for dtype, values in rates.items()},
    }


def tell(workload: Workload, what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {workload.name}: {what}", file=sys.stderr, flush=True)


def best_rate(dtype: torch.dtype) -> float:
    """Return the best FLOP/s of `addmm` on 256 x 256, the speed that the machine reaches."""
    return max(addmm_rate(256, 256, dtype) for _ in range(5))


def emulated(dtypes: Iterable[torch.dtype]) -> dict[torch.dtype, float]:
    """Return the FLOP/s of those dtypes that the machine multiplies far slower than float32."""
    rates = {dtype: best_rate(dtype) for dtype in {torch.float32, *dtypes}}
    return {d: rate for d, rate in rates.items() if rate < rates[torch.float32] / SLOWER}


@contextmanager
def failures_reported(side: Side, rows: Rows) -> Generator[None]:
    """Turn whatever somebody else's code raises into its row; ours may not fail."""
    try:
        yield
    except Exception as error:
        if side.ours:
            raise
        first = str(error).strip().split("\n")[0][:160]
        rows[side.name] = {"not_run": f"failed: {type(error).__name__}: {first}"}


def play_round(runners: Sequence[Runner], rows: Rows, number: int) -> None:
    """Time every side beside ours, in an order that depends on the round."""
    ours = {runner.side.products: runner for runner in runners if runner.side.ours}
    shift = number * len(runners) // 3 % len(runners)
    for runner in [*runners[shift:], *runners[:shift]]:
        base = ours[torch.float32]
        if not runner.side.ours:
            base = ours.get(runner.side.products, base)
        if base is runner or "not_run" in rows[runner.side.name]:
            continue
        pair = (base, runner) if number % 2 == 0 else (runner, base)
        times: dict[str, float] = {}
        for step in pair:
            with failures_reported(step.side, rows):
                times[step.side.name] = step.seconds()
                rows[step.side.name]["seconds"].append(times[step.side.name])
        if len(times) == 2:
            rows[runner.side.name]["pairs"].append(
                [times[step.side.name] for step in (base, runner)]
            )
