"""A process that does the runs of a study one after the other: starting Python takes seconds.

`python -m muonscale.lab.studies.execute.worker` reads jobs from standard input, a line of JSON each
with the files config, log and failure. It trains or resumes as `muonscale train CONFIG --resume`
does, and answers each with a line that holds the exit code. The reason of a run that ended without
a result is written to `failure`, except if a signal asked it to stop: such a run is to be resumed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from muonscale.errors import DivergedError, MuonscaleError, exit_text
from muonscale.lab.config.load import load_config
from muonscale.lab.files import write_json
from muonscale.lab.run_folder import RunFolder

WORKER = ("-m", "muonscale.lab.studies.execute.worker")
"""Arguments of Python that start a worker."""

PATIENCE = 2.0
"""Seconds between looks at a folder that another process holds."""


def start_worker(threads: int, gpu: str | None = None, **options: Any) -> subprocess.Popen[str]:
    """Return a worker process that waits for jobs.

    Args:
        threads: CPU threads of its runs.
        gpu: the only GPU that it sees; all that this process sees by default.
        options: of `subprocess.Popen`.
    """
    own = {"OMP_NUM_THREADS": str(threads)}
    if gpu is not None:
        own["CUDA_VISIBLE_DEVICES"] = gpu
    return subprocess.Popen(
        [sys.executable, *WORKER],
        stdin=subprocess.PIPE,
        env=os.environ | own,
        text=True,
        **options,
    )


def train_run(config: Path, failure: Path) -> int:
    """Train a run and return the exit code: 0 done, 1 failed, 128 and more for a signal.

    It raises nothing but KeyboardInterrupt and SystemExit: the other runs of a study go on.
    """
    from muonscale.lab.training.console import RunConsole
    from muonscale.lab.training.loop import train
    from muonscale.lab.training.signals import Interrupted

    failure.unlink(missing_ok=True)
    try:
        resolved = load_config(str(config))
        folder = RunFolder(resolved.run.path)
        if folder.is_locked():  # by a process that outlived a killed study
            print(f"another process is training in {folder.path}: waiting for it", flush=True)
        while folder.is_locked():
            time.sleep(PATIENCE)
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


def record_death(path: Path, code: int, log: str) -> None:
    """Write the exit code (of `subprocess`) of a run's process, and the path of its log."""
    record_failure(path, f"its process ended with {exit_text(code)}; see {log}")


def serve() -> None:
    """Do the jobs that arrive until there are no more.

    Whatever a job prints, from libraries in C too, goes to its log and not among the answers.
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
