"""Text for a console: tables, and how bytes, seconds, counts and dtypes are written.

Output is the same on a terminal and in a pipe: no colors, and no line is cut or wrapped.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from muonscale.lab.report.tables import is_number_column

WIDTH = 100_000
"""Characters of a line; rich cuts what is longer."""


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


def counted(number: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: 1 run, 2 runs, 12,000 batches."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def dtype_text(dtype: object) -> str:
    """Return the name of a torch dtype without `torch.`: bfloat16."""
    return str(dtype).removeprefix("torch.")
