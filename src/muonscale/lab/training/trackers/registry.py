"""All trackers of a run, none of which can stop it.

Whatever a tracker raises is one warning: it is switched off and the run goes on. `trackers.json` in
the run folder keeps the id of the run, and how far each tracker was told, so that a resumed run goes
on in the same place and tells nothing twice.
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
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.trackers.records import (
    Beginning,
    Told,
    Tracker,
    flat,
    last_steps,
    numbers,
)
from muonscale.lab.training.trackers.tensorboard import TensorBoard
from muonscale.lab.training.trackers.trackio import Trackio
from muonscale.lab.training.trackers.wandb import WandB

TRACKERS: dict[str, Callable[[Beginning], Tracker]] = dict(
    zip(TRACKER_NAMES, (TensorBoard, WandB, Trackio), strict=True)
)
STATE = "trackers.json"


def check_trackers(config: Config) -> None:
    """Refuse a tracker whose package is not installed.

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
    """Tells the trackers of a run; none before `open`.

    Args:
        warn: says that one was switched off.
    """

    def __init__(self, warn: Callable[[str], None] = lambda text: None) -> None:
        self._warn = warn
        self._active: dict[str, Tracker] = {}
        self._told: dict[str, Told] = {}
        self._failures: dict[str, str] = {}
        self._state: dict[str, Any] = {}
        self._path: Path | None = None
        self._ended = False

    def open(
        self, config: Config, folder: RunFolder, seen: Sequence[dict[str, Any]], step: int
    ) -> None:
        """Begin with the configured trackers, or go on where they were left.

        One that is new to the run, or was switched off, is told what it has missed.

        Args:
            config: of the run.
            folder: whose metrics end at `step`.
            seen: the metrics records as they were before they were cut off there.
            step: optimizer steps done.

        Raises:
            CheckpointError: if `trackers.json` is damaged.
        """
        self._path = folder.path / STATE
        if not config.track.to and not self._path.exists():
            return
        self._state, last = _read(self._path), last_steps(seen)
        told = {name: far if far is not None else last for name, far in self._known.items()}
        for name in config.track.to:
            self._told[name] = dict(told.get(name, {}))
            with self._guard(name, "begin"):
                self._open(name, config, folder.path.resolve(), step)
        self._keep({**told, **dict.fromkeys(self._active)})
        for record in folder.read_metrics():
            self.log(record)

    @property
    def _known(self) -> dict[str, Told | None]:
        """By tracker that was ever told: how far, None if of all that is in the metrics."""
        return self._state["known"]

    def _keep(self, known: dict[str, Told | None]) -> None:
        assert self._path is not None
        self._state["known"] = known
        write_json(self._path, self._state)

    def _open(self, name: str, config: Config, folder: Path, step: int) -> None:
        section = config.track
        beginning = Beginning(
            folder=folder,
            config=config.model_dump(mode="json"),
            project=section.project,
            name=section.name or folder.name,
            id=self._state["id"],
            mode=section.mode,
            known=name in self._known,
            step=step,
        )
        tracker = TRACKERS[name](beginning)
        if tracker.rewinds:
            self._told[name] = {kind: min(at, step) for kind, at in self._told[name].items()}
        self._active[name] = tracker

    def log(self, record: dict[str, Any]) -> None:
        """Tell a metrics record to every tracker that has not been told it."""
        kind, step, values = record["kind"], record["step"], flat(record)
        for name, tracker in list(self._active.items()):
            if step > self._told[name].get(kind, -1):
                with self._guard(name, "log"):
                    tracker.log(values, step)
                    self._told[name][kind] = step

    def end(self, result: dict[str, Any], step: int) -> dict[str, str]:
        """Tell the result, close, and return what became of every tracker, for result.json."""
        figures = numbers({key: value for key, value in result.items() if key != "step"})
        for name, tracker in list(self._active.items()):
            with self._guard(name, "end"):
                tracker.end(figures, result["sample"], step)
        self._ended = True
        names = [*self._active, *self._failures]
        self.close()
        return {name: self._failures.get(name, "told to the end") for name in names}

    def close(self) -> None:
        """Let all go. A run that has not ended can be resumed."""
        for name, tracker in list(self._active.items()):
            with self._guard(name, "finish"):
                tracker.close(finished=self._ended)
            self._active.pop(name, None)

    def facts(self) -> dict[str, str]:
        """Return where each tracker is, or why it is switched off, for env.json."""
        places = {}
        for name, tracker in list(self._active.items()):
            with self._guard(name, "say where it is"):
                places[name] = tracker.place
        return places | self._failures

    @contextmanager
    def _guard(self, name: str, what: str) -> Generator[None]:
        """Switch a tracker off when it raises: a run is worth more than who looks at it."""
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
                with suppress(OSError):  # a full disk is the run's to report, not a tracker's
                    self._keep({**self._known, name: self._told[name]})


def _read(path: Path) -> dict[str, Any]:
    """Return `id` of the run, and `known`: by tracker, how far it was told."""
    remedy = "remove it, and the trackers begin new runs"
    tree = read_object(path, remedy)
    if tree is None:
        return {"id": uuid.uuid4().hex[:8], "known": {}}
    if not _is_state(tree):
        raise CheckpointError(f"{path} holds {shown(tree, 60)} and not `id` and `known`; {remedy}")
    return tree


def _is_state(tree: Any) -> bool:
    if not (isinstance(tree, dict) and isinstance(tree.get("id"), str)):
        return False
    known = tree.get("known")
    return isinstance(known, dict) and all(
        far is None or (isinstance(far, dict) and all(type(step) is int for step in far.values()))
        for far in known.values()
    )
