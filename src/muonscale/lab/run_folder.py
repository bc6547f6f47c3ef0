"""The run folder: the only interface between training and everything that reads a run.

config.json     the resolved configuration
env.json        versions, device, threads, and what `auto` chose
metrics.jsonl   one JSON object per line: {"kind": ..., "step": ..., ...}, the kind being
                train, eval, telemetry or tasks
start/          the checkpoint that the run started from (muonscale.lab.training.provenance)
tokenizer/      the tokenizer, in Hugging Face format
checkpoints/    step-00000100/, ... (see muonscale.lab.training.checkpoint)
model/          the trained model as a Hugging Face checkpoint, with a model card
loss.png        the loss curve
tensorboard/, wandb/, trackers.json   files of trackers (muonscale.lab.training.trackers)
profile/        profiles of steps (muonscale.lab.training.profile)
adapter/        the trained adapter in the format of peft, if there is one
samples/        texts written by the model during training
sample.txt      text written by the model
result.json     written last: its presence means that the run is finished
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muonscale.errors import CheckpointError, command_line, shown
from muonscale.lab.config.load import Config, dump_config
from muonscale.lab.files import (
    append_line,
    drop_nonfinite,
    is_locked,
    lock_folder,
    read_bytes,
    read_object,
    write_atomic,
)

LOCK = "run.lock"

LARGEST_METRICS = 2**33
"""Largest metrics.jsonl in bytes that is read."""

KindT = Literal["train", "eval", "telemetry", "tasks"]
"""Kinds of metrics records."""

# Keys that may differ when a run is continued: they do not change the data order, and weights only
# by the rounding of sums.
FREE_ON_RESUME = (
    "run.path",
    "run.threads",
    "run.device",
    "data.cache",
    "eval.",
    "checkpoint.",
    "telemetry.",
    "log.",
    "track.",
    "profile.",
    "parallel.",
    "train.target_loss",
    "train.micro_batch_tokens",
    "train.activation_checkpointing",
    "train.compile",
)


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
    def averaged_model(self) -> Path:
        """Folder of the average of the weights (`train.average`) in Hugging Face format."""
        return self.path / "model-average"

    @property
    def adapter(self) -> Path:
        """Folder of the adapter (`adapter.rank`) in the format of peft."""
        return self.path / "adapter"

    @property
    def samples(self) -> Path:
        """Folder of the texts that the model wrote during training (`eval.samples_every`)."""
        return self.path / "samples"

    @property
    def metrics(self) -> Path:
        """File of the metrics, one JSON object per line."""
        return self.path / "metrics.jsonl"

    @property
    def exists(self) -> bool:
        """Whether a run was started here."""
        return (self.path / "config.json").exists()

    @property
    def finished_text(self) -> str:
        """What to say of a finished run."""
        return f"run {self.path} is finished; its result is in result.json"

    def result(self) -> dict[str, Any] | None:
        """Return the result of a finished run, None of an unfinished one.

        Raises:
            CheckpointError: if the file is damaged.
        """
        return self._read("result.json")

    def environment(self) -> dict[str, Any]:
        """Return the content of env.json, which is empty until training starts.

        Raises:
            CheckpointError: if the file is damaged.
        """
        return self._read("env.json") or {}

    def _read(self, name: str) -> dict[str, Any] | None:
        resume = command_line("train", self.path, "--resume")
        again = f"remove it, and write it again with: {resume}"
        return read_object(self.path / name, again)

    def saved_config(self) -> dict[str, Any]:
        """Return the configuration the run was started with.

        Raises:
            CheckpointError: if this is not a run folder or its config.json is damaged.
        """
        tree = read_object(self.path / "config.json", "restore the file that training wrote")
        if tree is None:
            raise CheckpointError(f"{self.path} is not a run folder: it has no config.json")
        if not isinstance(tree.get("run"), dict):
            raise CheckpointError(
                f"{self.path} is not a run folder: its config.json has no section `run`, only "
                f"{shown(sorted(tree))}"
            )
        return tree

    def check_free(self, *, resume: bool) -> bool:
        """Return whether the folder holds a run; refuse a run that may not be continued.

        Raises:
            CheckpointError: if the folder holds a run and `resume` is false, or other files.
        """
        others = any(p.name != LOCK for p in self.path.iterdir())
        if others and not self.exists:
            raise CheckpointError(
                f"{self.path} holds other files and no run; choose another with run.path=FOLDER"
            )
        if others and not resume:
            raise CheckpointError(
                f"run folder {self.path} already exists and is not empty; continue it with "
                "--resume, or choose another with run.path=FOLDER"
            )
        return self.exists

    def create(self, config: Config) -> None:
        """Create the folder of a new run, and write config.json.

        Raises:
            CheckpointError: if it cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            write_atomic(self.path / "config.json", dump_config(config))
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error}; choose another with run.path=FOLDER"
            ) from error

    def check_same(self, config: Config) -> None:
        """Refuse to continue a run under a configuration that would change it.

        Raises:
            CheckpointError: naming every key that differs, with both values.
        """
        lines = [
            f"  {key}: {old!r} in the run, {new!r} now"
            for key, (old, new) in self.differences(config).items()
            if not key.startswith(FREE_ON_RESUME)
        ]
        if lines:
            raise CheckpointError(
                f"run {self.path} was started with another configuration:\n"
                + "\n".join(lines)
                + "\ncontinue it as it was with: "
                + command_line("train", self.path, "--resume")
            )

    def differences(self, config: Config) -> dict[str, tuple[Any, Any]]:
        """Return the keys in which a configuration differs from that of the run, with both values.

        Raises:
            CheckpointError: as `saved_config`.
        """
        old, new = flatten(self.saved_config()), flatten(config.model_dump(mode="json"))
        return {
            key: (old.get(key), new.get(key))
            for key in sorted(old.keys() | new.keys())
            if old.get(key) != new.get(key)
        }

    def locked(self) -> AbstractContextManager[None]:
        """Lock the folder, so that no second process trains in it; create it if necessary.

        Raises:
            CheckpointError: if another process holds the lock, or the file system has no locks.
        """
        return lock_folder(
            self.path,
            LOCK,
            busy=f"training in {self.path}; wait for it, or choose another with run.path=FOLDER",
            choose="run.path=FOLDER",
            error=CheckpointError,
        )

    def is_locked(self) -> bool:
        """Return whether a process is training in this folder."""
        return is_locked(self.path / LOCK)

    def append_metrics(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl."""
        append_line(self.metrics, _line(record))

    def replace_metrics(self, record: dict[str, Any]) -> list[dict[str, Any]]:
        """Write a record in place of that of the same kind and step, and return all records."""
        same = (record["kind"], record["step"])
        others = [r for r in self.read_metrics() if (r["kind"], r["step"]) != same]
        records = [*others, drop_nonfinite(record)]
        self.write_records(records)
        return records

    def truncate_metrics(self, step: int, report: Callable[[str], None]) -> list[dict[str, Any]]:
        """Drop the records after `step`, and return all that there were.

        A last line that is cut off is dropped too. If other lines are damaged, the file as it was
        is kept under another name.

        Args:
            step: last step whose records are kept.
            report: called with a sentence about damaged lines.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        content = self._metrics_content()
        lines = _lines(content)
        records = [parse_record(line) for line in lines]
        damaged = [number for number, record in enumerate(records, 1) if record is None]
        if damaged and damaged[-1] == len(lines) and not content.endswith(b"\n"):
            damaged.pop()  # the writer was killed
        if damaged:
            copy = self._free_name("metrics-damaged", ".jsonl")
            write_atomic(copy, content)
            report(
                f"{self.metrics}: {len(damaged)} of {len(lines)} lines cannot be read, such as "
                f"line {damaged[0]}; they are left out, and the file as it was is in {copy}"
            )
        whole = [record for record in records if record is not None]
        self.write_records(record for record in whole if record["step"] <= step)
        return whole

    def read_metrics(self, kind: KindT | None = None) -> list[dict[str, Any]]:
        """Return the records of metrics.jsonl, or those of one kind, without damaged lines.

        Raises:
            CheckpointError: if the file cannot be read.
        """
        records = map(parse_record, _lines(self._metrics_content()))
        return [r for r in records if r is not None and (kind is None or r["kind"] == kind)]

    def _metrics_content(self) -> bytes:
        try:
            return read_bytes(self.metrics, LARGEST_METRICS)
        except FileNotFoundError:
            return b""
        except OSError as error:
            raise CheckpointError(
                f"{self.metrics} cannot be read: {error.strerror}; move it away to continue "
                "without the records in it"
            ) from error

    def _free_name(self, stem: str, suffix: str) -> Path:
        names = (self.path / f"{stem}{n or ''}{suffix}" for n in itertools.count())
        return next(path for path in names if not path.exists())

    def write_records(self, records: Iterable[dict[str, Any]]) -> None:
        """Write metrics.jsonl anew."""
        write_atomic(self.metrics, "".join(_line(record) for record in records))


def _lines(content: bytes) -> list[str]:
    return content.decode("utf-8", "replace").splitlines()


def parse_record(line: str) -> dict[str, Any] | None:
    """Return the record in a line of metrics.jsonl, None if the line is damaged."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    whole = isinstance(record, dict) and isinstance(record.get("kind"), str)
    return record if whole and isinstance(record.get("step"), int) else None


def _line(record: dict[str, Any]) -> str:
    return json.dumps(drop_nonfinite(record)) + "\n"


def started_with(env: Mapping[str, Any]) -> list[str] | None:
    """Return the words of the command that last started the run of an env.json, None if unknown."""
    words = env.get("command")
    if not isinstance(words, list) or not words:
        return None
    program = Path(str(words[0])).name.replace("__main__.py", "muonscale")
    return [program, *map(str, words[1:])]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a configuration's values by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
