"""A run that loses its terminal is asked to stop, and what it prints then is no error."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from muonscale.lab.training.signals import stop_on_signals

CHILD = """
import signal, sys, time
from muonscale.lab.training.signals import stop_on_signals
with stop_on_signals(lambda signum: signum) as stop:
    print("ready", flush=True)
    while not stop.signum:
        time.sleep(0.01)
    print("saved", flush=True)
    sys.exit(stop.signum)
"""


@pytest.mark.usefixtures("hangup")
def test_a_run_that_loses_its_terminal_goes_on_until_it_is_saved() -> None:
    ours, its = pty.openpty()
    child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=its, stdout=its, stderr=its)
    os.close(its)
    try:
        assert b"ready" in os.read(ours, 100)
        os.close(ours)
        child.send_signal(signal.SIGHUP)
        assert child.wait(60) == signal.SIGHUP
    finally:
        child.kill()
        child.wait()


def test_under_nohup_a_closed_terminal_stops_nothing() -> None:
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals(lambda signum: signum) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.requested() is None
    finally:
        signal.signal(signal.SIGHUP, former)
