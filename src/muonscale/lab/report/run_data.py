"""What a run folder holds, read so that a run that is unfinished or damaged is shown as far as it goes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.eval_results import read_results

Record = dict[str, Any]
KindT = Literal["train", "eval", "telemetry"]
UnitT = Literal["tokens", "step", "seconds"]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """A run folder. Files that are missing or cannot be read are empty, and a note says so."""

    label: str
    """What it is called on the page."""
    path: Path
    config: Record
    """config.json as it is."""
    resolved: Config | None
    """The configuration; None where this version cannot read it."""
    env: Record
    result: Record
    records: tuple[Record, ...]
    """Of metrics.jsonl by step; of a step that was written twice, after a resume, the last."""
    notes: tuple[str, ...]
    """Sentences on what is missing or damaged."""
    evaluation: Record = field(default_factory=dict)
    """eval/result.json, what `muonscale eval` has measured."""

    def of_kind(self, kind: KindT) -> list[Record]:
        """Return the records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    def where(self, records: Sequence[Record], unit: UnitT) -> np.ndarray:
        """Return the places of records in the run, float64 [n]; NaN where it is not known.

        Seconds are those of training steps, without evaluations and checkpoints.
        """
        if unit == "step":
            return column(records, "step")
        at = self._tokens if unit == "tokens" else self._seconds
        known = np.array([at.get(record["step"], math.nan) for record in records])
        if unit == "seconds":
            return known
        own = column(records, "tokens")
        return np.where(np.isfinite(own), own, known)

    @property
    def last_step(self) -> int:
        """The last step that was recorded, 0 without any."""
        return max((record["step"] for record in self.of_kind("train")), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return bool(self.result)

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the configuration; None where it is not known."""
        found = self.config.get(section)
        return found.get(key) if isinstance(found, dict) else None

    @cached_property
    def _tokens(self) -> dict[int, float]:
        train = self.of_kind("train")
        return {0: 0.0, **_by_step(train, column(train, "tokens"))}

    @cached_property
    def _seconds(self) -> dict[int, float]:
        train = self.of_kind("train")
        return {
            0: 0.0,
            **_by_step(train, np.cumsum(np.nan_to_num(column(train, "step_ms"))) / 1000),
        }


def read_run(path: Path, label: str) -> RunData:
    """Read a run folder; nothing in it raises an error."""
    notes: list[str] = []
    config = _read_object(path / "config.json", notes, needed=True)
    env = _read_object(path / "env.json", notes, needed=True)
    result = _read_object(path / "result.json", notes, needed=False)
    records = _read_records(path / "metrics.jsonl", notes)
    resolved = _resolved(path, notes) if config else None
    found = RunData(
        label=label,
        path=path,
        config=config,
        resolved=resolved,
        env=env,
        result=result,
        records=records,
        evaluation=_read_evaluation(path, notes),
        notes=tuple(notes),
    )
    return found if found.finished else _with_progress(found)


def column(records: Iterable[Record], *keys: str) -> np.ndarray:
    """Return the number at `keys` of every record, float64 [n]; NaN where there is none."""
    return np.array([_number(_at(record, keys)) for record in records], dtype=np.float64)


def names(records: Iterable[Record], *keys: str) -> list[str]:
    """Return the keys of the objects at `keys` of records, each once, in order."""
    found = (_at(record, keys) for record in records)
    return list(dict.fromkeys(name for item in found if isinstance(item, dict) for name in item))


def _at(record: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _number(value: object) -> float:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number and math.isfinite(value) else math.nan


def _by_step(records: Sequence[Record], values: np.ndarray) -> dict[int, float]:
    return {r["step"]: float(value) for r, value in zip(records, values, strict=True)}


def _read_object(path: Path, notes: list[str], *, needed: bool) -> Record:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if needed:
            notes.append(f"{path.name} is missing; what it would say is not shown.")
        return {}
    except (OSError, ValueError) as error:
        notes.append(f"{path.name} cannot be read ({error}); what it would say is not shown.")
        return {}
    if not isinstance(tree, dict):
        notes.append(f"{path.name} is not a JSON object; what it would say is not shown.")
        return {}
    return tree


def _read_evaluation(path: Path, notes: list[str]) -> Record:
    try:
        return read_results(path / "eval")
    except CheckpointError:
        notes.append("eval/result.json cannot be read; what it would say is not shown.")
        return {}


def _read_records(path: Path, notes: list[str]) -> tuple[Record, ...]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error}); there are no curves.")
        return ()
    records: dict[tuple[str, int], Record] = {}
    damaged = []
    for number, line in enumerate(lines, start=1):
        record = _record(line)
        if record is not None:
            records[record["kind"], record["step"]] = record
        elif number < len(lines):  # the last one is cut short when a run is killed
            damaged.append(str(number))
    if damaged:
        which = f"Line {damaged[0]}" if len(damaged) == 1 else f"Lines {', '.join(damaged[:10])}"
        more = f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
        notes.append(f"{which}{more} of {path.name} cannot be read and left out.")
    if not records:
        notes.append(f"{path.name} has no records: there are no curves.")
    return tuple(sorted(records.values(), key=lambda record: record["step"]))


def _record(line: str) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str)
    return record if whole and isinstance(record.get("step"), int) else None


def _resolved(path: Path, notes: list[str]) -> Config | None:
    try:
        return load_config(str(path.resolve()))
    except ConfigError as error:
        notes.append(f"This version does not understand config.json: {error}")
        return None


def _with_progress(run: RunData) -> RunData:
    """Return an unfinished run with a sentence on how far it has come."""
    steps = None if run.resolved is None else run.resolved.steps
    of = "" if steps is None else f" of {steps:,}"
    note = f"The run is not finished: {run.last_step:,}{of} steps are recorded."
    return replace(run, notes=(note, *run.notes))
