"""From what was asked to the runs of a coordinate check: one configuration for each width and seed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.config.sections import ParallelSection, ScheduleSection, Section, TrainSection
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.widen import GrowT, fields_at, width_step
from muonscale.lab.parallel.processes import started_by_torchrun
from muonscale.lab.targets import is_model, is_preset
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.param_groups import build_param_groups, plan_transfer
from muonscale.lab.verify.check import comparable
from muonscale.transfer.multipliers import check_convention

NARROWEST = 32
"""The base where nothing else is said is at least so wide: below, laws of width hold badly."""
BATCH_TOKENS = 1024
LEAST_WIDTHS = 3
LEAST_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `muonscale coordcheck` is asked."""

    target: str
    """A recipe, a run folder, a preset, or a Hugging Face `config.json` or its folder; the last two
    are trained as the demo is."""
    overrides: Sequence[str] = ()
    widths: Sequence[int] | None = None
    """The smallest of them is the base, that the values of `optimizer.*` are for."""
    seeds: int = 3
    steps: int = 6
    convention: str | None = None
    """Instead of `transfer.convention`."""
    grow: GrowT = "heads"
    batch_tokens: int = BATCH_TOKENS
    """Of a step, at least; a whole number of sequences is taken."""


@dataclass(frozen=True)
class CheckPlan:
    """The runs of a check."""

    asked: Asked
    config: Config
    """Of all of them, but for width and seed."""
    shape: PreTrainedConfig
    """Of the model as it was given."""
    widths: tuple[int, ...]
    notes: tuple[str, ...] = field(default=())
    """What is not as it was given."""

    def at(self, width: int, seed: int) -> Config:
        """Return the configuration of one run; the first seed is 0."""
        return _at(self.config, self.shape, self.asked.grow, self.widths[0], width, seed)


def plan_check(asked: Asked) -> CheckPlan:
    """Return the runs of a check; no data are read.

    Raises:
        ConfigError: for what is asked and cannot be: too few widths, a width that the model cannot
            have, an unknown convention, a model that transfer does not know.
    """
    _check(asked)
    config = _configure(asked)
    shape = planned_shape(config)
    step = width_step(shape, asked.grow)
    widths = tuple(sorted(asked.widths)) if asked.widths else _default_widths(step)
    for width in widths:
        fields_at(shape, width, asked.grow)
    notes = []
    if config.transfer.base is not None:
        notes.append(
            f"the base is the width {widths[0]}, and not transfer.base={config.transfer.base}"
        )
    widest = _at(config, shape, asked.grow, widths[0], widths[-1], 0)
    config, freed = _without_decay(config, widest)
    if freed:
        notes.append(
            f"no weight decay of {', '.join(freed)}: a gain 1 + w with a factor folded in must not have "
            "any; give a run the same override, at the base width too"
        )
    return CheckPlan(asked, config, shape, widths, tuple(notes))


def _configure(asked: Asked) -> Config:
    """Return the configuration that all runs have in common."""
    config = _load(asked)
    if config.model.weights is not None:
        raise ConfigError(
            f"model.weights={config.model.weights}: a coordinate check draws the weights of every width "
            "itself; accepted: model.preset and model.config"
        )
    length = config.data.sequence_length
    sequences = max(1, -(-asked.batch_tokens // length))
    changes: dict[str, Section] = {
        # one step more: its batch, which no step reads, is the probe
        "train": TrainSection(
            steps=asked.steps + 1,
            batch_tokens=sequences * length,
            precision=config.train.precision,
        ),
        "schedule": ScheduleSection(name="constant", warmup=0),
        "parallel": ParallelSection(),
        "optimizer": config.optimizer.model_copy(update={"nonfinite": "skip", "state": None}),
    }
    if asked.convention is not None:
        changes["transfer"] = config.transfer.model_copy(update={"convention": asked.convention})
    return comparable(config.model_copy(update=changes))


def _check(asked: Asked) -> None:
    if started_by_torchrun():
        raise ConfigError(
            f"coordcheck runs in one process, and this is one of {os.environ.get('WORLD_SIZE')} of a "
            "job; start it without torchrun"
        )
    if asked.convention is not None:
        check_convention(asked.convention)
    if asked.seeds < 1 or asked.steps < LEAST_STEPS or asked.batch_tokens < 1:
        raise ConfigError(
            f"--seeds {asked.seeds}, --steps {asked.steps}, --batch-tokens {asked.batch_tokens}: at "
            f"least 1, {LEAST_STEPS} and 1"
        )
    widths = asked.widths
    if widths is not None and (len(set(widths)) < LEAST_WIDTHS or len(set(widths)) < len(widths)):
        raise ConfigError(
            f"--widths {','.join(map(str, widths))}: a slope with an interval needs at least "
            f"{LEAST_WIDTHS} different widths"
        )


def _load(asked: Asked) -> Config:
    if not is_model(asked.target):
        return load_config(asked.target, asked.overrides)
    key = "model.preset" if is_preset(asked.target) else "model.config"
    return load_config("demo", [f"{key}={asked.target}", *asked.overrides])


def _default_widths(step: int) -> tuple[int, ...]:
    base = -(-NARROWEST // step) * step
    return tuple(base * 2**power for power in range(4))


def _at(
    config: Config, shape: PreTrainedConfig, grow: GrowT, base: int, width: int, seed: int
) -> Config:
    fields = config.model.fields | fields_at(shape, width, grow)
    transfer = {"base": fields_at(shape, base, grow)}
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"fields": fields}),
            "transfer": config.transfer.model_copy(update=transfer),
            "run": config.run.model_copy(update={"seed": config.run.seed + seed}),
        }
    )


def _without_decay(config: Config, widest: Config) -> tuple[Config, list[str]]:
    """Return the configuration without decay of what cannot have any, and the names of that."""
    shape = planned_shape(widest)
    transfer = plan_transfer(widest, shape)
    assert transfer is not None
    groups = build_param_groups(meta_model(shape), config.optimizer)
    decayed = {name for group in groups if group["weight_decay"] for name in group["param_names"]}
    rows = transfer.rows
    found = [name for name in rows if rows[name].multipliers.weight_decay is None]
    if not (freed := [name for name in found if name in decayed]):
        return config, []
    given = config.optimizer.overrides
    # the last glob wins, so these come after all others
    others = {key: value for key, value in given.items() if key not in freed}
    own = {name: {**given.get(name, {}), "weight_decay": 0.0} for name in freed}
    optimizer = config.optimizer.model_copy(update={"overrides": others | own})
    return config.model_copy(update={"optimizer": optimizer}), freed
