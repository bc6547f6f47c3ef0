"""A coordinate check in words. Made of `coordcheck.json` alone, as all that imports no torch is."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from muonscale.lab.coordcheck.tolerances import QUANTITIES

HEAD = ("part", "quantity", "slope", "interval", "right if", "verdict", "of")


def check_json(facts: dict[str, Any]) -> str:
    """Return the facts as JSON."""
    return json.dumps(facts, indent=1)


def heading(facts: dict[str, Any]) -> list[str]:
    """Return what was checked, and how to read it, in sentences."""
    widths, steps = facts["widths"], facts["judged_steps"]
    wider = "more heads" if facts["grow"] == "heads" else "longer heads"
    return [
        f"{facts['model']} ({facts['model_type']}, {facts['layers']} layers) at widths "
        f"{', '.join(map(str, widths))} ({wider}), seeds {', '.join(map(str, facts['seeds']))}; "
        f"{facts['steps']} steps of {facts['batch_tokens']:,} tokens",
        f"transfer.convention={facts['convention']}, optimizer.rule={facts['rule']}, "
        f"scale={facts['scale']}, lr={facts['lr']:g} at width {widths[0]}",
        f"slope: exponent of the width, with its {100 * facts['confidence']:.0f} % interval; of steps "
        f"{steps[0]} to {steps[-1]}, unless it says before training",
        *(f"note: {note}" for note in facts["notes"]),
    ]


def worst_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return of the rows of each part and quantity the one that decides."""
    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["part"], row["quantity"]
        worst[key] = max(worst.get(key, row), row, key=_badness)
    return list(worst.values())


def _badness(row: dict[str, Any]) -> tuple[int, float]:
    order = ("pass", "undecided", "fail").index(row["outcome"])
    if row["slope"] is None:
        return order, float("inf")
    off = max(row["lowest"] - row["slope"], row["slope"] - row["highest"], 0.0)
    return order, off / row["tolerance"]


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row as text."""
    if row["slope"] is None:
        slope, interval = "-", "zero or not finite"
    else:
        slope, interval = f"{row['slope']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}"
    return (
        row["part"],
        QUANTITIES[row["quantity"]],
        slope,
        interval,
        _bounds(row),
        row["outcome"] if row["outcome"] == "pass" else row["outcome"].upper(),
        row["name"],
    )


def _bounds(row: dict[str, Any]) -> str:
    low, high = (f"{row[key]:.2g}" for key in ("lowest", "highest"))
    middle = high if low == high else f"{low} to {high}"
    return f"{middle} +- {row['tolerance']:g}"


def verdict_line(facts: dict[str, Any]) -> str:
    """Return the verdict of the check in a sentence."""
    parts = facts["parts"]
    ratio = facts["widths"][-1] / facts["widths"][0]
    if facts["passed"]:
        return (
            f"PASS: none of the {len(parts)} parts depends on the width, over a factor of {ratio:g}"
        )
    said = []
    for outcome, words in (("fail", "depends on the width"), ("undecided", "is not decided")):
        names = [part["part"] for part in parts if part["worst"]["outcome"] == outcome]
        if names:
            said.append(f"what {words}: {', '.join(names)}")
    more = "" if _some_failed(facts) else "; more --seeds or --widths narrow the intervals"
    return f"FAIL: {'; '.join(said)}{more}"


def _some_failed(facts: dict[str, Any]) -> bool:
    return any(row["outcome"] == "fail" for row in facts["rows"])


def told_apart(facts: dict[str, Any]) -> bool | None:
    """Return whether a check has passed, None where it did not and nothing of it has failed either."""
    if facts["passed"]:
        return True
    return False if _some_failed(facts) else None
