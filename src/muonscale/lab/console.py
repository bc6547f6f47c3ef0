"""Text for a console: tables, and how bytes, seconds, counts and dtypes are written.

Output is the same on a terminal and in a pipe: no colors, and no line is cut or wrapped.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

WIDTH = 100_000
"""Characters of a line; rich cuts what is longer."""


_UNIT = r"%|[kMGBT]?B|[KMGT]iB|[kMGBTP]|ms|s|min|h|d|x"
_AMOUNT = rf"[+\-\u2212]?[$]?(\d[\d,]*\.?\d*|\.\d+)(e[+\-]?\d+)?( ?({_UNIT}))?"
NUMBER = re.compile(
    rf"{_AMOUNT}( ?(±|to) ?{_AMOUNT})?|\d+ (min|h|d) \d+ \w+|nan|inf", re.IGNORECASE
)
"""A number, an interval or a time such as 1 h 12 min, with or without a unit."""

BLANK = ("", "-", "?", "\u2013", "\u2014")
"""Cells that stand for a missing number."""


def table_text(rows: Sequence[Sequence[str]], head: Sequence[str] = (), *, indent: int = 0) -> str:
    """Return rows in columns; columns of numbers are aligned to the right.

    Args:
        rows: cells, as many in each row.
        head: titles of the columns, or nothing for a table without them.
        indent: spaces before each line.
    """
    columns = len(head or (rows[0] if rows else ()))
    table = Table(box=None, show_header=bool(head), pad_edge=False, padding=(0, 2, 0, 0))
    for n in range(columns):
        right = is_number_column([row[n] for row in rows])
        title = Text(head[n] if head else "")
        table.add_column(title, justify="right" if right else "left", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, row))
    text = io.StringIO()
    Console(file=text, width=WIDTH, color_system=None, force_jupyter=False).print(table)
    return "\n".join(" " * indent + line.rstrip() for line in text.getvalue().splitlines())


def is_number(cell: str) -> bool:
    """Return whether a cell of a table is a number or an interval, with or without a unit."""
    return NUMBER.fullmatch(cell.strip()) is not None


def is_number_column(cells: Iterable[str]) -> bool:
    """Return whether all cells that are not blank are numbers or per cent, and there is one."""
    known = [cell.removesuffix(" %") for cell in cells if cell.strip() not in BLANK]
    return bool(known) and all(map(is_number, known))


def stderr_console() -> Console:
    """Return a console for progress messages, which leave standard output to the result."""
    return Console(stderr=True, highlight=False, soft_wrap=True)


def bytes_text(number: int) -> str:
    """Return bytes in the largest unit that they fill: 640 B, 12.00 KiB, 3.25 GiB."""
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= factor:
            return f"{number / factor:,.2f} {unit}"
    return f"{number} B"


def seconds_text(seconds: float) -> str:
    """Return seconds, in milliseconds if they are less than one."""
    return f"{seconds * 1000:,.3g} ms" if seconds < 1 else f"{seconds:,.3f} s"


def duration_text(seconds: float) -> str:
    """Return a time as people say it: 0.3 s, 8 s, 2 min 5 s, 1 h 12 min, 4 d 3 h."""
    if round(seconds) < 60:
        return f"{seconds:.1g} s" if seconds < 0.95 else f"{seconds:.0f} s"
    for big, small, unit, next_unit in ((60, 1, "min", "s"), (3600, 60, "h", "min")):
        whole, rest = divmod(round(seconds / small), big // small)
        if whole < 60:
            return f"{whole} {unit} {rest} {next_unit}" if rest else f"{whole} {unit}"
    days, hours = divmod(round(seconds / 3600), 24)
    return f"{days:,} d {hours} h" if hours else f"{days:,} d"


def si_text(number: float) -> str:
    """Return a number with three digits and a suffix: 950, 8.19 k, 121 G; above 1000 P 1.2e+21."""
    for factor, suffix in (
        (1e3, ""),
        (1e6, "k"),
        (1e9, "M"),
        (1e12, "G"),
        (1e15, "T"),
        (1e18, "P"),
    ):
        digits = f"{number / (factor / 1e3):.3g}"
        if abs(float(digits)) < 1000:
            return f"{digits} {suffix}".rstrip()
    return f"{number:.3g}"


def si_bytes(number: float) -> str:
    """Return bytes in short: 950B, 1.21GB."""
    return f"{si_text(number)}B".replace(" ", "").replace("k", "K")


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 run, 2 runs, 12,000 batches."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def dtype_text(dtype: object) -> str:
    """Return the name of a torch dtype without `torch.`: bfloat16."""
    return str(dtype).removeprefix("torch.")
