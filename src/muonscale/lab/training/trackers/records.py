"""The protocol of trackers, and metrics records as flat names with numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

Progress = dict[str, int]
"""Last logged step by the kind of record."""


@dataclass(frozen=True, kw_only=True)
class TrackerStart:
    """Facts about the run for a tracker that starts or resumes."""

    folder: Path
    """Run folder."""
    config: dict[str, Any]
    """The resolved configuration."""
    project: str
    name: str
    id: str
    """Id of the run; it does not change when the run is resumed."""
    mode: Literal["online", "offline"] | None
    """`online`, `offline`, or None for the default of the tracker."""
    known: bool
    """Whether the tracker has logged this run before."""
    step: int
    """Optimizer steps done; later records of the run are void."""


class Tracker(Protocol):
    """Logs one run. Any exception switches it off, and the run continues."""

    rewinds: bool
    """Whether it deletes the records after `TrackerStart.step`, which are then logged again."""

    @property
    def place(self) -> str:
        """A folder, a URL or a command that shows the run."""
        ...

    def log(self, values: dict[str, float], step: int) -> None:
        """Log the numbers of one record."""
        ...

    def end(self, result: dict[str, float], sample: str, step: int) -> None:
        """Log the numbers of `result.json` and the sample."""
        ...

    def close(self, *, finished: bool) -> None:
        """Flush and close; `finished` is false for a run that was stopped."""
        ...


def numbers(tree: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the finite numbers of nested dicts and lists, with names joined by slashes.

    Examples:
        >>> numbers({"loss": 2.5, "lr": {"hidden": 0.1}, "max_logit": [3.0, 4.0]})
        {'loss': 2.5, 'lr/hidden': 0.1, 'max_logit/0': 3.0, 'max_logit/1': 4.0}
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
    """Return the numbers of a metrics record as `kind/name`, such as `eval/validation_loss`."""
    inner = {key: value for key, value in record.items() if key not in ("kind", "step")}
    return numbers(inner, f"{record['kind']}/")


def last_steps(records: Iterable[dict[str, Any]]) -> Progress:
    """Return the last step of every kind of record."""
    steps: Progress = {}
    for record in records:
        steps[record["kind"]] = max(record["step"], steps.get(record["kind"], 0))
    return steps
