"""What one argument of another project's optimizer is here, as data; and words that many share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.coefficients import SCHEDULES

Options = Mapping[str, Any]
"""From names of arguments or options to values."""


class Required:
    """The default of an argument that has none."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of another project's optimizer.

    With `ours` it becomes that option: its value as it is, or by `choices`, or by `to`. Without,
    it is left out: whatever its value, or only at the values in `only`, else an error says `note`.
    """

    default: Any
    ours: str = ""
    """Options of `Muon` that take its place, for the reader; empty where there is none."""
    choices: Mapping[Any, Options] | None = None
    """From its values to options."""
    to: Callable[[Options], Options] | None = None
    """From all arguments, defaults included, to options."""
    adamw: bool = False
    """Whether these options are for the groups on AdamW alone, such as a learning rate of theirs."""
    only: tuple[Any, ...] | None = None
    """Values that change nothing, where it has no counterpart; None accepts every value."""
    note: str = ""
    """What differs; where there is no counterpart, why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """One class of another project."""

    what: str
    """Its full name, with the version whose arguments these are."""
    source: str
    """Where they were read."""
    arguments: Mapping[str, Argument]
    fixed: Options
    """Options for what it does whatever its arguments."""
    rule: Literal["muon", "adamw"] = "muon"
    """What matrices are on."""
    alone: bool = False
    """Whether it steps matrices alone, so that it says nothing of rates for the rest."""
    note: str = ""
    """What differs in all cases."""


@dataclass(frozen=True, kw_only=True)
class NoCounterpart:
    """A class whose update no option of `Muon` gives."""

    what: str
    why: str


def map_to(ours: str, default: Any, note: str = "") -> Argument:
    """Return a row for what is an option here too, under whatever name."""
    return Argument(default=default, ours=ours, note=note)


def map_to_adamw(ours: str, default: Any, note: str = "") -> Argument:
    """An option of the groups on AdamW; None stands for that of all groups."""
    return Argument(
        default=default,
        ours=ours,
        adamw=True,
        choices={None: {}} if default is None else None,
        note=note,
    )


def ignore(default: Any, why: str) -> Argument:
    """Return a row for what changes no number, or is decided elsewhere here."""
    return Argument(default=default, note=why)


def refuse(default: Any, why: str) -> Argument:
    """Return a row for what is not here: only its default is accepted."""
    return Argument(default=default, only=(default,), note=why)


PARAMETERS = "`parameter_groups(model, ...)` decides what is on Muon"
GROUPS = Argument(default=REQUIRED, only=(), note=PARAMETERS)
NO_EPS = "Newton-Schulz divides by the norm itself, whatever its size"
SPEED = "how it is computed, not what"
ASCENT = "negate the loss"
MATCH_RMS: Options = {"scale": "rms", "rms": 0.2}
KELLER: Options = {"scale": "keller"}
JORDAN_5: Options = {"ns_coefficients": "jordan", "ns_steps": 5}


def read_coefficients(argument: str, rows: Mapping[str, str]) -> Callable[[Options], Options]:
    """Return what reads coefficients: triples as they are, names by `rows`.

    Names of several triples become these, since others cut them where there are fewer steps.
    """

    def read(given: Options) -> Options:
        value = given[argument]
        if not isinstance(value, str):
            return {"ns_coefficients": value}
        if value not in rows:
            raise ConfigError(
                f"{argument} is {value!r}: no row of muonscale.optim.newton_schulz.coefficients has its numbers; "
                f"give the triples, or {', '.join(map(repr, rows))}"
            )
        triples = SCHEDULES[rows[value]].triples
        return {"ns_coefficients": rows[value] if len(triples) == 1 else triples}

    return read
