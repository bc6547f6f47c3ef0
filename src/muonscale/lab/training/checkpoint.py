"""Checkpoints that are either whole or absent.

A checkpoint is a folder `step-00000100` written by torch.distributed.checkpoint under a temporary
name and renamed when a manifest with the size and SHA-256 of every file is in place. The manifest is
verified before anything is read; a damaged checkpoint is passed over for the one before it. All
ranks write and read, in a folder that all of them see; the first one says when it is whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from muonscale.errors import CheckpointError
from muonscale.lab.files import write_json
from muonscale.lab.parallel.processes import Processes

MANIFEST = "manifest.json"
FACTS = "facts.json"
TENSORS = ".metadata"
"""Where torch.distributed.checkpoint says which file holds what of which tensor."""


def folder_name(step: int) -> str:
    """Return the name of the checkpoint folder of a step."""
    return f"step-{step:08d}"


def saved_steps(root: Path) -> list[int]:
    """Return the steps that have a checkpoint folder, newest first."""
    folders = (p for p in root.glob("step-" + 8 * "[0-9]") if p.is_dir())
    return sorted((int(p.name[5:]) for p in folders), reverse=True)


def save_checkpoint(
    root: Path,
    step: int,
    tensors: dict[str, Any],
    facts: dict[str, Any],
    processes: Processes,
    *,
    keep: int,
    marked: Collection[int] = (),
) -> None:
    """Write the checkpoint of a step and remove all but the `keep` newest: a collective.

    Args:
        root: folder of the checkpoints.
        step: optimizer steps done.
        tensors: nested state dict of tensors.
        facts: what else the run needs, as JSON.
        processes: this one and the others.
        keep: checkpoints that stay on disk, this one included, besides ...
        marked: ... those of these steps, which are never removed.

    Raises:
        CheckpointError: if it cannot be written. Checkpoints written before stay as they are.
    """
    target = root / folder_name(step)
    temporary = root / f".writing-{target.name}"

    def begin() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)

    def complete(manifest: dict[str, dict[str, Any]]) -> None:
        write_json(temporary / MANIFEST, manifest)
        _clear(target)
        temporary.rename(target)
        _sync_folder(root)
        # A later one was damaged when this run went on from before it: it does not count.
        others = [saved for saved in saved_steps(root) if saved <= step and saved not in marked]
        for old in others[keep:]:
            shutil.rmtree(root / folder_name(old), ignore_errors=True)

    try:
        processes.on_first(begin)
        with _silent():
            dcp.save(tensors, checkpoint_id=str(temporary), no_dist=not processes.many)
        processes.on_first(lambda: write_json(temporary / FACTS, facts))
        manifest = _manifest(temporary, processes)
        processes.on_first(lambda: complete(manifest))
    except (OSError, CheckpointException, RuntimeError) as error:
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise CheckpointError(_not_written(root, step, error)) from error


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Path | None:
    """Return what `whole_checkpoint` does, and remove what a killed writer has left."""
    for stale in root.glob(".writing-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return whole_checkpoint(root, report)


def whole_checkpoint(root: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest whole checkpoint, saying of each damaged one why it is passed over.

    It only reads: another process may be writing a checkpoint meanwhile.

    Raises:
        CheckpointError: if there are checkpoints and none of them is whole.
    """
    steps = saved_steps(root)
    for step in steps:
        folder = root / folder_name(step)
        damage = find_damage(folder)
        if damage is None:
            return folder
        report(f"checkpoint {folder} is damaged ({damage}); trying the one before it")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {root} is whole; "
            "start again in another folder with run.path=FOLDER"
        )
    return None


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest; return what is wrong, None if nothing is.

    A manifest that leaves out a file that is read, or facts of another step than the folder's name
    says, are damage too.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        needed = {FACTS, TENSORS, *(p.name for p in folder.glob("*.distcp"))}
        if missing := sorted(needed - manifest.keys()):
            return f"{missing[0]} is not in its manifest"
        for name, entry in manifest.items():
            path = folder / name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if _sha256(path) != entry["sha256"]:
                return f"the content of {name} has changed"
        step = load_facts(folder).get("step")
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    named = folder.name.removeprefix("step-")
    if step is not None and named.isdecimal() and step != int(named):
        return f"it holds step {step}"
    return None


def load_facts(folder: Path) -> dict[str, Any]:
    """Return what `save_checkpoint` was given as `facts`."""
    return json.loads((folder / FACTS).read_text(encoding="utf-8"))


def load_tensors(folder: Path, tensors: dict[str, Any], processes: Processes) -> None:
    """Read a checkpoint into the tensors of a nested state dict, in place: a collective.

    Raises:
        CheckpointError: if a tensor is missing or has another shape.
    """
    try:
        with _silent():
            dcp.load(tensors, checkpoint_id=str(folder), no_dist=not processes.many)
    except (CheckpointException, RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint {folder} does not fit this run: {error}; use the versions in env.json of the "
            "run, or start a new one with run.path=FOLDER"
        ) from error


@contextmanager
def _silent() -> Generator[None]:
    """Silence torch's remark that there is no process group: one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _manifest(folder: Path, processes: Processes) -> dict[str, dict[str, Any]]:
    """Return size and hash of every file; the ranks share the work."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    share = {
        str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": _sha256(p)}
        for p in files[processes.rank :: processes.topology.world]
    }
    return dict(sorted(item for part in processes.gather(share) for item in part.items()))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _clear(path: Path) -> None:
    """Make room for a folder: what is there is damaged, and may be a file or a link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_written(root: Path, step: int, error: BaseException) -> str:
    causes = error.failures.values() if isinstance(error, CheckpointException) else [error]
    reason = "; ".join(str(cause[0] if isinstance(cause, tuple) else cause) for cause in causes)
    free = shutil.disk_usage(root).free  # torch's writer does not say that a disk is full
    left = saved_steps(root)
    last = f"the last good one is step {left[0]}" if left else "there is none before it"
    return (
        f"checkpoint of step {step} cannot be written to {root}: {reason} "
        f"({free:,} bytes are free there); {last}. "
        "Mend the cause and continue with --resume."
    )
