"""The command line: `muonscale VERB ...`.

`app` lists the verbs. Most verbs have a module of their own; `train`, `recipes` and `config` are in
`app`, `inspect` and `lr` in `models`. A verb imports what it needs when it runs. `arguments`
has the options that several verbs share, and `running` starts a run. `main`, in this file, turns
errors and signals into a message and an exit code.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import signal
import sys
from types import FrameType

from muonscale.errors import MuonscaleError

INSTALL = 'the command line needs the lab extra; install it with: pip install "muonscale[lab]"'

DASHED_KEY = re.compile(r"--[a-z]+\.[a-z_]")
"""The beginning of a key of the configuration that is written as an option."""


def main() -> int:
    """Run the command line and return its exit code.

    0: success; 2: an input cannot be used; 129, 130 and 143: stopped by SIGHUP, Ctrl-C and SIGTERM.
    """
    signal.signal(signal.SIGTERM, _terminate)
    if sys.platform != "win32" and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _terminate)
    _open_closed_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")  # an encoding that lacks a character ends nothing
    if sys.platform == "win32":
        return _refuse("the command line does not run on Windows; use Linux, macOS or WSL")
    if option := next(filter(DASHED_KEY.match, sys.argv[1:]), None):
        key, sign, value = option.removeprefix("--").partition("=")
        word = f"{key}={shlex.quote(value) if sign else '...'}"
        return _refuse(f"there is no option {option}; write the key without the dashes: {word}")
    try:
        from muonscale.cli.app import app

        app(prog_name="muonscale")
    except ModuleNotFoundError as error:
        if (error.name or "muonscale").startswith("muonscale"):
            raise
        return _refuse(f"{INSTALL} (missing: {error.name})")
    except MuonscaleError as error:
        _record_for_torchrun(error)
        return _refuse(str(error))
    except OSError as error:
        _record_for_torchrun(error)
        return _refuse(f"{error.filename or 'input or output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        print("muonscale: stopped", file=sys.stderr)
        return 130
    return 0


def _open_closed_streams() -> None:
    """Open what a shell closed (`>&-`): else the next files that are opened are what is printed to."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def is_first_process() -> bool:
    """Return whether this process prints: one without torchrun, or the first of a job."""
    return os.environ.get("RANK", "0") == "0"


def _refuse(message: str) -> int:
    if is_first_process():
        print(f"muonscale: {message}", file=sys.stderr)
    return 2


def _record_for_torchrun(error: Exception) -> None:
    """Write the reason into the file from which torchrun reports the rank that failed."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


def _terminate(signum: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + signum)
