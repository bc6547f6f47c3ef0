"""What a tracker is told: metrics records as flat names with numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Told = dict[str, int]
"""The last step that was told of, by the kind of record."""


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """What a tracker knows when it begins, or goes on."""

    folder: Path
    """Of the run."""
    config: dict[str, Any]
    """The resolved configuration."""
    project: str
    name: str
    id: str
    """Of the run, the same whenever it is resumed."""
    mode: Literal["online", "offline"] | None
    """`online`, `offline`, or None: as the tracker has it."""
    known: bool
    """Whether it has been told of this run before."""
    step: int
    """Optimizer steps done: what was recorded after it is to be forgotten."""


class Tracker(Protocol):
    """Follows one run. Whatever it raises switches it off, and the run goes on."""

    rewinds: bool
    """Whether it forgets what was recorded after `Beginning.step`, and is to be told again."""

    @property
    def place(self) -> str:
        """Where to look: a folder, a URL or a command."""
        ...

    def log(self, values: dict[str, float], step: int) -> None:
        """Take the numbers of one record."""
        ...

    def end(self, result: dict[str, float], sample: str, step: int) -> None:
        """Take the figures of `result.json` and the text that the model wrote."""
        ...

    def close(self, *, finished: bool) -> None:
        """Write what is not yet written and let go; `finished` is false of a run that was stopped."""
        ...


def numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of nested dicts and lists, by their names joined with slashes.

    >>> numbers({"loss": 2.5, "lr": {"hidden": 0.1}, "max_logit": [3.0, 4.0]}, "train/")
    {'train/loss': 2.5, 'train/lr/hidden': 0.1, 'train/max_logit/0': 3.0, 'train/max_logit/1': 4.0}
    """
    return dict(_walk(tree, prefix))


def _walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            yield from _walk(value, f"{name}/")
        elif isinstance(value, list | tuple):
            yield from _walk({str(i): item for i, item in enumerate(value)}, f"{name}/")
        elif (
            isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        ):
            yield name, value


def flat(record: dict[str, Any]) -> dict[str, float]:
    """Return the numbers of a metrics record as `kind/name`, such as `eval/held_out_loss`."""
    inner = {key: value for key, value in record.items() if key not in ("kind", "step")}
    return numbers(inner, f"{record['kind']}/")


def last_steps(records: Iterable[dict[str, Any]]) -> Told:
    """Return the last step of every kind of record."""
    told: Told = {}
    for record in records:
        told[record["kind"]] = max(record["step"], told.get(record["kind"], 0))
    return told
