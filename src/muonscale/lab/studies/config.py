"""The configuration keys that every kind of study has, and checks that several kinds share.

A study recipe is a YAML file of these keys; `key=value` on the command line overrides one.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from muonscale.errors import nearest, shown
from muonscale.lab.config.sections import Positive, Section, Seed
from muonscale.lab.report.check import NAME as FILE_NAME
from muonscale.lab.studies.gpus import visible_gpus

Number = Annotated[float, Field(gt=0)]
Seeds = Annotated[list[Seed], Field(min_length=1)]

LONGEST_NAME = 100
"""Longest name in characters; file systems accept 255, and a file has several names in its own."""

SET_BY_STUDY = ("run.path", "run.seed", "run.threads")
"""Keys of a run that the study sets itself."""


class ExecutorSection(Section):
    """Where runs are done: `executor.*`."""

    kind: Literal["local", "inline", "slurm"] = "local"
    """`local`: several processes of this machine at a time; `inline`: this process, one run after
    the other; `slurm`: a job array on a cluster."""
    workers: Positive | None = None
    """Number of runs at a time. The default is one for each GPU of the machine, or for `threads`
    cores without any: give it for runs with run.device=cpu beside GPUs. Slurm gets all at once."""
    threads: Positive = 1
    """CPU threads of a run."""
    flops_per_second: Annotated[float, Field(gt=0)] | None = None
    """Speed of one run, from which a plan computes hours; measured here when not given."""
    slurm: dict[str, Any] = {}
    """Options of submitit's executor, such as `{slurm_partition: gpu, timeout_min: 240}`."""

    @property
    def concurrent_runs(self) -> int | None:
        """The number of runs at a time; None where the cluster decides."""
        if self.workers is not None or self.kind == "slurm":
            return self.workers
        of_process = getattr(os, "sched_getaffinity", None)  # macOS has none
        cores = len(of_process(0)) if of_process else os.cpu_count() or 1
        if self.kind == "inline":
            return 1
        return len(visible_gpus()) or max(1, cores // self.threads)


class StudyConfig(Section):
    """Keys that every study has."""

    study: str
    """The kind of study."""
    path: Path
    """Folder of the study."""
    base: str = "demo"
    """The recipe of `muonscale train` that all runs start from: a name, a YAML file or a run."""
    set: dict[str, Any] = {}
    """Keys of that recipe to change in all runs, such as `{train.tokens: 1000000}`."""
    executor: ExecutorSection = ExecutorSection()

    @field_validator("set", mode="before")
    @classmethod
    def _check_set(cls, value: Any) -> Any:
        return check_overrides(value, "set")


def check_overrides(value: Any, where: str) -> Any:
    """Return overrides of a recipe unchanged.

    Raises:
        ValueError: for a key that does not have the form section.key.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}={value!r} must map keys such as train.tokens to values")
    for key in value:
        if "." not in str(key):
            raise ValueError(
                f"{where}: {key!r} is not a key of a recipe; give section.key, such as train.tokens"
            )
    return value


def check_names(where: str, names: Iterable[object]) -> None:
    """Raise ValueError for a name that no file of the report could have.

    Names that differ in upper and lower case alone are one file on some systems.
    """
    seen: dict[str, str] = {}
    for name in map(str, names):
        if FILE_NAME.fullmatch(name) is None or len(name) > LONGEST_NAME:
            raise ValueError(
                f"{where}: {shown(name)} cannot be part of a file's name; use at most "
                f"{LONGEST_NAME} letters, digits, '.', '_' and '-', a letter or a digit first"
            )
        if (other := seen.setdefault(name.lower(), name)) != name:
            raise ValueError(f"{where}: {other!r} and {name!r} differ only in case")


def check_variants(where: str, given: Iterable[str], variants: Collection[str]) -> None:
    """Raise ValueError, with the nearest variant, for a name of `given` that is not a variant."""
    for name in sorted(given):
        if name not in variants:
            raise ValueError(f"{where}: no variant {name!r}; {nearest(name, variants)}")


def check_rising(name: str, values: Sequence[float], least: int = 1) -> None:
    """Raise ValueError for values that do not rise, or are fewer than `least`."""
    if sorted(set(values)) != list(values) or len(values) < least:
        number = f"be {least} values or more that " if least > 1 else ""
        raise ValueError(f"{name}={values} must {number}rise from one to the next")


def check_distinct(name: str, values: Sequence[object]) -> None:
    """Raise ValueError for a value that is given twice."""
    for value in values:
        if list(values).count(value) > 1:
            raise ValueError(f"{name}={values} repeats {value}; give each value once")


def parse_named_overrides(
    value: Any, where: str, known: Mapping[str, object]
) -> dict[str, dict[str, Any]]:
    """Return overrides by name, from a list of known names or a mapping of names to overrides.

    Raises:
        ValueError: for a name without overrides that is not known or that no file could have, or
            a wrong key.
    """
    listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
    given = {name: {} for name in value} if listed else value
    if not isinstance(given, dict):
        raise ValueError(f"{where}={value!r} must be a list of names, or map names to keys")
    check_names(where, given)
    for name, keys in given.items():
        if not check_overrides(keys or {}, f"{where}.{name}") and name not in known:
            hint = f"; {nearest(name, known)}" if known else ""
            raise ValueError(f"{where}: {name!r} is no known name and has no keys of its own{hint}")
    return {str(name): keys or {} for name, keys in given.items()}
