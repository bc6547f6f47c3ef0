"""What `muonscale bench` has found, as tables for a console."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muonscale.lab.bench.contenders import ADAMW, OURS, TORCH_MUON
from muonscale.optim.parameters.report import aligned

MB = 1e6


def table(found: dict[str, Any]) -> str:
    """Return the facts of `muonscale.lab.bench.model.bench` as text."""
    return "\n".join(
        [
            *_head(found),
            "",
            "a step, milliseconds: median (quartiles); times ours: of pairs of steps",
            aligned([_TITLES, *(_times(row) for row in found["parts"]), *_totals(found)]),
            "",
            "Newton-Schulz and memory of ours, of what was measured",
            aligned([_WORK_TITLES, *(_work(row) for row in found["parts"])]),
            *_reasons(found["parts"]),
            "",
            *_passes(found),
        ]
    )


_TITLES = ["parameters", "number", "muonscale", "AdamW", "ours / AdamW", "torch's Muon", "/ ours"]
_WORK_TITLES = [
    *("parameters", "matrices", "GFLOP", "GFLOP/s", "of addmm", "state MB", "AdamW's MB"),
    "extra MB",
]


def _head(found: dict[str, Any]) -> list[str]:
    products = f", Newton-Schulz in {found['products']}" if found["products"] else ""
    lines = [
        f"{found['model']}: {found['parameters']:,} parameters, on {found['device']}, "
        f"{found['threads']} threads{products}, {found['rounds']} rounds",
        "AdamW and Muon of torch are on the same parameters: AdamW fused, Muon as shipped (bfloat16)",
        *(f"taken: {text}" for text in found["defaults"]),
    ]
    if found["layers"] is not None:
        lines.append(
            f"measured: the first {found['layers']} of the layers that repeat; the sum is extrapolated"
        )
    return lines


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


def _totals(found: dict[str, Any]) -> list[list[str]]:
    sums, whole = found["sum_of_parts"], found["whole"]
    name = "sum" if found["layers"] is None else "sum, extrapolated"
    ratio = f"{sums[OURS] / sums[ADAMW]:.2f}"
    lines = [
        [name, "", f"{1000 * sums[OURS]:.2f}", f"{1000 * sums[ADAMW]:.2f}", ratio, "", ""],
    ]
    if whole:
        times = [_milliseconds(whole[side]["seconds"]) for side in (OURS, ADAMW)]
        ratio = f"{1 / whole[ADAMW]['times_ours']['median']:.2f}"
        lines.append(["whole model", "", *times, ratio, "", ""])
    return lines


def _milliseconds(spread: dict[str, float]) -> str:
    middle, low, high = (1000 * spread[key] for key in ("median", "low", "high"))
    return f"{middle:.2f} ({low:.2f}-{high:.2f})"


def _work(row: dict[str, Any]) -> list[str]:
    ours, other = row["sides"][OURS], row["sides"][ADAMW]
    rate = ["-", "-", "-"]
    if "flops_per_second" in row:
        part = row["flops_per_second"] / row["addmm_flops_per_second"]
        flops = row["newton_schulz_flops"]
        rate = [f"{flops / 1e9:.3g}", f"{row['flops_per_second'] / 1e9:.1f}", f"{part:.2f}"]
    sizes = (ours["state_bytes"], other["state_bytes"], ours["extra_bytes"])
    return [row["title"], str(row["matrices"] or "-"), *rate, *(f"{s / MB:.2f}" for s in sizes)]


def _reasons(rows: Sequence[dict[str, Any]]) -> list[str]:
    return [
        f"torch.optim.Muon does not step {row['title']}: {row['no_torch_muon']}"
        for row in rows
        if "flops_per_second" in row and row["no_torch_muon"]
    ]


def _passes(found: dict[str, Any]) -> list[str]:
    passes, tokens = found["passes"], found["tokens"]
    if "not_measured" in passes:
        return [f"forward and backward: not measured: {passes['not_measured']}"]
    shares = found["share"]
    return [
        f"forward and backward: {_milliseconds(passes['seconds'])} ms for a micro-batch of "
        f"{passes['micro_tokens']:,} tokens",
        f"of a training step of {tokens:,} tokens the optimizer is {shares[OURS]:.1%} with ours, "
        f"{shares[ADAMW]:.1%} with AdamW",
    ]
