"""Tables of runs: CSV, TSV or JSON lines, a row for each run.

Columns are found by name in upper or lower case; `ALIASES` lists the names that each may have.
Columns with other names are kept under these. `DERIVED` lists what is computed if its column is
missing.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muonscale.errors import StudyError, nearest, shown
from muonscale.lab.files import read_text
from muonscale.lab.fits.allocation import FLOPS
from muonscale.lab.fits.result import BoolArray, FloatArray

ALIASES = {
    "parameters": ("n", "params", "parameters", "num_params", "num_parameters", "model_size"),
    "tokens": ("d", "tokens", "training_tokens", "train_tokens", "num_tokens"),
    "flops": ("c", "flops", "compute", "training_flops", "total_flops"),
    "loss": ("l", "loss", "validation_loss", "val_loss", "eval_loss"),
    "batch": ("b", "batch", "batch_size", "batch_tokens"),
    "steps": ("s", "steps", "num_steps", "steps_to_target"),
    "target": ("target", "target_loss"),
    "optimizer": ("optimizer", "optimiser", "rule", "group"),
    "rung": ("rung",),
}
DERIVED: dict[str, tuple[tuple[str, str], Callable[..., FloatArray], str]] = {
    "flops": (
        ("parameters", "tokens"),
        lambda parameters, tokens: FLOPS * parameters * tokens,
        "FLOPs are 6 x parameters x tokens: the table has no column of FLOPs.",
    ),
    "steps": (
        ("tokens", "batch"),
        lambda tokens, batch: tokens / batch,
        "Steps are tokens / batch: the table has no column of steps.",
    ),
}
"""Columns that it is computed from, the computation, and a note for the user."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BASELINE = "adamw"


@dataclass(frozen=True)
class RunTable:
    """Cells as text by column, with the line of each row in the file."""

    path: Path
    columns: dict[str, tuple[str, ...]]
    """Cells by the name that the file gives the column."""
    lines: tuple[int, ...]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.lines)

    def name(self, what: str) -> str | None:
        """Return the name of the column that holds `what` (a key of ALIASES), or None.

        Raises:
            StudyError: if several columns do.
        """
        names = [name for name in self.columns if name.lower() in ALIASES[what]]
        if len(names) > 1:
            raise StudyError(
                f"{self.path}: columns {' and '.join(names)} both name {what}; rename one of them"
            )
        return names[0] if names else None

    def numbers(self, what: str) -> FloatArray:
        """Return the column that holds `what`, or compute it if the table has the columns it needs.

        Raises:
            StudyError: if there is no such column, or a cell is not a positive finite number.
        """
        name = self.name(what)
        if name is None and what in DERIVED:
            sources, compute, _ = DERIVED[what]
            if all(map(self.name, sources)):
                return compute(*map(self.numbers, sources))
        if name is None:
            raise StudyError(
                f"{self.path} has no column for {what}: accepted names are "
                f"{', '.join(ALIASES[what])}; the columns are {', '.join(self.columns)}"
            )
        values = []
        for line, cell in zip(self.lines, self.columns[name], strict=True):
            try:
                value = float(cell)
            except ValueError:
                raise StudyError(
                    f"{self.path}, line {line}, column {name}: {shown(cell)} is not a number; write "
                    "numbers as 1200000 or 1.2e6, without separators of thousands and units"
                ) from None
            if not (math.isfinite(value) and value > 0):
                raise StudyError(
                    f"{self.path}, line {line}, column {name}: {shown(cell)} is not a positive "
                    "finite number; leave out runs that diverged"
                )
            values.append(value)
        return np.array(values)

    def labels(self, column: str) -> tuple[str, ...]:
        """Return the cells of a column by the name that the file gives it.

        Raises:
            StudyError: if there is no such column, or a cell is empty.
        """
        if column not in self.columns:
            raise StudyError(f"{self.path} has no column {column}; {nearest(column, self.columns)}")
        for line, cell in zip(self.lines, self.columns[column], strict=True):
            if not cell:
                raise StudyError(f"{self.path}, line {line}, column {column}: the cell is empty")
        return self.columns[column]

    def select(self, rows: BoolArray) -> RunTable:
        """Return a table of some of the rows."""
        kept = {
            name: tuple(cell for cell, keep in zip(cells, rows, strict=True) if keep)
            for name, cells in self.columns.items()
        }
        lines = tuple(line for line, keep in zip(self.lines, rows, strict=True) if keep)
        return RunTable(self.path, kept, lines)

    def split(self, column: str | None) -> dict[str, RunTable]:
        """Return the rows of each group, in the order of the table; one group "" without a column.

        Raises:
            StudyError: if there is no such column, or one of its cells is empty.
        """
        if column is None:
            return {"": self}
        labels = np.array(self.labels(column))
        return {label: self.select(labels == label) for label in dict.fromkeys(labels.tolist())}


def choose_baseline(groups: list[str], reference: str | None) -> str:
    """Return the group that others are compared with: `reference`, else AdamW, else the first.

    Raises:
        StudyError: if no group is named `reference`.
    """
    if reference is not None:
        if reference not in groups:
            raise StudyError(f"there is no group {reference}; {nearest(reference, groups)}")
        return reference
    return next((group for group in groups if group.lower() == BASELINE), groups[0])


def read_table(path: Path) -> RunTable:
    """Read a table of runs.

    Args:
        path: a .csv or .tsv file whose first line names the columns, or a .jsonl file of objects.

    Raises:
        StudyError: for another suffix, text that cannot be read, rows of another length than the
            header, or no rows.
    """
    suffix = path.suffix.lower()
    if suffix not in (*DELIMITERS, ".jsonl"):
        raise StudyError(f"{path} ends in {suffix!r}; a table must be a .csv, .tsv or .jsonl file")
    try:
        text = read_text(path).removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise StudyError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise StudyError(f"{path}, line {line}: NUL characters are not text")
    table = _read_json_lines(path, text) if suffix == ".jsonl" else _read_delimited(path, text)
    if not len(table):
        raise StudyError(f"{path} has no rows; it needs one for each run")
    return table


def _read_delimited(path: Path, text: str) -> RunTable:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix.lower()])
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise StudyError(f"{path}, line {reader.line_num}: {error}") from error
    rows = [(line, row) for line, row in rows if any(row)]
    if not rows:
        raise StudyError(f"{path} has no line with text; the first line must name the columns")
    (_, header), *body = rows
    for name in header:
        if not name or header.count(name) > 1:
            raise StudyError(f"{path}: every column needs a name of its own, got {header}")
    for line, row in body:
        if len(row) != len(header):
            raise StudyError(
                f"{path}, line {line}: {len(row)} cells, but the header names {len(header)} columns"
            )
    columns = {name: tuple(row[place] for _, row in body) for place, name in enumerate(header)}
    return RunTable(path, columns, tuple(line for line, _ in body))


def _row(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return an object of JSON; of two values of a key, Python would drop one."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a key occurs twice among {[key for key, _ in pairs]}")
    return row


def _read_json_lines(path: Path, text: str) -> RunTable:
    rows: dict[int, dict[str, object]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line, object_pairs_hook=_row)
        except (ValueError, RecursionError) as error:
            raise StudyError(f"{path}, line {number}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise StudyError(
                f"{path}, line {number} is {shown(row, 80)}; every line must be an object"
            )
        rows[number] = row
    columns = {
        name: tuple("" if row.get(name) is None else str(row[name]) for row in rows.values())
        for name in dict.fromkeys(name for row in rows.values() for name in row)
    }
    return RunTable(path, columns, tuple(rows))
