"""The run folder: the only interface between training and everything that looks at a run.

config.json     the resolved configuration
env.json        versions, device, threads, and what `auto` chose
metrics.jsonl   one JSON object per line: {"kind": ..., "step": ..., ...}, the kind being
                train, eval or telemetry
start/          where the weights came from, if they were not drawn (muonscale.lab.training.provenance)
tokenizer/      the tokenizer, in Hugging Face format
checkpoints/    step-00000100/, ... (see muonscale.lab.training.checkpoint)
model/          the trained model as a Hugging Face checkpoint, with a model card
loss.png        the loss curve
tensorboard/, wandb/, trackers.json   what trackers leave (muonscale.lab.training.trackers)
profile/        what was profiled (muonscale.lab.training.profile)
sample.txt      text written by the model
result.json     written last: its presence means that the run is finished
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import time
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from muonscale.errors import CheckpointError, shown
from muonscale.lab.config.load import Config, dump_config

LOCK = "run.lock"
LOOKS = 10
"""How often a lock is asked for, over half a second."""

# Keys that may differ when a run is continued: they change neither data order nor, but for the
# rounding of sums, weights.
FREE_ON_RESUME = (
    "run.path",
    "run.threads",
    "run.device",
    "data.cache",
    "eval.",
    "checkpoint.",
    "telemetry.",
    "track.",
    "profile.",
    "parallel.",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "train.compile",
)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it is either the old one or the new one, whenever the power fails."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a value as indented JSON, atomically."""
    write_atomic(path, json.dumps(value, indent=2) + "\n")


@dataclass(frozen=True)
class RunFolder:
    """Paths and files of one run."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """Folder of the tokenizer in Hugging Face format."""
        return self.path / "tokenizer"

    @property
    def model(self) -> Path:
        """Folder of the trained model in Hugging Face format."""
        return self.path / "model"

    @property
    def metrics(self) -> Path:
        """File of the metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "config.json").exists()

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, None of an unfinished one.

        Raises:
            CheckpointError: if the file is damaged.
        """
        path = self.path / "result.json"
        try:
            return _read_object(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; remove it, and write it anew with: "
                f"muonscale train {self.path} --resume"
            ) from error

    def saved_config(self) -> dict[str, Any]:
        """Return the configuration the run was started with.

        Raises:
            CheckpointError: if this is not a run folder or its config.json is damaged.
        """
        path = self.path / "config.json"
        try:
            tree = _read_object(path)
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{self.path} is not a readable run folder: {error}; restore its config.json, which "
                "training wrote"
            ) from error
        if not isinstance(tree.get("run"), dict):
            raise CheckpointError(
                f"{self.path} is not a run folder: its config.json has the keys "
                f"{shown(sorted(tree))} and must have a section `run`"
            )
        return tree

    def environment(self) -> dict[str, Any]:
        """Return what env.json holds; nothing if the run has not come to write it.

        Raises:
            CheckpointError: if the file is damaged.
        """
        path = self.path / "env.json"
        try:
            return _read_object(path)
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path} cannot be read: {error}; remove it, or let training write it anew with: "
                f"muonscale train {self.path} --resume"
            ) from error

    def check_free(self, *, resume: bool) -> bool:
        """Return whether a run was begun here; refuse if it may not be continued.

        Raises:
            CheckpointError: if the folder holds a run and `resume` is false, or other files.
        """
        others = any(p.name != LOCK for p in self.path.iterdir())
        if others and not resume:
            raise CheckpointError(
                f"run folder {self.path} already exists and is not empty; continue it with "
                "--resume, or choose another with run.path=FOLDER"
            )
        if others and not self.exists:
            raise CheckpointError(
                f"{self.path} holds other files and no run; choose run.path=FOLDER"
            )
        return self.exists

    def create(self, config: Config) -> None:
        """Begin a run here: write config.json.

        Raises:
            CheckpointError: if it cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.json", dump_config(config))
        except OSError as error:
            raise CheckpointError(
                f"run folder {self.path} cannot be written: {error}"
                "; choose another with run.path=FOLDER"
            ) from error

    def check_same(self, config: Config) -> None:
        """Refuse to continue a run under a configuration that would change it.

        Raises:
            CheckpointError: naming every key that differs, with both values.
        """
        old, new = flatten(self.saved_config()), flatten(json.loads(dump_config(config)))
        lines = [
            f"  {key}: {old.get(key)!r} in the run, {new.get(key)!r} now"
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key) and not key.startswith(FREE_ON_RESUME)
        ]
        if lines:
            raise CheckpointError(
                f"run {self.path} was started with another configuration:\n"
                + "\n".join(lines)
                + f"\ncontinue it as it was with: muonscale train {self.path} --resume"
            )

    @contextmanager
    def locked(self) -> Generator[None]:
        """Hold the folder, made if need be, against a second process that would train in it.

        A folder made here in which nothing was begun is removed again.

        Raises:
            CheckpointError: if another process holds it, or the file system has no locks.
        """
        created = not self.path.exists()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = (self.path / LOCK).open("w")
        except OSError as error:
            raise CheckpointError(
                f"run folder {self.path} cannot be written: {error}"
                "; choose another with run.path=FOLDER"
            ) from error
        with file:
            try:
                locked = _lock(file)
            except OSError as error:
                raise CheckpointError(
                    f"the file system of {self.path} does not lock files ({error.strerror}), which keeps "
                    "two processes from training in one folder; mount it with locks (Lustre: -o flock), "
                    "or choose a folder on another with run.path=FOLDER"
                ) from error
            if not locked:
                raise CheckpointError(
                    f"another process is training in {self.path}; wait for it, or choose another "
                    "folder with run.path=FOLDER"
                )
            try:
                yield
            finally:
                if created and [p.name for p in self.path.iterdir()] == [LOCK]:
                    (self.path / LOCK).unlink()
                    self.path.rmdir()

    def held(self) -> bool:
        """Return whether a process is training in this folder, on a machine that shares its locks."""
        try:
            with (self.path / LOCK).open("r") as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except OSError:  # no lock file, or a file system that does not lock: `locked` says so
            return False
        return False

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def replace_metrics(self, record: dict[str, Any]) -> None:
        """Add one line in place of the line of the same kind and step, if there is one."""
        same = (record["kind"], record["step"])
        self._rewrite(r for r in self.read_metrics() if (r["kind"], r["step"]) != same)
        self.append_metrics(record)

    def truncate_metrics(self, step: int) -> None:
        """Drop what was recorded after `step`, and a last line that was cut off."""
        self._rewrite(record for record in self.read_metrics() if record["step"] <= step)

    def read_metrics(self) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl up to the first line that is damaged or none."""
        records: list[dict[str, Any]] = []
        if not self.metrics.exists():
            return records
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            record = _record(line)
            if record is None:
                break
            records.append(record)
        return records

    def _rewrite(self, records: Iterable[dict[str, Any]]) -> None:
        write_atomic(self.metrics, "".join(_line(record) for record in records))


def _lock(file: IO[str]) -> bool:
    """Take a file's lock, unless a process keeps it; one that asks `held` has it for a moment."""
    for _ in range(LOOKS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return True
    return False


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file. Raises OSError and ValueError where there is none."""
    tree = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(tree, dict):
        raise ValueError(f"it holds {shown(tree, 60)} and must hold a JSON object")
    return tree


def _record(line: str) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl, None where it is not one that a run has written."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str)
    return record if whole and isinstance(record.get("step"), int) else None


def _line(record: dict[str, Any]) -> str:
    """Return a record as a line of JSON, which has no word for a number that is not finite."""

    return json.dumps(finite(record)) + "\n"


def finite(value: Any) -> Any:
    """Return plain values with None for every number that is not finite, as JSON needs it."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration's values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
