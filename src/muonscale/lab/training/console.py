"""Console output of a run: a live progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
)
from rich.text import Text

from muonscale.lab.console import duration_text, si_text

if TYPE_CHECKING:
    from muonscale.lab.data.prepare import OnProgress

PLAIN_LINES = 20
"""Number of progress lines of a run without a terminal, if none of its steps takes long."""
MAX_SILENCE = 30.0
"""The longest time between two lines without a terminal, in seconds."""
PACE_STEPS = 20
"""Number of last steps whose time tells the speed and the time left."""


class RunConsole:
    """Prints the messages and the progress of a run to standard output."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(highlight=False, soft_wrap=True)
        self._validation: float | None = None

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

    def validation(self, record: dict[str, Any], total: int) -> None:
        """Print an evaluation of step `total` or before; the progress shows its loss from now on."""
        self._validation = record["validation_loss"]
        self.log(f"step {record['step']}/{total}  validation loss {self._validation:.3f}")

    @contextmanager
    def stages(self, of: str = "data: ") -> Generator[OnProgress]:
        """Show the progress of stages that report (stage, done, total or None).

        Args:
            of: begins every line that is printed without a terminal.
        """
        if self.console.is_terminal:
            with _Bar(self.console) as progress:
                tasks: dict[str, Any] = {}

                def show(stage: str, done: int, total: int | None) -> None:
                    if stage not in tasks:
                        tasks[stage] = progress.add_task(stage, total=total, left="")
                    left = progress.tasks[tasks[stage]].time_remaining
                    progress.update(
                        tasks[stage], completed=done, total=total, left=_left_text(left)
                    )

                yield show
        else:
            begun: dict[str, float] = {}
            last = 0.0

            def announce(stage: str, done: int, total: int | None) -> None:
                nonlocal last
                now = time.monotonic()
                if stage not in begun:
                    begun[stage] = last = now
                    self.log(f"{of}{stage}")
                elif now - last >= MAX_SILENCE:
                    last, elapsed = now, now - begun[stage]
                    how_far = f"for {duration_text(elapsed)}"
                    if total and done:
                        left = elapsed / done * (total - done)
                        how_far = f"{100 * done / total:.0f} %{_left_text(left)}"
                    self.log(f"{of}{stage}: {how_far}")
                    sys.stdout.flush()

            yield announce

    @contextmanager
    def steps(
        self, done: int, total: int, *, every: int | None = None
    ) -> Generator[Callable[[dict[str, Any], Sequence[str]], None]]:
        """Show the training records given to it, each with more figures as text.

        Args:
            done: steps that are done.
            total: steps of the run.
            every: steps between lines if there is no terminal; a twentieth of the run by default.
        """
        pace = _Pace(total)
        if self.console.is_terminal:
            with _Bar(self.console) as progress:
                task = progress.add_task("training", total=total, completed=done, left="")

                def show(record: dict[str, Any], more: Sequence[str] = ()) -> None:
                    pace.add(record)
                    progress.status = "  ".join(self._figures(record, pace, more))
                    progress.update(task, completed=record["step"], left=_left_text(pace.left))

                yield show
        else:
            every, last = every or max(1, total // PLAIN_LINES), time.monotonic()

            def show_line(record: dict[str, Any], more: Sequence[str] = ()) -> None:
                nonlocal last
                pace.add(record)
                step, now = record["step"], time.monotonic()
                due = step % every == 0 or step in (done + 1, total) or now - last >= MAX_SILENCE
                if due:
                    last = now
                    figures = "  ".join(self._figures(record, pace, more))
                    self.log(f"step {step}/{total}  {figures}{_left_text(pace.left)}")
                    sys.stdout.flush()

            yield show_line

    def _figures(self, record: dict[str, Any], pace: _Pace, more: Sequence[str]) -> list[str]:
        """Return the figures of a step, the most important ones first."""
        validation = [] if self._validation is None else [f"val {self._validation:.3f}"]
        return [
            f"loss {record['loss']:.3f}",
            *validation,
            f"grad {math.hypot(*record['grad_norm'].values()):.2g}",
            f"lr {next(iter(record['lr'].values())):.1e}",
            f"{si_text(pace.tokens_per_second).replace(' ', '')} tok/s",
            *([f"MFU {100 * record['mfu']:.0f} %"] if "mfu" in record else []),
            *more,
        ]


class _Pace:
    """The speed of the last steps, and the time that the rest will take."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._step = 0
        self._steps: deque[tuple[float, float]] = deque(maxlen=PACE_STEPS)

    def add(self, record: dict[str, Any]) -> None:
        seconds = record["step_ms"] / 1000
        self._step = record["step"]
        self._steps.append((seconds, record["tokens_per_second"] * seconds))

    @property
    def tokens_per_second(self) -> float:
        return sum(tokens for _, tokens in self._steps) / sum(time for time, _ in self._steps)

    @property
    def left(self) -> float:
        """Seconds of the steps that are left."""
        mean = sum(seconds for seconds, _ in self._steps) / len(self._steps)
        return (self._total - self._step) * mean


class _Bar(Progress):
    """A bar for every task, and a line of figures below that is cut at the width."""

    def __init__(self, console: Console) -> None:
        self.status = ""
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            console=console,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.status:
            yield Text(self.status, no_wrap=True, overflow="ellipsis")


def _left_text(seconds: float | None) -> str:
    return "" if seconds is None else f"  left {duration_text(seconds)}"
