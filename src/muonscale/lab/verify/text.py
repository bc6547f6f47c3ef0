"""What `muonscale verify` prints."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from muonscale.lab.console import dtype_text, table_text
from muonscale.lab.files import to_json
from muonscale.lab.verify.check import Verification
from muonscale.lab.verify.compare import LIMIT, KindT, TrajectoryDifference
from muonscale.optim.parameters.collapse import collapse

SHOWN = 10
"""Lines of a table, unless all are asked for."""

BFLOAT16_NOTE = (
    "note: in bfloat16 rounding is as large as many faults, and a right layout may exceed the "
    "limit; compare in float32"
)

TITLES: dict[KindT, str] = {
    "losses": "losses",
    "gradients": "raw gradients of the first step",
    "weights": "weights after the last step",
}

NUMBERS = ("difference", "rounding", "ratio")


def verification_text(verification: Verification, *, full: bool = False) -> str:
    """Return the report for a console.

    Args:
        verification: the result of `check.verify`.
        full: whether to list every parameter instead of the ten worst kinds.
    """
    config, topology = verification.config, verification.topology
    comparison = verification.comparison
    dtypes = f"passes in {dtype_text(verification.precision)}, Newton-Schulz in {config.optimizer.ns_dtype}"
    heading = [
        f"{config.model.source} in {topology} on {topology.world} processes "
        f"against one process; {dtypes}",
        "rounding: the difference between runs of one process with other orders of summation",
        f"ratio: difference / rounding, at most {LIMIT:g}",
    ]
    if "bfloat16" in dtypes:
        heading.append(BFLOAT16_NOTE)
    losses = zip(comparison.losses, verification.one.losses, verification.other.losses, strict=True)
    kind, row = comparison.worst
    where = f"{row.ratio:.3g} times the expected rounding ({TITLES[kind]}: {row.name})"
    if comparison.same:
        verdict = f"same: {topology} differs from one process by at most {where}"
    else:
        verdict = f"NOT THE SAME: {topology} differs from one process by {where}"
    return "\n\n".join(
        [
            "\n".join(heading),
            table_text(
                [[row.name, f"{a:.7f}", f"{b:.7f}", *_numbers(row)] for row, a, b in losses],
                ("loss", "one process", str(topology), *NUMBERS),
            ),
            _table("gradients", comparison.gradients, full),
            _table("weights", comparison.weights, full),
            verdict,
        ]
    )


def _table(kind: KindT, rows: Sequence[TrajectoryDifference], full: bool) -> str:
    """Return a table of differences, the largest ratios first.

    Without `full`, a parameter that layers repeat is one line with the worst of them.
    """
    lines = [(row.name, 1, row) for row in rows]
    if not full:
        worst: dict[str, TrajectoryDifference] = {}
        for row in rows:
            pattern = re.sub(r"\d+", "", row.name)
            worst[pattern] = max(worst.get(pattern, row), row, key=lambda one: one.ratio)
        collapsed = collapse([(row.name, (re.sub(r"\d+", "", row.name),)) for row in rows])
        lines = [(line.name, line.count, worst[line.facts[0]]) for line in collapsed]
    lines.sort(key=lambda line: -line[2].ratio)
    shown = lines if full else lines[:SHOWN]
    text = table_text(
        [[name, f"{count}x", row.group, *_numbers(row)] for name, count, row in shown],
        (TITLES[kind], "times", "group", *NUMBERS),
    )
    rest = len(lines) - len(shown)
    return text + (f"\n... and {rest} lines with smaller ratios (--full)" if rest else "")


def _numbers(row: TrajectoryDifference) -> list[str]:
    return [f"{row.difference:.1e}", f"{row.rounding:.1e}", f"{row.ratio:.3g}"]


def verification_json(verification: Verification) -> str:
    """Return the report as JSON; a number that is not finite is null."""

    def plain(row: TrajectoryDifference) -> dict[str, Any]:
        return {**asdict(row), "ratio": row.ratio, "within": row.within}

    comparison = verification.comparison
    kind, worst = comparison.worst
    tree: dict[str, Any] = {
        "model": verification.config.model.source,
        "layout": str(verification.topology),
        "processes": verification.topology.world,
        "steps": len(verification.one.losses),
        "precision": dtype_text(verification.precision),
        "ns_dtype": verification.config.optimizer.ns_dtype,
        "limit": LIMIT,
        "same": comparison.same,
        "worst": {"kind": kind, **plain(worst)},
        "loss": {
            "one_process": verification.one.losses,
            "layout": verification.other.losses,
        },
    }
    for name in TITLES:
        tree[name] = [plain(row) for row in getattr(comparison, name)]
    return to_json(tree)
