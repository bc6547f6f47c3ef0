"""All trackers of a run. None of them can stop it.

If a tracker raises an exception, it is switched off with a warning and the run continues.
`trackers.json` in the run folder contains the id of the run and the progress of each tracker, so
that a resumed run continues in the same place and logs nothing twice.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from muonscale.errors import CheckpointError, ConfigError, shown
from muonscale.lab.config.load import Config
from muonscale.lab.config.sections import TRACKER_NAMES
from muonscale.lab.files import read_object, write_json
from muonscale.lab.training.trackers.records import (
    Progress,
    Tracker,
    TrackerStart,
    flat,
    last_steps,
    numbers,
)
from muonscale.lab.training.trackers.tensorboard import TensorBoard
from muonscale.lab.training.trackers.trackio import Trackio
from muonscale.lab.training.trackers.wandb import WandB

TRACKERS: dict[str, Callable[[TrackerStart], Tracker]] = dict(
    zip(TRACKER_NAMES, (TensorBoard, WandB, Trackio), strict=True)
)
STATE = "trackers.json"


def check_trackers(config: Config) -> None:
    """Check that the packages of all trackers are installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    for name in config.track.to:
        if find_spec(name) is None:
            raise ConfigError(
                f"track={name}: the package {name} is not installed; install it with: "
                'pip install "muonscale[track]", or leave it out (track=none)'
            )


class Trackers:
    """The trackers of a run. They log nothing before `open`.

    Args:
        warn: called when a tracker is switched off.
    """

    def __init__(self, warn: Callable[[str], None] = lambda text: None) -> None:
        self._warn = warn
        self._active: dict[str, Tracker] = {}
        self._progress: dict[str, Progress] = {}
        self._failures: dict[str, str] = {}
        self._state: dict[str, Any] = {}
        self._path: Path | None = None
        self._ended = False

    def open(self, config: Config, folder: Path, seen: Sequence[dict[str, Any]], step: int) -> None:
        """Start the configured trackers, or resume them.

        A tracker that is new to the run, or was switched off, logs the records it has missed.

        Args:
            config: the configuration of the run.
            folder: the run folder.
            seen: the metrics records, those after `step` included.
            step: optimizer steps done.

        Raises:
            CheckpointError: if `trackers.json` is damaged.
        """
        self._path = folder / STATE
        if not config.track.to and not self._path.exists():
            return
        self._state, last = _read(self._path), last_steps(seen)
        saved = {name: last if at is None else at for name, at in self._known.items()}
        section, path = config.track, folder.resolve()
        for name in section.to:
            self._progress[name] = dict(saved.get(name, {}))
            with self._guard(name, "begin"):
                start = TrackerStart(
                    folder=path,
                    config=config.model_dump(mode="json"),
                    project=section.project,
                    name=section.name or path.name,
                    id=self._state["id"],
                    mode=section.mode,
                    known=name in self._known,
                    step=step,
                )
                tracker = TRACKERS[name](start)
                if tracker.rewinds:
                    progress = self._progress[name].items()
                    self._progress[name] = {kind: min(at, step) for kind, at in progress}
                self._active[name] = tracker
        self._save({**saved, **dict.fromkeys(self._active)})
        for record in seen:
            if record["step"] <= step:
                self.log(record)

    @property
    def _known(self) -> dict[str, Progress | None]:
        """Progress of every tracker used so far; None if it has logged all metrics."""
        return self._state["known"]

    def _save(self, known: dict[str, Progress | None]) -> None:
        assert self._path is not None
        self._state["known"] = known
        write_json(self._path, self._state)

    def log(self, record: dict[str, Any]) -> None:
        """Log a metrics record with every tracker that has not logged it yet."""
        kind, step, values = record["kind"], record["step"], flat(record)
        for name, tracker in list(self._active.items()):
            if step > self._progress[name].get(kind, -1):
                with self._guard(name, "log"):
                    tracker.log(values, step)
                    self._progress[name][kind] = step

    def end(self, result: dict[str, Any], step: int) -> dict[str, str]:
        """Log the result, close, and return the final state of every tracker, for result.json."""
        figures = numbers({key: value for key, value in result.items() if key != "step"})
        for name, tracker in list(self._active.items()):
            with self._guard(name, "end"):
                tracker.end(figures, result["sample"], step)
        self._ended = True
        names = [*self._active, *self._failures]
        self.close()
        return {name: self._failures.get(name, "complete") for name in names}

    def close(self) -> None:
        """Close all trackers. A run that has not ended can be resumed."""
        for name, tracker in list(self._active.items()):
            with self._guard(name, "finish"):
                tracker.close(finished=self._ended)
            self._active.pop(name, None)

    def facts(self) -> dict[str, str]:
        """Return the place of each tracker, or why it is switched off, for env.json."""
        places = {}
        for name, tracker in list(self._active.items()):
            with self._guard(name, "return its place"):
                places[name] = tracker.place
        return places | self._failures

    @contextmanager
    def _guard(self, name: str, what: str) -> Generator[None]:
        """Switch a tracker off if it raises an exception: it must not stop the run."""
        try:
            yield
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            self._failures[name] = (
                f"switched off: failed to {what}: {type(error).__name__}: {first}"
            )
            self._warn(f"track={name} is {self._failures[name]}")
            self._active.pop(name, None)
            if name in self._known:
                with suppress(OSError):  # the run itself reports a full disk
                    self._save({**self._known, name: self._progress[name]})


def _read(path: Path) -> dict[str, Any]:
    """Return the `id` of the run, and `known`: the progress by tracker."""
    remedy = "remove it, and the trackers start new runs"
    tree = read_object(path, remedy)
    if tree is None:
        return {"id": uuid.uuid4().hex[:8], "known": {}}
    known = tree.get("known")
    valid = isinstance(tree.get("id"), str) and isinstance(known, dict)
    if not valid or not all(at is None or _is_progress(at) for at in known.values()):
        raise CheckpointError(
            f"{path} contains {shown(tree, 60)} instead of `id` and `known`; {remedy}"
        )
    return tree


def _is_progress(value: Any) -> bool:
    return isinstance(value, dict) and all(type(step) is int for step in value.values())
