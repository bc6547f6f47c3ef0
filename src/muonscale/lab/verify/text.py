"""What `muonscale verify` prints."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from muonscale.lab.verify.check import Verified
from muonscale.lab.verify.compare import LIMIT, KindT, Row
from muonscale.optim.parameters.collapse import collapse
from muonscale.optim.parameters.report import aligned

SHOWN = 10
"""Lines of a table, unless all are asked for."""

BLUNT = (
    "note: in bfloat16 rounding is as large as many faults, and a right layout may exceed the limit; "
    "compare in float32"
)

TITLES: dict[KindT, str] = {
    "losses": "losses",
    "gradients": "raw gradients of the first step",
    "weights": "weights after the last step",
}


def verdict_text(found: Verified, *, full: bool = False) -> str:
    """Return the report for a console.

    Args:
        found: what was compared.
        full: a line for every parameter, not the worst of each kind, and of these not the worst ten.
    """
    comparison = found.comparison
    return "\n\n".join(
        [
            _heading(found),
            _losses(found),
            _table("gradients", comparison.gradients, full),
            _table("weights", comparison.weights, full),
            _verdict(found),
        ]
    )


def _heading(found: Verified) -> str:
    config, world = found.config, found.topology.world
    dtypes = f"passes in {_dtype(found)}, Newton-Schulz in {config.optimizer.ns_dtype}"
    lines = [
        f"{config.model.source} in {found.topology} on {world} processes "
        f"against one process; {dtypes}",
        "rounding: what one process differs by when it takes the same steps with other orders of "
        "summation",
        f"ratio: difference / rounding, at most {LIMIT:g}",
    ]
    if "bfloat16" in dtypes:
        lines.append(BLUNT)
    return "\n".join(lines)


def _losses(found: Verified) -> str:
    cells = [["loss", "one process", str(found.topology), "difference", "rounding", "ratio"]]
    pairs = zip(found.comparison.losses, found.one.losses, found.other.losses, strict=True)
    cells += [[row.name, f"{a:.7f}", f"{b:.7f}", *_numbers(row)] for row, a, b in pairs]
    return aligned(cells)


def _table(kind: KindT, rows: Sequence[Row], full: bool) -> str:
    lines = [(row.name, 1, row) for row in rows] if full else _worst_of_each(rows)
    lines.sort(key=lambda line: -line[2].ratio)
    shown = lines if full else lines[:SHOWN]
    cells = [[TITLES[kind], "times", "group", "difference", "rounding", "ratio"]]
    cells += [[name, f"{count}x", row.group, *_numbers(row)] for name, count, row in shown]
    rest = len(lines) - len(shown)
    return aligned(cells) + (f"\n... and {rest} lines with smaller ratios (--full)" if rest else "")


def _worst_of_each(rows: Sequence[Row]) -> list[tuple[str, int, Row]]:
    """Return parameters that layers repeat as one line, with the number and the worst of them."""
    worst: dict[str, Row] = {}
    for row in rows:
        kind = _without_numbers(row.name)
        worst[kind] = max(worst.get(kind, row), row, key=lambda one: one.ratio)
    lines = collapse([(row.name, (_without_numbers(row.name),)) for row in rows])
    return [(line.name, line.count, worst[line.facts[0]]) for line in lines]


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "", name)


def _numbers(row: Row) -> list[str]:
    return [f"{row.difference:.1e}", f"{row.rounding:.1e}", f"{row.ratio:.3g}"]


def _verdict(found: Verified) -> str:
    kind, row = found.comparison.worst
    where = f"{row.ratio:.3g} times the expected rounding ({TITLES[kind]}: {row.name})"
    if found.comparison.same:
        return f"same: {found.topology} differs from one process by at most {where}"
    return f"NOT THE SAME: {found.topology} differs from one process by {where}"


def _dtype(found: Verified) -> str:
    return str(found.precision).removeprefix("torch.")


def verdict_json(found: Verified) -> str:
    """Return the report as JSON; a number that is not finite is null."""
    comparison, (kind, worst) = found.comparison, found.comparison.worst
    tree: dict[str, Any] = {
        "model": found.config.model.source,
        "layout": str(found.topology),
        "processes": found.topology.world,
        "steps": len(found.one.losses),
        "precision": _dtype(found),
        "ns_dtype": found.config.optimizer.ns_dtype,
        "limit": LIMIT,
        "same": comparison.same,
        "worst": {"kind": kind, **_row(worst)},
        "loss": {
            "one_process": [_finite(loss) for loss in found.one.losses],
            "layout": [_finite(loss) for loss in found.other.losses],
        },
    }
    for name in TITLES:
        tree[name] = [_row(row) for row in getattr(comparison, name)]
    return json.dumps(tree, indent=2)


def _row(row: Row) -> dict[str, Any]:
    facts = {**asdict(row), "ratio": row.ratio, "within": row.within}
    return {key: _finite(v) if isinstance(v, float) else v for key, v in facts.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
