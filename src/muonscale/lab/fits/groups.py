"""How a table of runs falls into groups, and which of them the others are compared with."""

from __future__ import annotations

import numpy as np

from muonscale.errors import StudyError, nearest
from muonscale.lab.fits.tables import RunTable

BASELINE = "adamw"


def split(table: RunTable, column: str | None) -> dict[str, RunTable]:
    """Return the rows of each group, in the order of the table; one group "" without a column.

    Raises:
        StudyError: if there is no such column, or one of its cells is empty.
    """
    if column is None:
        return {"": table}
    labels = np.array(table.labels(column))
    return {str(label): table.select(labels == label) for label in dict.fromkeys(labels.tolist())}


def baseline(groups: list[str], asked: str | None) -> str:
    """Return the group that others are compared with: the one asked for, else AdamW, else the first.

    Raises:
        StudyError: if no group has the name that was asked for.
    """
    if asked is not None:
        if asked not in groups:
            raise StudyError(f"there is no group {asked}; {nearest(asked, groups)}")
        return asked
    named = [group for group in groups if group.lower() == BASELINE]
    return named[0] if named else groups[0]


def labelled(group: str, error: StudyError) -> StudyError:
    """Return an error of one group's fit that says whose it is."""
    return StudyError(f"{group}: {error}") if group else error
