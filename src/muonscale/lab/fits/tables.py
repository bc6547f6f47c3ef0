"""Tables of runs that users bring: CSV, TSV or JSON lines, a row for each run.

Columns are found by name, whatever its case: `ALIASES` lists the names that each may have. Columns
with other names are kept, and can be asked for by them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from muonscale.errors import StudyError, nearest, shown
from muonscale.lab.fits.result import BoolArray, FloatArray

ALIASES = {
    "parameters": ("n", "params", "parameters", "num_params", "num_parameters", "model_size"),
    "tokens": ("d", "tokens", "training_tokens", "train_tokens", "num_tokens"),
    "flops": ("c", "flops", "compute", "training_flops", "total_flops"),
    "loss": ("l", "loss", "held_out_loss", "validation_loss", "val_loss", "eval_loss"),
    "batch": ("b", "batch", "batch_size", "batch_tokens"),
    "steps": ("s", "steps", "num_steps", "steps_to_target"),
    "target": ("target", "target_loss"),
    "optimizer": ("optimizer", "optimiser", "rule", "group"),
    "rung": ("rung",),
}
DELIMITERS = {".csv": ",", ".tsv": "\t"}


@dataclass(frozen=True)
class RunTable:
    """Rows of text by column, with the lines that they stood on."""

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
        found = [name for name in self.columns if name.lower() in ALIASES[what]]
        if len(found) > 1:
            raise StudyError(
                f"{self.path}: columns {' and '.join(found)} both name {what}; rename one of them"
            )
        return found[0] if found else None

    def numbers(self, what: str) -> FloatArray:
        """Return the column that holds `what`.

        Raises:
            StudyError: if there is none, or a cell is not a positive finite number.
        """
        name = self.name(what)
        if name is None:
            raise StudyError(
                f"{self.path} has no column for {what}: accepted names are "
                f"{', '.join(ALIASES[what])}; the columns are {', '.join(self.columns)}"
            )
        cells = zip(self.lines, self.columns[name], strict=True)
        return np.array([self._number(name, *cell) for cell in cells])

    def labels(self, column: str) -> tuple[str, ...]:
        """Return the cells of a column by the name that the file gives it.

        Raises:
            StudyError: if there is no such column, or a cell is empty.
        """
        if column not in self.columns:
            raise StudyError(f"{self.path} has no column {column}; {nearest(column, self.columns)}")
        for line, cell in zip(self.lines, self.columns[column], strict=True):
            if not cell:
                raise StudyError(
                    f"{self.path}, line {line}, column {column}: the cell is empty; every row needs one"
                )
        return self.columns[column]

    def select(self, rows: BoolArray) -> RunTable:
        """Return a table of some of the rows."""
        kept = {
            name: tuple(cell for cell, keep in zip(cells, rows, strict=True) if keep)
            for name, cells in self.columns.items()
        }
        lines = tuple(line for line, keep in zip(self.lines, rows, strict=True) if keep)
        return RunTable(self.path, kept, lines)

    def _number(self, column: str, line: int, cell: str) -> float:
        try:
            value = float(cell)
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value > 0):
            raise StudyError(
                f"{self.path}, line {line}, column {column}: {shown(cell)} is not a positive finite "
                "number; leave out runs that diverged"
            )
        return value


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
        raise StudyError(f"{path} ends in {suffix!r}; accepted are .csv, .tsv and .jsonl files")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise StudyError(
            f"{path} is not UTF-8 text: {error.reason} at byte {error.start}; convert it"
        ) from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise StudyError(f"{path}, line {line}: a NUL is no text; leave it out")
    table = _json_lines(path, text) if suffix == ".jsonl" else _delimited(path, text)
    if not len(table):
        raise StudyError(f"{path} has no rows; give one for each run")
    return table


def _delimited(path: Path, text: str) -> RunTable:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=DELIMITERS[path.suffix.lower()])
    try:
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        raise StudyError(
            f"{path}, line {reader.line_num}: {error}; rows must be cells between delimiters"
        ) from error
    rows = [(line, row) for line, row in rows if any(row)]
    if not rows:
        raise StudyError(
            f"{path} has no line with text; the first must name the columns, the others be runs"
        )
    (_, header), *body = rows
    for name in header:
        if not name or header.count(name) > 1:
            raise StudyError(f"{path}: every column needs a name of its own, got {header}")
    for line, row in body:
        if len(row) != len(header):
            raise StudyError(
                f"{path}, line {line}: {len(row)} cells, but the header names {len(header)} columns"
                "; give every row as many"
            )
    return _table(path, header, [line for line, _ in body], [row for _, row in body])


def _json_lines(path: Path, text: str) -> RunTable:
    lines, rows = [], []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise StudyError(
                f"{path}, line {number}: not JSON ({error}); every line must be an object of columns"
            ) from error
        if not isinstance(row, dict):
            raise StudyError(
                f"{path}, line {number} is {shown(row, 80)}; every line must be an object of columns"
            )
        lines.append(number)
        rows.append(row)
    header = list(dict.fromkeys(name for row in rows for name in row))
    return _table(path, header, lines, [[_cell(row.get(name)) for name in header] for row in rows])


def _cell(value: object) -> str:
    return "" if value is None else str(value)


def _table(path: Path, header: list[str], lines: list[int], rows: list[list[str]]) -> RunTable:
    columns = {name: tuple(row[place] for row in rows) for place, name in enumerate(header)}
    return RunTable(path, columns, tuple(lines))
