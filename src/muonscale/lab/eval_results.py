"""eval/result.json: the measurements of a model, one entry for each checkpoint.

    {"checkpoints": [{"step", "weights", "parameters",
                      "texts": [...], "tasks": [...], "suites": [...], "samples": [...]}]}

A repeated measurement replaces the earlier one; all others stay. The checkpoint that was measured
last comes last.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from muonscale.errors import CheckpointError
from muonscale.lab.files import drop_nonfinite, read_object, write_json

KindT = Literal["texts", "tasks", "samples", "suites"]
Entry = dict[str, Any]

FILE = "result.json"

SAME: dict[KindT, tuple[str, ...]] = {
    "texts": ("fingerprint", "split", "sequence_length"),
    "tasks": ("task", "shots", "limit"),
    "samples": ("prompt", "tokens", "temperature", "top_k", "seed"),
    "suites": ("suite",),
}
"""Keys that identify a measurement of a kind."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The measurements of one checkpoint in a folder."""

    folder: Path
    step: int | None
    weights: str
    """SHA-256 of the weights."""
    parameters: int

    def check(self) -> None:
        """Check that measurements can be written, before they are made.

        Raises:
            CheckpointError: if the folder cannot be written, or holds a damaged result.
        """
        read_results(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".{FILE}.probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be written: {error.strerror or error}; choose another with "
                "--out FOLDER"
            ) from error

    def add(self, kind: KindT, measured: Entry) -> None:
        """Add a measurement to the file, atomically."""
        tree = read_results(self.folder)
        mine = self._mine(tree)
        others = [old for old in mine[kind] if _key(kind, old) != _key(kind, measured)]
        mine[kind] = [*others, measured]
        rest = [one for one in tree["checkpoints"] if not self._is_mine(one)]
        write_json(self.folder / FILE, drop_nonfinite({"checkpoints": [*rest, mine]}))

    def read(self) -> Entry:
        """Return all measurements of this checkpoint."""
        return self._mine(read_results(self.folder))

    def _mine(self, tree: Entry) -> Entry:
        empty: Entry = {
            "step": self.step,
            "weights": self.weights,
            "parameters": self.parameters,
            **{kind: [] for kind in SAME},
        }
        return next((one for one in tree["checkpoints"] if self._is_mine(one)), empty)

    def _is_mine(self, one: Entry) -> bool:
        return (one.get("step"), one.get("weights")) == (self.step, self.weights)


def _key(kind: KindT, measured: Entry) -> str:
    return json.dumps([measured.get(name) for name in SAME[kind]], sort_keys=True)


def read_results(folder: Path) -> Entry:
    """Return the content of the file in a folder; no checkpoints if there is no file.

    Raises:
        CheckpointError: if it is damaged.
    """
    path = folder / FILE
    remedy = "remove it, or write elsewhere with --out FOLDER"
    tree = read_object(path, remedy)
    if tree is None:
        return {"checkpoints": []}
    if not is_whole(tree):
        raise CheckpointError(f"{path} is not a result of an evaluation; {remedy}")
    return tree


def is_whole(tree: object) -> bool:
    """Return whether a tree has the form of the file."""
    checkpoints = tree.get("checkpoints") if isinstance(tree, dict) else None
    return isinstance(checkpoints, list) and all(_is_checkpoint(one) for one in checkpoints)


def _is_checkpoint(one: object) -> bool:
    if not isinstance(one, dict):
        return False
    lists = [one.get(kind) for kind in SAME]
    return all(
        isinstance(items, list) and all(isinstance(item, dict) for item in items) for items in lists
    )
