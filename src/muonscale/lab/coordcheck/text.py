"""What `muonscale coordcheck` prints."""

from __future__ import annotations

from typing import Any

from muonscale.lab.coordcheck.words import HEAD, cells, heading, verdict_line, worst_rows
from muonscale.optim.parameters.report import aligned


def check_text(facts: dict[str, Any], *, full: bool = False) -> str:
    """Return the report for a console.

    Args:
        facts: of `check_facts`.
        full: a line for every module and parameter, not the worst of each part and quantity.
    """
    rows = facts["rows"] if full else worst_rows(facts["rows"])
    table = aligned([list(HEAD), *(list(cells(row)) for row in rows)])
    return "\n".join([*heading(facts), "", table, "", verdict_line(facts)])
