"""A step of Muon on gloo processes, beside others on the same FSDP2 parameters, and what it gives.

A *round* times every side right beside a step of ours, in changing order. A step takes as long as
its slowest rank. The first step of each side, from parameters that are zero, is compared with
Newton-Schulz in float64 of the whole gradient in one process.
"""

from __future__ import annotations

import statistics
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from distributed_stack import FFN, LAYERS, WIDTH, Stack, placed, whole
from distributed_world import run_on
from peers import (
    JORDAN,
    LR,
    MOMENTUM,
    WEIGHT_DECAY,
    AddmmLoop,
    Side,
    Stepper,
    bfloat16_is_float,
    newton_schulz_loop,
    our_muon,
    torch_muon,
)
from step_meter import reference
from torch import Tensor
from torch.nn import Parameter

from muonscale.lab.console import dtype_text

WORLDS = (2, 4)
ROUNDS = 5
ACCEPTED = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Largest relative distance of an update that counts as right, by the dtype of the products."""


class FullGather(AddmmLoop):
    """The plainest competent Muon on DTensors: every rank gathers and works on every matrix."""

    def polar(self, N: Tensor, W: Parameter) -> Tensor:
        """Return this rank's shard of Newton-Schulz of the whole."""
        return placed(newton_schulz_loop(whole(N), self.dtype).to(W.dtype), W)


def muon_fsdp2(parameters: list[Parameter]) -> Stepper:
    """Return the Muon of muon-fsdp2."""
    from muon_fsdp2 import Muon

    options = {"lr": LR, "weight_decay": WEIGHT_DECAY, "momentum": MOMENTUM, "rms_scale": True}
    return Muon([{"params": parameters, "use_muon": True, **options}])


def sides() -> list[Side]:
    """Return all sides; the first is ours, with which all are compared."""
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        name = dtype_text(dtype)
        patch = {"patch": bfloat16_is_float} if dtype == torch.float32 else {}
        found += [
            Side(
                name=f"muonscale {name}",
                products=dtype,
                build=lambda ps, name=name: our_muon(name, ps),
                how="`ns_dtype`",
                ours=True,
            ),
            Side(
                name="full gather, addmm loop " + name,
                products=dtype,
                build=lambda ps, dtype=dtype: FullGather(ps, dtype),
                how="`full_tensor`, one matrix at a time on every rank, own shard kept",
            ),
            Side(
                name=f"torch.optim.Muon {name}",
                products=dtype,
                build=torch_muon,
                how="on DTensors",
                **patch,
            ),
            Side(
                name=f"muon-fsdp2 {name}",
                products=dtype,
                build=muon_fsdp2,
                how="`rms_scale=True`",
                **patch,
            ),
        ]
    return found


class Runner:
    """A side on the parameters of this rank."""

    def __init__(self, side: Side, stack: Stack) -> None:
        self.side, self.stack = side, stack
        with side.patch():
            self.optimizer = side.build(list(stack.parameters))

    def seconds(self) -> float:
        """Take one step; return its seconds."""
        self.stack.restore_gradients()
        dist.barrier()
        with self.side.patch():
            start = time.perf_counter()
            self.optimizer.step()
            return time.perf_counter() - start

    def error(self, expected: Sequence[torch.Tensor]) -> float:
        """Take the first step; return how far it is from what one process takes, at most."""
        self.stack.zero()
        self.seconds()
        return max(
            float((whole(p.detach()).double() - U).norm() / U.norm())
            for p, U in zip(self.stack.parameters, expected, strict=True)
        )


def first_updates(stack: Stack) -> list[torch.Tensor]:
    """Return the first update of parameters that are zero, in float64."""
    return [
        -LR * 0.2 * max(G.shape) ** 0.5 * reference(G, JORDAN).double() for G in stack.gradients
    ]


def tell(what: str) -> None:
    """Say on standard error what is measured now."""
    if dist.get_rank() == 0:
        text = f"{time.strftime('%H:%M:%S')} {dist.get_world_size()} processes: {what}"
        print(text, file=sys.stderr, flush=True)


def measure(rounds: int) -> dict[str, dict[str, Any]]:
    """Return errors, and seconds of pairs (ours, side) on this rank, by side."""
    warnings.simplefilter("ignore")
    stack = Stack(sharded=True)
    expected = first_updates(stack)
    rows: dict[str, dict[str, Any]] = {}
    runners = []
    for side in sides():
        tell(f"first step of {side.name}")
        try:
            runner = Runner(side, stack)
            rows[side.name] = {"error": runner.error(expected), "pairs": []}
            runners.append(runner)
        except Exception as error:  # somebody else's code
            if side.ours:
                raise
            first = str(error).strip().split("\n")[0][:200]
            rows[side.name] = {"failed": f"{type(error).__name__}: {first}"}
    for runner in runners:
        runner.seconds()
    for number in range(rounds):
        tell(f"round {number + 1} of {rounds}")
        for runner in runners[1:]:
            pair = (runners[0], runner) if number % 2 == 0 else (runner, runners[0])
            times = {step.side.name: step.seconds() for step in pair}
            pairs = rows[runner.side.name]["pairs"]
            pairs.append([times[runners[0].side.name], times[runner.side.name]])
    return rows


def slowest(found: Sequence[dict[str, dict[str, Any]]], name: str) -> list[tuple[float, float]]:
    """Return the pairs of a side, each step as long as its slowest rank."""
    by_rank = [rows[name]["pairs"] for rows in found]
    return [
        (max(pair[0] for pair in pairs), max(pair[1] for pair in pairs))
        for pairs in zip(*by_rank, strict=True)
    ]


def lines(ranks: int, rounds: int) -> list[str]:
    """Return the lines of one world."""
    found = run_on(ranks, measure, rounds)
    ours = [
        pair[0]
        for side in sides()[1:]
        if "error" in found[0][side.name]
        for pair in slowest(found, side.name)
    ]
    return [line(ranks, side, found, ours) for side in sides()]


def line(
    ranks: int, side: Side, found: Sequence[dict[str, dict[str, Any]]], ours: Sequence[float]
) -> str:
    """Return one line of the table."""
    row = found[0][side.name]
    if "failed" in row:
        return f"| {ranks} | {side.name} | - | - | - | failed: {row['failed']} |"
    pairs = slowest(found, side.name)
    error = max(rows[side.name]["error"] for rows in found)
    right = "right" if error <= ACCEPTED[side.products] else "WRONG"
    seconds, ratio = statistics.median(ours), "1"
    if pairs:
        seconds = statistics.median(pair[1] for pair in pairs)
        ratios = [theirs / base for base, theirs in pairs]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        ratio = f"**{middle:.2f}** ({low:.2f}-{high:.2f})"
    return f"| {ranks} | {side.name} | {seconds * 1e3:.0f} | {ratio} | {error:.1e} | {right} |"


def section(rounds: int = ROUNDS) -> list[str]:
    """Return the text of the section."""
    names = ["W", "side, products", "ms", "times ours float32 (quartiles)", "distance", "update"]
    return [
        f"One step on {LAYERS} Llama layers of width {WIDTH} and feed-forward {FFN} under FSDP2, "
        f"random gradients, gloo, one thread per process; {rounds} pairs of steps taken one right "
        "after the other, a step as long as its slowest rank. All sides: momentum 0.95 with "
        "Nesterov, five Jordan steps, update RMS 0.2. *distance*: `||U - R||/||R||`, the largest over "
        "the matrices, of the first update and Newton-Schulz in float64 of the whole gradient in one "
        "process; up to 1e-3 (bfloat16 products: 5e-2) is *right*.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *(text for ranks in WORLDS for text in lines(ranks, rounds)),
        "",
        "torch.optim.Muon and muon-fsdp2 have bfloat16 products in their code; the float32 lines are "
        "the same code with `Tensor.bfloat16` replaced by `Tensor.float`. The full gather is written "
        "here: every rank gathers and works on every matrix and keeps its own shard. muon-fsdp2 "
        "compiles its loop of products in the first steps, which are not counted. With 4 processes "
        "on fewer cores, work that every rank repeats costs more than it would on a core per rank.",
    ]
