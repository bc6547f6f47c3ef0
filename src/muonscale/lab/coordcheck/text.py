"""A coordinate check as text. It needs `coordcheck.json` alone and imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from muonscale.lab.console import table_text
from muonscale.lab.coordcheck.tolerances import QUANTITIES, Limit

HEAD = ("part", "quantity", "slope", "interval", "expected", "verdict", "name")


def check_text(facts: dict[str, Any], *, full: bool = False) -> str:
    """Return the report for a console.

    Args:
        facts: the result of `check_facts`.
        full: whether to list every module and parameter instead of the worst of each part and
            quantity.
    """
    rows = facts["rows"] if full else worst_rows(facts["rows"])
    table = table_text([cells(row) for row in rows], HEAD)
    return "\n".join([*heading(facts), "", table, "", verdict_line(facts)])


def heading(facts: dict[str, Any]) -> list[str]:
    """Return sentences about what was checked and how to read the table."""
    widths, steps = facts["widths"], facts["judged_steps"]
    wider = "more heads" if facts["grow"] == "heads" else "longer heads"
    return [
        f"{facts['model']} ({facts['model_type']}, {facts['layers']} layers) at widths "
        f"{', '.join(map(str, widths))} ({wider}), seeds {', '.join(map(str, facts['seeds']))}; "
        f"{facts['steps']} steps of {facts['batch_tokens']:,} tokens",
        f"transfer.convention={facts['convention']}, optimizer.rule={facts['rule']}, "
        f"scale={facts['scale']}, lr={facts['lr']:g} at width {widths[0]}",
        f"slope: exponent of the width with its {100 * facts['confidence']:.0f} % interval, over "
        f"steps {steps[0]} to {steps[-1]} unless the quantity says before training",
        *(f"note: {note}" for note in facts["notes"]),
    ]


def worst_rows(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the row of each part and quantity that decides its verdict."""

    def badness(row: dict[str, Any]) -> tuple[int, float]:
        limit = Limit(lowest=row["lowest"], highest=row["highest"], tolerance=row["tolerance"])
        off = float("inf") if row["slope"] is None else limit.off(row["slope"])
        return ("pass", "undecided", "fail").index(row["outcome"]), off

    worst: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        key = row["part"], row["quantity"]
        worst[key] = max(worst.get(key, row), row, key=badness)
    return list(worst.values())


def cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Return a row of `facts["rows"]` as text."""
    if row["slope"] is None:
        slope, interval = "-", "zero or not finite"
    else:
        slope, interval = f"{row['slope']:+.2f}", f"{row['low']:+.2f} to {row['high']:+.2f}"
    low, high = (f"{row[key] + 0.0:.2g}" for key in ("lowest", "highest"))  # no minus before 0
    return (
        row["part"],
        QUANTITIES[row["quantity"]],
        slope,
        interval,
        f"{high if low == high else f'{low} to {high}'} +- {row['tolerance']:g}",
        row["outcome"] if row["outcome"] == "pass" else row["outcome"].upper(),
        row["name"],
    )


def verdict_line(facts: dict[str, Any]) -> str:
    """Return the verdict of the check in a sentence."""
    parts = facts["parts"]
    ratio = facts["widths"][-1] / facts["widths"][0]
    if facts["passed"]:
        return (
            f"PASS: none of the {len(parts)} parts depends on the width, over a factor of {ratio:g}"
        )
    sentences = []
    meanings = {"fail": "depends on the width", "undecided": "may depend on the width"}
    for outcome, meaning in meanings.items():
        names = [part["part"] for part in parts if part["worst"]["outcome"] == outcome]
        if names:
            sentences.append(f"{meaning}: {', '.join(names)}")
    if has_passed(facts) is None:
        sentences.append("more --seeds or --widths narrow the intervals")
    return f"FAIL: {'; '.join(sentences)}"


def has_passed(facts: dict[str, Any]) -> bool | None:
    """Return whether the check passed; None if it did not pass but nothing failed either."""
    if facts["passed"]:
        return True
    return False if any(row["outcome"] == "fail" for row in facts["rows"]) else None
