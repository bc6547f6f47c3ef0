"""Reads a run folder so that a report can show an unfinished or damaged run as far as it goes."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeGuard

import numpy as np

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.eval_results import read_results
from muonscale.lab.files import read_bytes, read_object, read_text
from muonscale.lab.run_folder import LARGEST_METRICS, KindT, parse_record

Record = dict[str, Any]
UnitT = Literal["tokens", "step", "time", "FLOPs"]


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The content of a run folder. A missing or unreadable file is empty, and a note says so."""

    label: str
    """The name of the run on the page."""
    path: Path
    config: Record
    """The content of config.json."""
    resolved: Config | None
    """The configuration; None if this version cannot read it."""
    env: Record
    result: Record
    records: tuple[Record, ...]
    """Records of metrics.jsonl by step. Of a step repeated after a resume, the last one."""
    notes: tuple[str, ...]
    """Sentences on files that are missing or damaged."""
    tokenizer_digest: str = ""
    """SHA-256 of the run's tokenizer.json; empty if the folder has none."""
    evaluation: Record = field(default_factory=dict)
    """The content of eval/result.json, which `muonscale eval` writes."""

    def of_kind(self, kind: KindT) -> list[Record]:
        """Return the records of one kind."""
        return [record for record in self.records if record["kind"] == kind]

    def positions(self, records: Sequence[Record], unit: UnitT) -> np.ndarray:
        """Return the x of records in a unit, float64 [n]; NaN where it is unknown.

        Time is in seconds and counts training steps only, without evaluations and checkpoints.
        FLOPs are those of the model, without the optimizer.
        """
        if unit == "step":
            return column(records, "step")
        if unit == "FLOPs":
            per_token = _at(self.env, ("flops", "per_token"))
            known = float(per_token) if is_finite(per_token) else math.nan
            return known * self.positions(records, "tokens")
        train = self.of_kind("train")
        if unit == "tokens":
            x = column(train, "tokens")
        else:
            x = np.cumsum(np.nan_to_num(column(train, "step_ms"))) / 1000
        at = {0: 0.0} | {r["step"]: float(value) for r, value in zip(train, x, strict=True)}
        known = np.array([at.get(record["step"], math.nan) for record in records])
        own = column(records, "tokens")
        return known if unit == "time" else np.where(np.isfinite(own), own, known)

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 if there is none."""
        return max((record["step"] for record in self.of_kind("train")), default=0)

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return bool(self.result)

    def setting(self, section: str, key: str) -> Any:
        """Return a value of the configuration; None if it has none."""
        return _at(self.config, (section, key))


def read_run(path: Path, label: str) -> RunData:
    """Read a run folder. Nothing in it raises an error."""
    notes: list[str] = []
    config = _read_object(path / "config.json", notes, needed=True)
    env = _read_object(path / "env.json", notes, needed=True)
    result = _read_object(path / "result.json", notes, needed=False)
    records = _read_records(path / "metrics.jsonl", notes)
    resolved = None
    if config:
        try:
            resolved = load_config(str(path.resolve()))
        except ConfigError as error:
            notes.append(f"This version does not understand config.json: {error}")
    try:
        evaluation = read_results(path / "eval")
    except CheckpointError:
        evaluation = {}
        notes.append("eval/result.json cannot be read and is not shown.")
    run = RunData(
        label=label,
        path=path,
        config=config,
        resolved=resolved,
        env=env,
        result=result,
        records=records,
        evaluation=evaluation,
        tokenizer_digest=_digest(path / "tokenizer" / "tokenizer.json"),
        notes=tuple(notes),
    )
    if run.finished:
        return run
    of = "" if resolved is None else f" of {resolved.steps:,}"
    note = f"The run is not finished: {run.last_step:,}{of} steps are recorded."
    return replace(run, notes=(note, *run.notes))


def column(records: Iterable[Record], *keys: str) -> np.ndarray:
    """Return the number at `keys` of every record, float64 [n]; NaN where there is none."""
    values = (_at(record, keys) for record in records)
    numbers = [float(value) if is_finite(value) else math.nan for value in values]
    return np.array(numbers, dtype=np.float64)


def names(records: Iterable[Record], *keys: str) -> list[str]:
    """Return the keys of the objects at `keys` of records, each once, in order."""
    items = (_at(record, keys) for record in records)
    return list(dict.fromkeys(name for item in items if isinstance(item, dict) for name in item))


def is_finite(value: object) -> TypeGuard[float]:
    """Return whether a value read from JSON is a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _at(record: Any, keys: Sequence[str]) -> Any:
    for key in keys:
        record = record.get(key) if isinstance(record, dict) else None
    return record


def _digest(path: Path) -> str:
    try:
        return hashlib.sha256(read_bytes(path)).hexdigest()
    except OSError:
        return ""


def _read_object(path: Path, notes: list[str], *, needed: bool) -> Record:
    try:
        tree = read_object(path, "its content is not shown")
    except CheckpointError as error:
        notes.append(f"{error}.")
        return {}
    if tree is None and needed:
        notes.append(f"{path.name} is missing; its content is not shown.")
    return tree or {}


def _read_records(path: Path, notes: list[str]) -> tuple[Record, ...]:
    try:
        lines = read_text(path, LARGEST_METRICS, errors="replace").splitlines()
    except FileNotFoundError:
        lines = []
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error}); there are no curves.")
        return ()
    records: dict[tuple[str, int], Record] = {}
    damaged = []
    for number, line in enumerate(lines, start=1):
        if (record := parse_record(line)) is not None:
            records[record["kind"], record["step"]] = record
        elif number < len(lines):  # the last line is cut short when a run is killed
            damaged.append(str(number))
    if damaged:
        which = f"Line {damaged[0]}" if len(damaged) == 1 else f"Lines {', '.join(damaged[:10])}"
        more = f" and {len(damaged) - 10} more" if len(damaged) > 10 else ""
        notes.append(f"{which}{more} of {path.name} cannot be read and left out.")
    if not records:
        notes.append(f"{path.name} has no records: there are no curves.")
    return tuple(sorted(records.values(), key=lambda record: record["step"]))
