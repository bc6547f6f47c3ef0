"""The accuracy half of benchmarks/orthogonalize.py: coefficient sets on momentum from a real run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from muonscale.errors import CheckpointError
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.checkpoint import load_tensors, newest_checkpoint
from muonscale.lab.training.checkpoint_reader import read_metadata
from muonscale.optim.newton_schulz.coefficients import SCHEDULES, Coefficients, resolve
from muonscale.optim.newton_schulz.flops import HIGHEST_IN_16_BITS, highest_value, ns_flops
from muonscale.optim.newton_schulz.orthogonalize import exact_polar, orthogonalize

MOST_STEPS = 10
# Sets that are also tried with the tighter normalization.
WITH_SCHATTEN = ("jordan", "you5", "polar_express", "cans")


@dataclass(frozen=True)
class Measured:
    """One coefficient set at one number of steps, on all matrices."""

    name: str
    steps: int
    flops: int
    distance: float
    """Median over matrices of `||O - U V^T||_F / ||U V^T||_F`."""
    cosine: float
    """Median over matrices of the cosine between `O` and `U V^T`."""
    error: float
    """Median over matrices of `||O O^T - I||_F / sqrt(S)`."""


def momentum(run: Path) -> tuple[Path, dict[str, Tensor]]:
    """Return the newest checkpoint of a run and the momentum of its Muon matrices by name."""
    folder = newest_checkpoint(RunFolder(run).checkpoints, print)
    if folder is None:
        raise CheckpointError(f"{run} has no checkpoint: train one with `muonscale train`")
    stored = read_metadata(folder).state_dict_metadata
    tensors = {
        name: torch.empty(entry.size)
        for name, entry in stored.items()
        if name.endswith(".momentum_buffer") and isinstance(entry, TensorStorageMetadata)
    }
    load_tensors(folder, tensors, Processes())
    return folder, tensors


def candidates() -> Iterator[tuple[str, Coefficients]]:
    """Yield every set at every number of steps that it can do with."""
    for name, row in SCHEDULES.items():
        for steps in range(max(2, row.least_steps), MOST_STEPS + 1):
            yield name, resolve(name, steps)
            if name in WITH_SCHATTEN:
                yield f"{name}+schatten4", resolve(f"{name}+schatten4", steps)


def measure(name: str, coefficients: Coefficients, pairs: list[tuple[Tensor, Tensor]]) -> Measured:
    """Compare Newton-Schulz in float32 with the exact polar factors."""
    steps = coefficients.steps
    distances, cosines, errors, flops = [], [], [], 0
    for X, polar in pairs:
        found = orthogonalize(X, coefficients, steps, "auto", torch.float32).double()
        flops += ns_flops(X.shape, steps, "auto", coefficients=coefficients)
        gram = found @ found.mT if found.shape[0] <= found.shape[1] else found.mT @ found
        side = gram.shape[0]
        distances.append(float((found - polar).norm() / polar.norm()))
        cosines.append(float((found * polar).sum() / found.norm() / polar.norm()))
        errors.append(float((gram - torch.eye(side, dtype=gram.dtype)).norm() / math.sqrt(side)))
    middle = [float(torch.tensor(v).median()) for v in (distances, cosines, errors)]
    return Measured(name, steps, flops, *middle)


def frontier(results: list[Measured]) -> list[Measured]:
    """Return those than which none is both cheaper and nearer, cheapest first."""
    kept: list[Measured] = []
    for result in sorted(results, key=lambda r: (r.flops, r.distance)):
        if not kept or result.distance < kept[-1].distance:
            kept.append(result)
    return kept


def draw(results: list[Measured], unit: int, figure: Path) -> None:
    """Write distance from the exact polar factor over cost, one line per set."""
    fig, axes = plt.subplots(figsize=(9, 6))
    names = list(dict.fromkeys(result.name for result in results))
    colours = {name: f"C{n}" for n, name in enumerate(SCHEDULES)}
    for name in names:
        own = [result for result in results if result.name == name]
        base = name.split("+")[0]
        axes.plot(
            [result.flops / unit for result in own],
            [result.distance for result in own],
            color=colours[base],
            linestyle="-" if name == base else ":",
            marker="o",
            markersize=3,
            label=name,
        )
    axes.set_xlabel("FLOPs, relative to five Jordan steps (auto form, float32)")
    axes.set_ylabel("median relative distance from the exact polar factor")
    axes.set_yscale("log")
    axes.legend(fontsize=8, ncols=2)
    axes.grid(alpha=0.3)
    fig.tight_layout()
    fig.savefig(figure, dpi=120)


def line(result: Measured, unit: int, best: set[tuple[str, int]]) -> str:
    mark = " *" if (result.name, result.steps) in best else ""
    return (
        f"| {result.name}{mark} | {result.steps} | {result.flops / unit:.2f} "
        f"| {result.distance:.3f} | {result.cosine:.4f} | {result.error:.3f} |"
    )


def nearest_within(results: list[Measured], limit: float, unit: int) -> Measured:
    inside = [result for result in results if result.flops <= limit * unit * (1 + 1e-9)]
    return min(inside, key=lambda result: result.distance)


def recommendation(results: list[Measured], unit: int) -> str:
    """Say which set to take for the cost of five Jordan steps, in any dtype."""
    sturdy = [
        result
        for result in results
        if highest_value(resolve(result.name, result.steps).triples) <= HIGHEST_IN_16_BITS
    ]
    best = nearest_within(sturdy, 1.0, unit)
    usual = next(result for result in results if (result.name, result.steps) == ("jordan", 5))
    return (
        f"**Recommended where accuracy is wanted: `{best.name}` with {best.steps} steps**, at "
        f"{best.flops / unit:.2f} of the cost of `jordan` with 5: distance {best.distance:.3f} instead "
        f"of {usual.distance:.3f}. It is the nearest at this cost among the sets whose steps do not "
        "overshoot, which 16-bit products need. Whether a model trains better for it is another "
        "question; the default stays with the papers."
    )


def budget_line(results: list[Measured], limit: float, unit: int) -> str:
    best = nearest_within(results, limit, unit)
    return (
        f"| {limit:.1f} | {best.name}, {best.steps} steps | {best.flops / unit:.2f} "
        f"| {best.distance:.3f} | {best.cosine:.4f} |"
    )


def report(head: str, run: Path, figure: Path) -> str:
    """Return the result as Markdown and write the figure."""
    folder, tensors = momentum(run)
    pairs = [(X, exact_polar(X)) for X in tensors.values()]
    results = [measure(name, coefficients, pairs) for name, coefficients in candidates()]
    unit = next(r.flops for r in results if (r.name, r.steps) == ("jordan", 5))
    draw(results, unit, figure)
    best = {(result.name, result.steps) for result in frontier(results)}
    shapes = ", ".join(sorted({"x".join(map(str, X.shape)) for X, _ in pairs}))
    return "\n".join(
        [
            "# Newton-Schulz: accuracy against cost, on real momentum",
            "",
            head,
            "",
            f"{len(pairs)} momentum matrices ({shapes}) of {folder}; products in float32; medians over "
            "matrices. FLOPs are those of the `auto` form, relative to five Jordan steps.",
            "",
            f"![distance over cost]({figure.name})",
            "",
            recommendation(results, unit),
            "",
            "## The nearest to the exact polar factor within a budget",
            "",
            "| budget | set | FLOPs | distance | cosine |",
            "|---|---|---|---|---|",
            *(budget_line(results, limit, unit) for limit in (0.6, 0.8, 1.0, 1.2, 1.5, 2.0)),
            "",
            "## All of them (* nothing is both cheaper and nearer)",
            "",
            "| set | steps | FLOPs | distance | cosine | orthogonality error |",
            "|---|---|---|---|---|---|",
            *(line(result, unit, best) for result in results),
            "",
        ]
    )
