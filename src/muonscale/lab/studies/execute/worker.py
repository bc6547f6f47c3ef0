"""Runs of a study in a process of their own, one after the other: starting Python takes seconds.

`python -m muonscale.lab.studies.execute.worker` reads jobs from standard input, a line of JSON each: config,
log and failure, which are files. It trains or goes on as `muonscale train CONFIG --resume` does, and
answers each with a line that holds the exit code. What ended a run without a result is written to
`failure`, except for a signal that asked it to stop: such a run is to go on.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

from muonscale.errors import DivergedError, MuonscaleError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.files import write_json
from muonscale.lab.run_folder import RunFolder

PATIENCE = 2.0
"""Seconds between looks at a folder that another process holds."""


def train_run(config: Path, failure: Path) -> int:
    """Train a run and return the exit code: 0 done, 1 failed, 128 and more for a signal.

    Nothing is raised but KeyboardInterrupt and SystemExit: the other runs of a study go on.
    """
    from muonscale.lab.training.console import RunConsole
    from muonscale.lab.training.loop import train
    from muonscale.lab.training.signals import Interrupted

    failure.unlink(missing_ok=True)
    try:
        resolved = load_config(str(config))
        _wait_for(resolved)
        train(resolved, resume=True, console=RunConsole())
    except Interrupted as stop:
        print(stop, flush=True)
        return stop.exit_code
    except Exception as error:
        reason = str(error)
        if not isinstance(error, MuonscaleError):
            traceback.print_exc(file=sys.stdout)
            reason = f"{type(error).__name__}: {error}"
        record_failure(failure, reason, diverged=isinstance(error, DivergedError))
        print(reason, flush=True)
        return 1
    return 0


def record_failure(path: Path, reason: str, *, diverged: bool = False) -> None:
    """Write why a run ended without a result."""
    write_json(path, {"reason": reason, "diverged": diverged})


def _wait_for(config: Config) -> None:
    """Wait until no process trains in the run's folder: one may have outlived a killed study."""
    folder = RunFolder(config.run.path)
    if folder.is_locked():
        print(f"another process is training in {folder.path}: waiting for it", flush=True)
    while folder.is_locked():
        time.sleep(PATIENCE)


def serve() -> None:
    """Do the jobs that come, until there are no more.

    What a job prints, libraries in C included, goes to its log and not among the answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    for line in sys.stdin:
        job = json.loads(line)
        with Path(job["log"]).open("a", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            code = train_run(Path(job["config"]), Path(job["failure"]))
            sys.stdout.flush()
        print(code, file=answers, flush=True)
        if code >= 128:
            sys.exit(code)


if __name__ == "__main__":
    serve()
