"""Catches Ctrl-C, SIGTERM and SIGHUP; `loop.run_steps` then finishes the step, saves and stops.

A second Ctrl-C stops at once.

A closed terminal sends SIGHUP; torchrun sends it on. Under `nohup` it stays ignored.

A signal may reach any process of a run at any moment. The processes exchange their signals at the
same points of the run and stop together.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupted(Exception):
    """A signal stopped the run after it had saved itself."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.exit_code = 128 + signum

    def __reduce__(self) -> tuple[type[Interrupted], tuple[int, str]]:
        return type(self), (self.signum, str(self))


class StopRequest:
    """The signal that asked the run to stop.

    Args:
        agree: returns on all ranks the signal that any rank passes to it; a collective.
    """

    def __init__(self, agree: Callable[[int | None], int | None] = lambda signum: signum) -> None:
        self.signum: int | None = None
        self._agree = agree

    def requested(self) -> int | None:
        """Return the signal that any rank has received, or None: a collective."""
        if (signum := self._agree(self.signum)) is not None:
            self.signum = signum
        return signum

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal (a `signal.signal` handler)."""
        if signum == signal.SIGHUP:
            _leave_terminal()
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum

    def raise_if_requested(self, message: str) -> None:
        """Raise `Interrupted` with a message if any rank has received a signal: a collective."""
        if (signum := self.requested()) is not None:
            raise Interrupted(signum, message)


def _leave_terminal() -> None:
    """Write to nowhere in place of a terminal that is gone: a message to it would be an error."""
    for stream in (sys.__stdout__, sys.__stderr__):
        with suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
            handle = stream.fileno()  # pyrefly: ignore [missing-attribute]
            if stat.S_ISCHR(os.fstat(handle).st_mode):  # `isatty` is false of one that is gone
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, handle)
                os.close(nowhere)


@contextmanager
def stop_on_signals(agree: Callable[[int | None], int | None]) -> Generator[StopRequest]:
    """Handle SIGINT, SIGTERM and SIGHUP while the run is in a state that can be saved.

    Args:
        agree: see `StopRequest`.
    """
    request = StopRequest(agree)
    numbers = [signal.SIGINT, signal.SIGTERM]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    former = {number: signal.signal(number, request) for number in numbers}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
