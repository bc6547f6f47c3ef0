"""The configuration of a study: what all kinds have, and how a recipe becomes one.

A study recipe is a YAML file of these keys; `key=value` on the command line overrides it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from muonscale.errors import nearest
from muonscale.lab.config.sections import Positive, Section


class ExecutorSection(Section):
    """Where runs are done: `executor.*`."""

    kind: Literal["local", "inline", "slurm"] = "local"
    """`local`: processes of this machine, several at a time; `inline`: one after the other in this
    process; `slurm`: a job array of a cluster."""
    workers: Positive | None = None
    """Runs at a time; as many as this machine has cores for when not given, all under Slurm."""
    threads: Positive = 1
    """CPU threads of a run."""
    flops_per_second: Annotated[float, Field(gt=0)] | None = None
    """Of one run, for the hours a plan says; measured here when not given."""
    slurm: dict[str, Any] = {}
    """Options of submitit's executor, such as `{slurm_partition: gpu, timeout_min: 240}`."""


class StudyConfig(Section):
    """Keys that every study has."""

    study: str
    """Its kind."""
    path: Path
    """Folder of the study."""
    base: str = "demo"
    """The recipe of `muonscale train` that all runs start from: a name, a YAML file or a run."""
    set: dict[str, Any] = {}
    """Keys of that recipe that are different in all runs, such as `{train.tokens: 1000000}`."""
    executor: ExecutorSection = ExecutorSection()

    @field_validator("set", mode="before")
    @classmethod
    def _dotted(cls, value: Any) -> Any:
        return check_dotted(value, "set")


def check_dotted(value: Any, where: str) -> Any:
    """Return overrides as they are; refuse what is none.

    Raises:
        ValueError: for a key that does not have the form section.key.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{where}={value!r} must map keys such as train.tokens to values")
    for key in value:
        if "." not in str(key):
            raise ValueError(
                f"{where}: {key!r} is not a key of a recipe, which are section.key"
                "; give one such as train.tokens"
            )
    return value


def check_variants(where: str, given: Iterable[str], variants: Collection[str]) -> None:
    """Refuse the first name of `given` that is no variant.

    Raises:
        ValueError: naming the key, the name and the nearest variants.
    """
    for name in sorted(given):
        if name not in variants:
            raise ValueError(f"{where}: no variant {name!r}; {nearest(name, variants)}")


def check_equal_effort(lr: Sequence[float], lr_of: Mapping[str, Sequence[float]]) -> None:
    """Refuse learning rates of a variant that are not as many as those of the others.

    Raises:
        ValueError: naming the variant and both numbers.
    """
    for name, rates in lr_of.items():
        if len(rates) != len(lr):
            raise ValueError(
                f"lr_of.{name} has {len(rates)} learning rates and lr has {len(lr)}: variants "
                "are tuned with equal effort, so give as many"
            )


def named_overrides(value: Any, where: str, known: Mapping[str, object]) -> dict[str, Any]:
    """Return names and their overrides, of a list of known names or of a mapping.

    Raises:
        ValueError: for a name without keys that is not known, or keys that are none.
    """
    listed = isinstance(value, list) and all(isinstance(name, str) for name in value)
    given = {name: {} for name in value} if listed else value
    if not isinstance(given, dict):
        raise ValueError(f"{where}={value!r} must be a list of names, or map names to keys")
    for name, keys in given.items():
        if not check_dotted(keys or {}, f"{where}.{name}") and name not in known:
            hint = nearest(name, known) if known else "none is known here"
            raise ValueError(
                f"{where}: {name!r} has no keys of its own, and is no known name; {hint}"
            )
    return {str(name): keys or {} for name, keys in given.items()}
