"""Ctrl-C and SIGTERM: finish the step, save, stop. A second Ctrl-C stops at once."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """The run was asked to stop and has saved itself."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """Remembers the signal that asked the run to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal (a `signal.signal` handler)."""
        if signum == signal.SIGINT and self.signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum

    def raise_if_asked(self, message: str) -> None:
        """Raise `Interrupted` with a message for the user if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum, message)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Take over SIGINT and SIGTERM while the run is in a state that can be saved."""
    request = StopRequest()
    former = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
