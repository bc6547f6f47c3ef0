"""The rows of the tables: a `Foreign` is another project's optimizer, an `Argument` one of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.coefficients import SCHEDULES

Options = Mapping[str, Any]
"""Values of arguments or options by name."""


class Required:
    """The default of an argument that is required."""

    def __repr__(self) -> str:
        return "required"


REQUIRED = Required()


@dataclass(frozen=True, kw_only=True)
class Argument:
    """One argument of another project's optimizer.

    If `ours` is set, the option gets the value of the argument, or the one that `choices` or `to`
    gives. Otherwise the argument is ignored, and values that are not in `only` raise an error with
    `note`.
    """

    default: Any
    ours: str = ""
    """Option of `Muon` that replaces the argument; empty if there is none."""
    choices: Mapping[Any, Options] | None = None
    """Options for each value."""
    to: Callable[[Options], Options] | None = None
    """Returns options, given all arguments with their defaults."""
    adamw: bool = False
    """Whether the option applies only to groups on AdamW."""
    only: tuple[Any, ...] | None = None
    """Accepted values of an argument without `ours`; None accepts every value."""
    note: str = ""
    """What differs; or why there is no counterpart, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Foreign:
    """One class of another project."""

    what: str
    """Full name, with the version that the arguments are from."""
    source: str
    """Where the arguments were read."""
    arguments: Mapping[str, Argument]
    fixed: Options
    """Options for what the class always does."""
    rule: Literal["muon", "adamw"] = "muon"
    """Rule of the matrices."""
    has_adamw: bool = True
    """Whether it also steps parameters that are not matrices."""
    note: str = ""
    """Differences that no argument changes."""


@dataclass(frozen=True, kw_only=True)
class NoCounterpart:
    """A class whose update no options of `Muon` reproduce."""

    what: str
    why: str


def map_to(ours: str, default: Any, note: str = "") -> Argument:
    """Return a row for an argument that is the option `ours`, possibly under another name."""
    return Argument(default=default, ours=ours, note=note)


def map_to_adamw(ours: str, default: Any, note: str = "") -> Argument:
    """Return a row for an option of groups on AdamW. None means the value of the other groups."""
    return Argument(
        default=default,
        ours=ours,
        adamw=True,
        choices={None: {}} if default is None else None,
        note=note,
    )


def ignore(default: Any, why: str) -> Argument:
    """Return a row for an argument that changes no results, or that is set elsewhere here."""
    return Argument(default=default, note=why)


def refuse(default: Any, why: str) -> Argument:
    """Return a row for an argument without a counterpart: only its default is accepted."""
    return Argument(default=default, only=(default,), note=why)


PARAMETERS = "`parameter_groups(model, ...)` decides what is on Muon"
GROUPS = Argument(default=REQUIRED, only=(), note=PARAMETERS)
NO_EPS = "Newton-Schulz divides by the norm and needs no epsilon"
SPEED = "affects speed, not results"
ASCENT = "negate the loss"
MATCH_RMS: Options = {"scale": "rms", "rms": 0.2}
KELLER: Options = {"scale": "keller"}
JORDAN_5: Options = {"ns_coefficients": "jordan", "ns_steps": 5}


def read_coefficients(argument: str, rows: Mapping[str, str]) -> Callable[[Options], Options]:
    """Return a `to` of `Argument` for coefficients: triples, or names that `rows` maps to ours.

    A name with several triples becomes these triples, because other projects cut them if there are
    fewer steps.
    """

    def read(given: Options) -> Options:
        value = given[argument]
        if not isinstance(value, str):
            return {"ns_coefficients": value}
        if value not in rows:
            raise ConfigError(
                f"{argument} is {value!r}: muonscale.optim.newton_schulz.coefficients has no row "
                f"with its numbers; give the triples, or {', '.join(map(repr, rows))}"
            )
        triples = SCHEDULES[rows[value]].triples
        return {"ns_coefficients": rows[value] if len(triples) == 1 else triples}

    return read
