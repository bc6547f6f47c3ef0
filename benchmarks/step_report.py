"""The tables of benchmarks/optimizer_step.py, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from peers import Side
from step_meter import Workload

from muonscale.lab.console import dtype_text

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 2e-2}
"""Of the direction, relative, by dtype of the products."""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def faster(row: dict[str, Any]) -> tuple[float, float, float]:
    """Return quartiles of (its seconds / seconds of ours beside it)."""
    return quartiles([theirs / ours for ours, theirs in row["pairs"]])


def verdict(row: dict[str, Any], side: Side) -> str:
    tolerance = TOLERANCE[side.products]
    if row["error"] <= tolerance:
        return f"{row['error']:.0e}"
    return f"**{row['error']:.2g}, not within {tolerance:g}: another update**"


def line(side: Side, row: dict[str, Any], result: dict[str, Any], workload: Workload) -> str:
    """Return one line of a workload's table."""
    start = f"| {side.name} | {dtype_text(side.products)} |"
    if "not_run" in row:
        return f"{start} {row['not_run']} | | | | | | |"
    median = statistics.median(row["seconds"])
    ratio = "-"
    if row["pairs"]:
        low, middle, high = faster(row)
        ratio = f"{middle:.2f} ({low:.2f}-{high:.2f})"
    rate = result["rates"][str(side.products)]
    executed = f"{row['flops'] / median / rate:.2f}" if row["flops"] else "-"
    return (
        f"{start} {median * 1e3:,.1f} | {ratio} | {verdict(row, side)} | {executed} "
        f"| {workload.flops / median / rate:.2f} "
        f"| {row['extra_bytes'] / workload.largest_batch_bytes:.2f} "
        f"| {row['state_bytes'] / workload.numel:.2f} |"
    )


def details(workload: Workload, sides: Sequence[Side], result: dict[str, Any]) -> list[str]:
    """Return the section of one workload."""
    rates = ", ".join(
        f"{name.removeprefix('torch.')} {rate / 1e9:.0f}" for name, rate in result["rates"].items()
    )
    shapes = ", ".join(f"{n} of {out}x{in_}" for n, out, in_ in workload.shapes)
    return [
        f"## {workload.title}",
        "",
        f"{shapes}; {workload.numel / 1e6:.1f}M parameters, {workload.rounds} rounds. Largest batch "
        f"{workload.largest_batch_bytes / 2**20:.1f} MiB. `addmm` of the same shapes, GFLOP/s: "
        f"{rates}.",
        "",
        "| side | products | ms a step | times as long as ours | direction | executed / addmm "
        "| direct / addmm | extra memory | state, bytes |",
        "|---|---|---|---|---|---|---|---|---|",
        *(line(side, result["rows"][side.name], result, workload) for side in sides),
        "",
    ]


def summary(
    workloads: Sequence[Workload], sides: Sequence[Side], results: dict[str, Any]
) -> list[str]:
    """Return the table of ratios alone."""

    def cell(side: Side, name: str) -> str:
        row = results[name]["rows"][side.name]
        if "not_run" in row:
            return "failed" if row["not_run"].startswith("failed") else "not run"
        wrong = "" if row["error"] <= TOLERANCE[side.products] else " (another update)"
        return f"{faster(row)[1]:.2f}{wrong}" if row["pairs"] else "1"

    names = [workload.name for workload in workloads]
    return [
        f"| side | products | {' | '.join(names)} |",
        "|---|---|" + "---|" * len(names),
        *(
            f"| {side.name} | {dtype_text(side.products)} | "
            f"{' | '.join(cell(side, name) for name in names)} |"
            for side in sides
        ),
        "",
    ]


def explanation(sides: Sequence[Side]) -> list[str]:
    if any(side.ours and side.products == torch.bfloat16 for side in sides):
        bf16 = (
            "This CPU has fast bfloat16 products, so that peers with products in bfloat16 stand "
            "beside ours in bfloat16. On CPUs without such instructions the bfloat16 that most "
            "peers fix in their code makes them 50 to 100 times slower than in float32."
        )
    else:
        bf16 = (
            "This CPU has no fast bfloat16 products, so that ours is measured in float32 alone, "
            "and peers as shipped stand beside that."
        )
    return [
        "- *times as long as ours*: median (and quartiles) over pairs of steps taken one right "
        "after the other; ours has products of the same dtype, or float32 where it has not. "
        f"{bf16}",
        "- *direction*: `||U/||U|| - R/||R||||` of the first update against Newton-Schulz in float64 "
        "with the side's own coefficients, the largest over the shapes; it must be below "
        + ", ".join(f"{dtype_text(dtype)} {value:g}" for dtype, value in TOLERANCE.items())
        + ".",
        "- *executed / addmm*: matrix-product FLOP/s of the whole step, over the rate of `addmm` at "
        "the same shapes and dtype in the same run. *direct / addmm*: the same with the FLOPs of "
        "the direct form, `4*S^2*L + 2*S^3` per Newton-Schulz step, whatever was executed. `-`: "
        "compiled graphs, not counted.",
        "- *extra memory*: most bytes of tensors alive at once during a step beyond those before "
        "it, in multiples of the largest batch: all matrices of one shape, in float32.",
        "- *state*: bytes per Muon parameter, kept between steps.",
        "",
    ]


def report(workloads: Sequence[Workload], sides: Sequence[Side], content: dict[str, Any]) -> str:
    """Return everything as Markdown.

    Args:
        workloads: those that have been measured.
        sides: all sides, in the order of the tables.
        content: what `optimizer_step.Kept` keeps.
    """
    key, results = content["key"], content["workloads"]
    facts = key["machine"]
    versions = ", ".join(f"{package} {version}" for package, version in key["versions"].items())
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in content["rates"].items())
    text = [
        "# One optimizer step, ours and others",
        "",
        f"`{key['command']}`",
        "",
        f"{facts['cpu']} ({', '.join(facts['features'])}; torch runs {facts['capability']} code), "
        f"{facts['threads']} threads, Python {facts['python']}. Best rate of a 256 x 256 `addmm`, "
        f"GFLOP/s: {rates}. Sources: {versions}, all from PyPI but muonscale; sha256 of our optimizer "
        f"and this benchmark {key['sources']}. Muon parameters only, full-rank random gradients.",
        "",
        "How many times as long as ours a step takes:",
        "",
        *summary(workloads, sides, results),
        *explanation(sides),
    ]
    for workload in workloads:
        text += details(workload, sides, results[workload.name])
    text += ["## How each side is set", ""]
    text += [
        "Momentum 0.95 with Nesterov, five Newton-Schulz steps, Jordan's coefficients, update RMS 0.2, "
        "decoupled decay: wherever a side has the option.",
        "",
    ]
    text += [f"- {side.name}: {side.how}." for side in sides]
    return "\n".join([*text, ""])
