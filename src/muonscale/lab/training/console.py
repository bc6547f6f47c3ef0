"""Console output of a run: a live progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

if TYPE_CHECKING:
    from muonscale.lab.data.prepare import OnProgress

PLAIN_LINES = 20
"""Number of progress lines that a run prints without a terminal."""


class RunConsole:
    """Prints the messages and the progress of a run to standard output."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)

    @classmethod
    def silent(cls) -> RunConsole:
        """Return one that prints nothing, for all ranks but the first."""
        return cls(Console(quiet=True))

    def log(self, text: str) -> None:
        """Print a message."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self.console.print(f"warning: {text}", markup=False, style="yellow")

    @contextmanager
    def stages(self) -> Generator[OnProgress]:
        """Show the progress of stages that report (stage, done, total or None)."""
        if self.console.is_terminal:
            with _bar(self.console) as progress:
                tasks: dict[str, Any] = {}

                def show(stage: str, done: int, total: int | None) -> None:
                    if stage not in tasks:
                        tasks[stage] = progress.add_task(stage, total=total, status="")
                    progress.update(tasks[stage], completed=done, total=total)

                yield show
        else:
            seen: set[str] = set()

            def announce(stage: str, done: int, total: int | None) -> None:
                if stage not in seen:
                    seen.add(stage)
                    self.log(f"data: {stage}")

            yield announce

    @contextmanager
    def steps(self, done: int, total: int) -> Generator[Callable[[dict[str, Any]], None]]:
        """Show the training records given to it: loss, lr, tokens/s, optimizer ms, time left."""
        if self.console.is_terminal:
            with _bar(self.console) as progress:
                task = progress.add_task("training", total=total, completed=done, status="")
                yield lambda record: progress.update(
                    task, completed=record["step"], status=describe(record)
                )
        else:
            every, seconds = max(1, total // PLAIN_LINES), 0.0

            def show_line(record: dict[str, Any]) -> None:
                nonlocal seconds
                seconds += record["step_ms"] / 1000
                step = record["step"]
                left = round(seconds / (step - done) * (total - step))
                if step % every == 0 or step in (done + 1, total):
                    clock = f"{left // 60}:{left % 60:02d}"
                    self.log(f"step {step}/{total}  {describe(record)}  left {clock}")
                    sys.stdout.flush()

            yield show_line


def describe(record: dict[str, Any]) -> str:
    """Return the main figures of a training record as text."""
    lr = next(iter(record["lr"].values()))
    return (
        f"loss {record['loss']:.3f}  lr {lr:.2e}  {record['tokens_per_second']:,.0f} tok/s  "
        f"optimizer {record['optimizer_ms']:.0f} ms"
    )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TaskProgressColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
        console=console,
    )
