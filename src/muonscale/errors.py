"""The errors a user can cause.

    MuonscaleError (a ValueError)
    +-- ConfigError      a recipe, an option or an override that cannot be used
    +-- GroupingError    a parameter with no optimizer rule, or with two
    +-- LayoutError      a parameter whose storage hides the matrix it holds
    +-- CheckpointError  a checkpoint or run folder that cannot be written or read
    +-- DataError        text, tokens or a tokenizer that cannot be used
    +-- DivergedError    a gradient that is not finite
    +-- StudyError       a study, a table or a fit that cannot be done

Every message says what is wrong and the value, and what is accepted if that is not obvious. The
command line prints it without a traceback and exits with code 2. `assert` is for our own mistakes.
"""

from __future__ import annotations

import difflib
import shlex
import signal
from collections.abc import Iterable


class MuonscaleError(ValueError):
    """Base of every error that a user can cause. Like torch's, it is a ValueError."""


class ConfigError(MuonscaleError):
    """A recipe, an option or an override that cannot be used."""


class GroupingError(MuonscaleError):
    """A parameter with no optimizer rule, with two, or a pattern that matches nothing."""


class LayoutError(MuonscaleError):
    """A parameter whose storage hides the matrix it holds."""


class CheckpointError(MuonscaleError):
    """A checkpoint or a run folder that cannot be written, read or continued."""


class DataError(MuonscaleError):
    """Text, tokens or a tokenizer that cannot be used."""


class DivergedError(MuonscaleError):
    """A gradient that is not finite under `nonfinite="raise"`."""


class StudyError(MuonscaleError):
    """A study that cannot be planned or run, or data that do not determine a fit."""


def shown(value: object, longest: int = 200) -> str:
    """Return the repr of a value for a message; a long one is cut in the middle."""
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python writes
        text = (
            f"a number of {value.bit_length()} bits" if isinstance(value, int) else "a huge number"
        )
    half = (longest - 5) // 2
    return text if len(text) <= longest else f"{text[:half]} ... {text[-half:]}"


def command_line(*words: object) -> str:
    """Return a `muonscale` command for a message, with quotes where a shell needs them."""
    return shlex.join(["muonscale", *map(str, words)])


def exit_text(code: int) -> str:
    """Return what an exit code of `subprocess` says about the end of a process."""
    if code >= 0:
        return f"exit code {code}"
    memory = ", as when the machine is out of memory" if -code == signal.SIGKILL else ""
    return f"signal {-code}{memory}"


MANY = 16
"""Accepted names that a hint lists at most."""


def nearest(name: object, accepted: Iterable[str]) -> str:
    """Return a hint for a misspelled `name`: the closest accepted names, else the first ones."""
    accepted = sorted(accepted)
    close = difflib.get_close_matches(str(name), accepted, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = len(accepted) - MANY
    cut = f" and {more} more" if more > 2 else ""
    return f"accepted: {', '.join(accepted[:MANY] if cut else accepted)}{cut}"
