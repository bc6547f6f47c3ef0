"""Checkpoints that are either complete or absent.

A checkpoint is a folder `step-00000100`. torch.distributed.checkpoint writes it under a temporary
name; it is renamed after a manifest with the size and SHA-256 of every file has been written. The
manifest is verified before anything is read, and a damaged checkpoint is skipped for the one before
it. All ranks write and read, in a folder that all of them can access; the first rank renames.
"""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import warnings
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from muonscale.errors import CheckpointError, ConfigError, MuonscaleError, command_line
from muonscale.lab.config.load import Config
from muonscale.lab.files import (
    UnusualFileError,
    check_regular,
    free_space,
    read_text,
    sha256,
    size_and_hash,
    sync_folder,
    write_json,
)
from muonscale.lab.parallel.processes import Processes, is_lost_peer
from muonscale.lab.training.checkpoint_reader import (
    TENSORS,
    CheckpointPlanner,
    CheckpointReader,
    read_metadata,
)
from muonscale.lab.training.schedule import spans
from muonscale.optim.distributed.shard_block import with_shard_blocks

MANIFEST = "manifest.json"
FACTS = "facts.json"
PERMANENT_READ_ERRORS = (FileNotFoundError, IsADirectoryError, NotADirectoryError, UnusualFileError)
"""The file itself is wrong. Any other error of reading may be temporary."""


def steps_to_keep(config: Config) -> set[int]:
    """Return the steps whose checkpoints are never removed.

    They are the first step after every mark, and the step at which the decay of a last stage that
    is constant before begins, if `checkpoint.before_decay` is set.

    Raises:
        ConfigError: naming a mark beyond the end of the run.
    """
    timeline = config.timeline
    total = timeline.tokens_before(timeline.steps)
    for mark in config.checkpoint.marks:
        if mark > total:
            raise ConfigError(
                f"checkpoint.marks: {mark:,g} tokens are beyond the end of the run, which has "
                f"{total:,}; accepted: fractions of it below 1, or tokens from 1 up to its end"
            )
    marked = {max(1, timeline.step_at(mark)) for mark in config.checkpoint.marks}
    last = spans(config.schedule, timeline)[-1]
    if config.checkpoint.before_decay and last.decay and last.decay_start:
        marked.add(last.decay_start)
    return marked


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
    permanent: Collection[int] = (),
) -> None:
    """Write the checkpoint of a step and remove all but the `keep` newest: a collective.

    Args:
        root: folder of the checkpoints.
        step: optimizer steps done.
        tensors: nested state dict of tensors.
        facts: the rest of the run's state, as JSON.
        processes: the processes of the run.
        keep: number of checkpoints to keep, including this one and excluding permanent ones.
        permanent: steps whose checkpoints are never removed.

    Raises:
        CheckpointError: if it cannot be written. Earlier checkpoints are not changed.
    """
    written = CheckpointWriter(root, step, processes, keep, permanent)
    with written.explain():
        written.begin(facts)
        with _ignore_missing_group():
            dcp.save(
                with_shard_blocks(tensors),
                checkpoint_id=str(written.temporary),
                no_dist=not processes.many,
            )
        written.complete(written.hash_share())


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes a checkpoint under a temporary name, and completes it."""

    root: Path
    step: int
    processes: Processes
    keep: int
    permanent: Collection[int]

    @property
    def temporary(self) -> Path:
        """The folder in which the files are written."""
        return self.root / f".writing-{folder_name(self.step)}"

    def begin(self, facts: dict[str, Any]) -> None:
        """Create the folder, and write what is no tensor: a collective."""

        def create() -> None:
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
            write_json(self.temporary / FACTS, facts)

        self.processes.on_first(create)

    def hash_share(self) -> dict[str, dict[str, Any]]:
        """Return size and hash of this rank's share of the files, by name."""
        files = sorted(p for p in self.temporary.rglob("*") if p.is_file())
        return {
            str(p.relative_to(self.temporary)): size_and_hash(p)
            for p in files[self.processes.rank :: self.processes.topology.world]
        }

    def complete(self, share: dict[str, dict[str, Any]]) -> None:
        """Write the manifest, rename the folder and remove what is not kept: a collective."""
        entries = (item for part in self.processes.gather(share) for item in part.items())
        manifest = dict(sorted(entries))
        self.processes.on_first(lambda: self._publish(manifest))

    def _publish(self, manifest: dict[str, dict[str, Any]]) -> None:
        target = self.root / folder_name(self.step)
        write_json(self.temporary / MANIFEST, manifest)
        # What exists under this name is damaged, and may be a file or a link.
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target, ignore_errors=True)
        else:
            target.unlink(missing_ok=True)
        self.temporary.rename(target)
        sync_folder(self.root)
        # A later one is damaged, since this run continued from before it: it does not count.
        others = [s for s in saved_steps(self.root) if s <= self.step and s not in self.permanent]
        for old in others[self.keep :]:
            shutil.rmtree(self.root / folder_name(old), ignore_errors=True)

    @contextmanager
    def explain(self) -> Generator[None]:
        """Turn errors of writing into ones that say how the run goes on; remove the folder.

        Raises:
            CheckpointError: if the checkpoint cannot be written.
        """
        try:
            yield
        except (OSError, CheckpointException, RuntimeError) as error:
            if self.processes.is_first:
                shutil.rmtree(self.temporary, ignore_errors=True)
            if is_lost_peer(error):
                raise MuonscaleError(
                    f"another process of the job is gone: checkpoint of step {self.step} is not "
                    "written, and this process cannot go on. When all processes can run again, "
                    f"{resume_advice(self.root)}"
                ) from error
            raise CheckpointError(_write_failure(self.root, self.step, error)) from error


def newest_checkpoint(root: Path, report: Callable[[str], None]) -> Path | None:
    """Return the result of `newest_intact_checkpoint`, and remove the files of a killed writer."""
    for stale in root.glob(".writing-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return newest_intact_checkpoint(root, report)


def newest_intact_checkpoint(root: Path, report: Callable[[str], None]) -> Path | None:
    """Return the newest complete checkpoint, reporting every damaged one that is skipped.

    It only reads: another process may write a checkpoint at the same time.

    Raises:
        CheckpointError: if there are checkpoints and none of them is complete.
    """
    steps = saved_steps(root)
    advice = "start again in another folder with run.path=FOLDER"
    for step in steps:
        folder = root / folder_name(step)
        try:
            damage = _compare_with_manifest(folder)
        except OSError as error:
            damage = f"{type(error).__name__}: {error}"
            if not isinstance(error, PERMANENT_READ_ERRORS):
                advice = f"remove the cause, and {resume_advice(root)}"
        if damage is None:
            return folder
        report(f"checkpoint {folder} is damaged ({damage}); trying the one before it")
    if steps:
        raise CheckpointError(
            f"none of the {len(steps)} checkpoints in {root} is complete and can be read; {advice}"
        )
    return None


def find_damage(folder: Path) -> str | None:
    """Compare a checkpoint with its manifest; return what is wrong, or None.

    A file that is missing from the manifest, and facts of another step than the folder name says,
    count as damage, and so does a file that cannot be read.
    """
    try:
        return _compare_with_manifest(folder)
    except OSError as error:
        return f"{type(error).__name__}: {error}"


def _compare_with_manifest(folder: Path) -> str | None:
    """Return the result of `find_damage`, or raise OSError if a file cannot be read."""
    try:
        manifest = json.loads(read_text(folder / MANIFEST))
        needed = {FACTS, TENSORS, *(p.name for p in folder.glob("*.distcp"))}
        if missing := sorted(needed - manifest.keys()):
            return f"{missing[0]} is not in its manifest"
        for name, entry in manifest.items():
            if Path(name).name != name:
                return f"its manifest names {name}, which is not in its folder"
            path = folder / name
            check_regular(path)
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256(path) != entry["sha256"]:
                return f"the content of {name} has changed"
        step = load_facts(folder).get("step")
        read_metadata(folder)
    except pickle.UnpicklingError as error:
        return f"{TENSORS}: {error}"
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"
    named = folder.name.removeprefix("step-")
    if step is not None and named.isdecimal() and step != int(named):
        return f"it contains step {step}"
    return None


def load_facts(folder: Path) -> dict[str, Any]:
    """Return the `facts` that `save_checkpoint` wrote."""
    return json.loads(read_text(folder / FACTS))


def load_tensors(folder: Path, tensors: dict[str, Any], processes: Processes) -> None:
    """Read a checkpoint into the tensors and values of a nested state dict, in place: a collective.

    Raises:
        CheckpointError: if a file cannot be read, or a tensor is missing or has another shape.
    """
    loaded = with_shard_blocks(tensors)
    try:
        with _ignore_missing_group():
            dcp.load(
                loaded,
                storage_reader=CheckpointReader(folder),
                planner=CheckpointPlanner(),
                no_dist=not processes.many,
            )
    except (OSError, CheckpointException, RuntimeError, ValueError, KeyError) as error:
        if any(isinstance(cause, OSError) for cause in _causes(error)):
            raise CheckpointError(
                f"checkpoint {folder} cannot be read: {_reason(error)}; remove the cause and repeat "
                "the command"
            ) from error
        raise CheckpointError(
            f"checkpoint {folder} does not fit this run: {_reason(error)}; use the versions in env.json of "
            "the run, or start a new one with run.path=FOLDER"
        ) from error
    _take_values(tensors, loaded)


def _take_values(into: Any, loaded: Any) -> None:
    """Put what is not a tensor from one nested state dict into another of the same keys."""
    for key in into if isinstance(into, dict) else range(len(into)):
        if isinstance(into[key], (dict, list)):
            _take_values(into[key], loaded[key])
        elif not isinstance(into[key], Tensor):
            into[key] = loaded[key]


@contextmanager
def _ignore_missing_group() -> Generator[None]:
    """Hide torch's warning that there is no process group: one process needs none."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _reason(error: BaseException) -> str:
    """Return why a load or save failed, once for ranks that failed for the same reason."""
    return "; ".join(dict.fromkeys(map(str, _causes(error))))


def _causes(error: BaseException) -> list[BaseException]:
    """Return the errors of all ranks that torch collected, or the error itself."""
    if not isinstance(error, CheckpointException):
        return [error]
    return [cause for cause, _ in error.failures.values()]


def _write_failure(root: Path, step: int, error: BaseException) -> str:
    left = saved_steps(root)
    last = f"the last good one is step {left[0]}" if left else "there is none before it"
    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    most = "" if limit == resource.RLIM_INFINITY else f", and a file may have {limit:,} (ulimit -f)"
    # torch's writer does not report that a disk is full
    return (
        f"checkpoint of step {step} cannot be written to {root}: {_reason(error)} "
        f"({free_space(root)}{most}); {last}. Remove the cause, and {resume_advice(root)}"
    )


def resume_advice(root: Path) -> str:
    """Return where a run that was stopped will continue, and with which command.

    Args:
        root: folder of its checkpoints, in the run folder.
    """
    try:
        steps = saved_steps(root)
        where = f"continue at step {steps[0]}" if steps else "begin again at step 0"
    except OSError:  # they cannot be read
        where = "continue"
    return f"{where} with: {command_line('train', root.parent, '--resume')}"
