"""The facts of `muonscale bench` as tables for a console."""

from __future__ import annotations

from typing import Any

from muonscale.lab.bench.contenders import ADAMW, OURS, TORCH_MUON
from muonscale.lab.console import counted, table_text

TIMES = ("parameters", "number", "muonscale", "AdamW", "ours / AdamW", "torch's Muon", "/ ours")
WORK = (
    "parameters",
    "matrices",
    "GFLOP",
    "GFLOP/s",
    "of addmm",
    "state MB",
    "AdamW's MB",
    "extra MB",
)
MB = 1e6


def bench_text(facts: dict[str, Any]) -> str:
    """Return the facts of `muonscale.lab.bench.model.bench` as text."""
    products = f", Newton-Schulz in {facts['products']}" if facts["products"] else ""
    lines = [
        f"{facts['model']}: {facts['parameters']:,} parameters, on {facts['device']}, "
        f"{counted(facts['threads'], 'thread')}{products}, {counted(facts['rounds'], 'round')}",
        "torch's AdamW (fused) and Muon (as shipped, bfloat16) step the same parameters",
        *(f"assumed: {text}" for text in facts["defaults"]),
    ]
    if facts["layers"] is not None:
        lines.append(
            f"measured: the first {facts['layers']} of the repeated layers; the sum is extrapolated"
        )
    lines += [
        "",
        "milliseconds of a step: median (quartiles); ratios are medians of pairs of steps",
        table_text([*map(_times, facts["parts"]), *_totals(facts)], TIMES),
        "",
        "Newton-Schulz and memory of the measured parameters",
        table_text([_work(row) for row in facts["parts"]], WORK),
        *(
            f"torch.optim.Muon does not step {row['title']}: {row['no_torch_muon']}"
            for row in facts["parts"]
            if "flops_per_second" in row and row["no_torch_muon"]
        ),
        "",
    ]
    passes, shares = facts["passes"], facts.get("share")
    if shares is None:
        lines.append(f"forward and backward: not measured: {passes['not_measured']}")
    else:
        lines += [
            f"forward and backward: {_milliseconds(passes['seconds'])} ms for a micro-batch of "
            f"{passes['micro_tokens']:,} tokens",
            f"the optimizer is {shares[OURS]:.1%} of a training step of {facts['tokens']:,} tokens "
            f"with ours, {shares[ADAMW]:.1%} with AdamW",
        ]
    return "\n".join(lines)


def _times(row: dict[str, Any]) -> list[str]:
    sides = row["sides"]
    measured = "" if row["measured"] == row["parameters"] else f" ({row['measured']} measured)"
    other = sides.get(TORCH_MUON)
    return [
        row["title"],
        f"{row['parameters']}{measured}",
        _milliseconds(sides[OURS]["seconds"]),
        _milliseconds(sides[ADAMW]["seconds"]),
        f"{1 / sides[ADAMW]['times_ours']['median']:.2f}",
        _milliseconds(other["seconds"]) if other else "-",
        f"{other['times_ours']['median']:.2f}" if other else "-",
    ]


def _totals(facts: dict[str, Any]) -> list[list[str]]:
    sums, whole = facts["sum_of_parts"], facts["whole"]
    name = "sum" if facts["layers"] is None else "sum, extrapolated"
    ratio = f"{sums[OURS] / sums[ADAMW]:.2f}"
    rows = [[name, "", f"{1000 * sums[OURS]:.2f}", f"{1000 * sums[ADAMW]:.2f}", ratio, "", ""]]
    if whole:
        times = [_milliseconds(whole[side]["seconds"]) for side in (OURS, ADAMW)]
        ratio = f"{1 / whole[ADAMW]['times_ours']['median']:.2f}"
        rows.append(["whole model", "", *times, ratio, "", ""])
    return rows


def _milliseconds(spread: dict[str, float]) -> str:
    middle, low, high = (1000 * spread[key] for key in ("median", "low", "high"))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _work(row: dict[str, Any]) -> list[str]:
    ours, adamw = row["sides"][OURS], row["sides"][ADAMW]
    rates = ["-", "-", "-"]
    if "flops_per_second" in row:
        share = row["flops_per_second"] / row["addmm_flops_per_second"]
        flops = row["newton_schulz_flops"]
        rates = [f"{flops / 1e9:.3g}", f"{row['flops_per_second'] / 1e9:.1f}", f"{share:.2f}"]
    sizes = (ours["state_bytes"], adamw["state_bytes"], ours["extra_bytes"])
    return [row["title"], str(row["matrices"] or "-"), *rates, *(f"{s / MB:.2f}" for s in sizes)]
