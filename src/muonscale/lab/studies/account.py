"""What a study comes to from its first run to its last: tuning, final runs, and what they save."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from muonscale.lab.studies.cost import StudyCost
from muonscale.lab.studies.study import Expected, PartT


@dataclass(frozen=True)
class Line:
    """Runs that cost the same."""

    name: str
    part: PartT
    runs: int
    most: int
    """How many they may become."""
    flops: int
    """Of one run, Newton-Schulz included."""
    seconds: float | None
    """Of one run, where it is known."""


@dataclass(frozen=True)
class Sum:
    """Several lines together."""

    runs: int
    flops: int
    seconds: float | None
    """None where that of one line is not known."""


@dataclass(frozen=True)
class Account:
    """What a study costs, and what would be done instead of it."""

    lines: tuple[Line, ...]

    def sum(self, *parts: PartT, most: bool = False) -> Sum:
        """Return what some parts come to together, or at most."""
        lines = [line for line in self.lines if line.part in parts]
        numbers = [line.most if most else line.runs for line in lines]
        seconds = [line.seconds for line in lines]
        return Sum(
            sum(numbers),
            sum(n * line.flops for n, line in zip(numbers, lines, strict=True)),
            None
            if None in seconds
            else sum(n * s for n, s in zip(numbers, seconds, strict=True) if s is not None),
        )

    @property
    def tuning_share(self) -> tuple[float, float | None]:
        """The part of tuning in tuning and final runs together: of FLOPs, of seconds."""
        return _ratio(self.sum("tuning"), self.sum("tuning", "final"))

    @property
    def of_instead(self) -> tuple[float, float | None] | None:
        """Tuning and final runs over what they are done instead of: FLOPs, seconds."""
        if not any(line.part == "instead" for line in self.lines):
            return None
        return _ratio(self.sum("tuning", "final"), self.sum("instead"))


def _ratio(part: Sum, whole: Sum) -> tuple[float, float | None]:
    seconds = None
    if part.seconds is not None and whole.seconds:
        seconds = part.seconds / whole.seconds
    return part.flops / whole.flops, seconds


def account(expected: Iterable[Expected], cost: StudyCost) -> Account:
    """Return the account of expected runs; `cost` has to know the runs that they are like."""
    return Account(
        tuple(
            Line(
                part.name,
                part.part,
                part.runs,
                part.most,
                cost.runs[part.like.id].flops,
                cost.seconds.get(part.like.id),
            )
            for part in expected
        )
    )


HEAD = ("account", "runs", "at most", "FLOPs of one", "FLOPs", "hours", "for")
PARTS: dict[PartT, str] = {
    "tuning": "tuning",
    "final": "final runs",
    "check": "checking",
    "instead": "not done",
}


def account_rows(account: Account) -> list[tuple[str, ...]]:
    """Return the account as rows of a table, the head first."""
    rows: list[tuple[str, ...]] = [HEAD]
    for line in account.lines:
        hours = None if line.seconds is None else line.runs * line.seconds / 3600
        flops = f"{line.runs * line.flops:.3g}"
        rows.append(
            (
                line.name,
                str(line.runs),
                str(line.most),
                f"{line.flops:.3g}",
                flops,
                hours_text(hours),
                PARTS[line.part],
            )
        )
    return rows


def account_sentences(account: Account) -> list[str]:
    """Return what the account comes to, a sentence each."""
    whole, most = account.sum("tuning", "final"), account.sum("tuning", "final", most=True)
    said = [
        f"tuning and final runs: {whole.flops:.3g} FLOPs, {_hours(whole)} hours of runs; at most "
        f"{most.flops:.3g} FLOPs, {_hours(most)} hours",
        f"share of tuning: {_shares(account.tuning_share)}",
    ]
    if account.of_instead is not None:
        names = " and ".join(line.name for line in account.lines if line.part == "instead")
        said.append(f"of what it is done instead of ({names}): {_shares(account.of_instead)}")
    return said


def _shares(shares: tuple[float, float | None]) -> str:
    flops, seconds = shares
    return f"{flops:.1%} of FLOPs" + ("" if seconds is None else f", {seconds:.1%} of seconds")


def _hours(total: Sum) -> str:
    return hours_text(None if total.seconds is None else total.seconds / 3600)


def hours_text(hours: float | None) -> str:
    """Return hours for people; a question mark where they are not known."""
    return "?" if hours is None else f"{hours:.2f}" if hours >= 0.1 else f"{hours:.4f}"


def read_account(tree: Mapping[str, Any]) -> Account:
    """Return the account that `account_tree` wrote."""
    return Account(tuple(Line(**line) for line in tree["lines"]))


def account_tree(account: Account) -> dict[str, Any]:
    """Return the account as plain values for JSON."""
    parts: Sequence[PartT] = ("tuning", "final", "check", "instead")
    return {
        "lines": [asdict(line) for line in account.lines],
        "sums": {part: asdict(account.sum(part)) for part in parts},
        "most": asdict(account.sum("tuning", "final", most=True)),
        "tuning_share": dict(zip(("flops", "seconds"), account.tuning_share, strict=True)),
        "of_instead": None
        if account.of_instead is None
        else dict(zip(("flops", "seconds"), account.of_instead, strict=True)),
    }
