"""The only two outcomes of a command: it works, or it refuses with a sentence."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass

from muonscale.cli import main
from muonscale.errors import MuonscaleError

LONGEST = 20_000
"""Characters of a message: one that repeats a whole file is no help."""


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


@contextlib.contextmanager
def _argv(words: list[str]) -> Generator[None]:
    former = sys.argv
    handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    sys.argv = ["muonscale", *words]
    try:
        yield
    finally:
        sys.argv = former
        for number, handler in handlers.items():
            signal.signal(number, handler)


def command(*words: object) -> Outcome:
    """Run the command line here; anything but success or a refusal fails the test."""
    out, err = io.StringIO(), io.StringIO()
    with (
        _argv(list(map(str, words))),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 99
    found = Outcome(code, out.getvalue(), err.getvalue())
    assert code in (0, 2), found
    if code == 2:
        assert "Traceback" not in found.err
        check_message(found.err)
    return found


def refused_or(call: Callable[[], object]) -> MuonscaleError | None:
    """Call a public function; return its error, which must be one of ours."""
    try:
        call()
    except MuonscaleError as error:
        check_message(str(error))
        return error
    return None


def check_message(text: str) -> None:
    assert text.strip() and len(text) < LONGEST, text[:LONGEST]
    text.encode("utf-8")
    assert "\0" not in text
