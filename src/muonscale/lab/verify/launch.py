"""Takes steps in a layout on processes of this machine, which torch's launcher starts and ends."""

from __future__ import annotations

import inspect
import logging
import signal
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from muonscale.errors import MuonscaleError
from muonscale.lab.config.load import Config
from muonscale.lab.verify.trajectory import Trajectory
from muonscale.lab.verify.worker import read_reasons, read_trajectory, write_job

WORKER = "muonscale.lab.verify.worker"

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
"""Signals whose handlers torch's launcher replaces, to end its processes."""

GRACE_SECONDS = 5
"""Time from asking a process to end to killing it."""


def take_steps_on(processes: int, config: Config, steps: int) -> Trajectory:
    """Take steps on new processes, which have ended when this returns or raises.

    Args:
        processes: the number of processes.
        config: the configuration; its `parallel` section arranges the processes.
        steps: the number of optimizer steps.

    Raises:
        MuonscaleError: if a process fails, with its rank and its reason.
        KeyboardInterrupt: on Ctrl-C.
    """
    with tempfile.TemporaryDirectory(prefix="muonscale-verify-") as name:
        folder = Path(name)
        write_job(folder, config, steps)
        launch = elastic_launch(_launch_config(processes, folder), sys.executable)
        try:
            with _restore_signals(), _mute_logging():
                launch("-m", WORKER, str(folder))
        except ChildFailedError as error:
            raise MuonscaleError(_reason(error, folder, processes)) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None
        return read_trajectory(folder)


def _launch_config(processes: int, folder: Path) -> LaunchConfig:
    # older versions of torch lack this option and wait thirty seconds
    known = "shutdown_timeout" in inspect.signature(LaunchConfig).parameters
    grace: dict[str, Any] = {"shutdown_timeout": GRACE_SECONDS} if known else {}
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(folder / "logs"), redirects=Std.ALL),
        **grace,
    )


@contextmanager
def _restore_signals() -> Generator[None]:
    """Restore the signal handlers that the launcher replaces."""
    former = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


@contextmanager
def _mute_logging() -> Generator[None]:
    """Drop the launcher's log messages; the error says what is worth knowing."""
    former = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(former)


def _reason(error: ChildFailedError, folder: Path, processes: int) -> str:
    """Return which rank failed first, and why.

    A killed rank leaves no reason, but ranks that wait for it may. The launcher itself ends the
    rest with SIGTERM.
    """
    for rank, failure in sorted(error.failures.items()):
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            return f"rank {rank} of {processes} was killed by {failure.signal_name()}"
    for rank, reason in read_reasons(folder).items():
        return f"rank {rank} of {processes}: {reason}"
    rank, failure = error.get_first_failure()
    ended = f"rank {rank} of {processes} ended with exit code {failure.exitcode}"
    for log in folder.glob(f"logs/*/attempt_0/{failure.local_rank}/stderr.log"):
        if lines := log.read_text("utf-8", errors="replace").strip().splitlines():
            return f"{ended}: {lines[-1]}"
    return ended
