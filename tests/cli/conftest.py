from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from muonscale.cli import main


@dataclass
class Answer:
    code: int
    out: str
    err: str


Muonscale = Callable[..., Answer]


@pytest.fixture
def muonscale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Muonscale:
    """Run the command line in this process."""

    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["muonscale", *map(str, words)])
        former = signal.getsignal(signal.SIGTERM)
        try:
            code = main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, former)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run
