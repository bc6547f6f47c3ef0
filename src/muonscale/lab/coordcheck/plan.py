"""The runs of a coordinate check: one configuration for each width and seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.config.sections import ParallelSection, ScheduleSection, Section, TrainSection
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.widen import GrowT, fields_at, width_step
from muonscale.lab.parallel.processes import check_alone
from muonscale.lab.targets import is_model, is_preset
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.param_groups import build_param_groups, plan_transfer
from muonscale.lab.verify.check import use_float32
from muonscale.transfer.multipliers import check_convention

NARROWEST = 32
"""The default base is at least this wide. Scaling with the width is inaccurate below."""
BATCH_TOKENS = 1024
LEAST_WIDTHS = 3
LEAST_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class CoordcheckRequest:
    """The arguments of `muonscale coordcheck`."""

    target: str
    """A recipe, a run folder, a preset, or a Hugging Face `config.json` or its folder. The last two
    are trained as the demo is."""
    overrides: Sequence[str] = ()
    widths: Sequence[int] | None = None
    """The smallest width is the base, to which the values of `optimizer.*` apply."""
    seeds: int = 3
    steps: int = 6
    convention: str | None = None
    """Replaces `transfer.convention`."""
    grow: GrowT = "heads"
    batch_tokens: int = BATCH_TOKENS
    """The least tokens of a step, which has a whole number of sequences."""


@dataclass(frozen=True)
class CheckPlan:
    """The runs of a check."""

    request: CoordcheckRequest
    config: Config
    """The configuration of all runs, apart from width and seed."""
    shape: PreTrainedConfig
    """The model as it was given."""
    widths: tuple[int, ...]
    notes: tuple[str, ...] = ()
    """Sentences on what differs from the given configuration."""

    def at(self, width: int, seed: int) -> Config:
        """Return the configuration of one run; the first seed is 0."""
        return _at(self.config, self.shape, self.request.grow, self.widths[0], width, seed)


def plan_check(request: CoordcheckRequest) -> CheckPlan:
    """Return the runs of a check; no data are read.

    Raises:
        ConfigError: for too few widths, a width that the model cannot have, an unknown convention,
            or a model that transfer does not support.
    """
    _check(request)
    config = _configure(request)
    shape = planned_shape(config)
    step = width_step(shape, request.grow)
    base = -(-NARROWEST // step) * step
    widths = tuple(sorted(request.widths or (base * 2**power for power in range(4))))
    for width in widths:
        fields_at(shape, width, request.grow)
    notes = []
    if config.transfer.base is not None:
        notes.append(
            f"the base is the width {widths[0]}, and not transfer.base={config.transfer.base}"
        )
    widest = _at(config, shape, request.grow, widths[0], widths[-1], 0)
    config, names = _without_decay(config, widest)
    if names:
        notes.append(
            f"no weight decay of {', '.join(names)}: a gain 1 + w with a factor folded in must not "
            "have any; give a run the same override, at the base width too"
        )
    return CheckPlan(request, config, shape, widths, tuple(notes))


def _check(request: CoordcheckRequest) -> None:
    check_alone("coordcheck runs in one process")
    if request.convention is not None:
        check_convention(request.convention)
    if request.seeds < 1 or request.steps < LEAST_STEPS or request.batch_tokens < 1:
        raise ConfigError(
            f"--seeds {request.seeds}, --steps {request.steps}, --batch-tokens "
            f"{request.batch_tokens}: they must be at least 1, {LEAST_STEPS} and 1"
        )
    widths = request.widths
    if widths is not None and (len(set(widths)) < LEAST_WIDTHS or len(set(widths)) < len(widths)):
        raise ConfigError(
            f"--widths {','.join(map(str, widths))}: a slope with an interval needs at least "
            f"{LEAST_WIDTHS} different widths"
        )


def _configure(request: CoordcheckRequest) -> Config:
    """Return the configuration that all runs have in common."""
    if is_model(request.target):
        key = "model.preset" if is_preset(request.target) else "model.config"
        config = load_config("demo", [f"{key}={request.target}", *request.overrides])
    else:
        config = load_config(request.target, request.overrides)
    if config.model.weights is not None:
        raise ConfigError(
            f"model.weights={config.model.weights}: a coordinate check draws the weights of "
            "every width itself; give model.preset or model.config"
        )
    length = config.data.sequence_length
    sequences = max(1, -(-request.batch_tokens // length))
    changes: dict[str, Section] = {
        # One more step: its batch, on which no step trains, is the probe.
        "train": TrainSection(
            steps=request.steps + 1,
            batch_tokens=sequences * length,
            precision=config.train.precision,
        ),
        "schedule": ScheduleSection(name="constant", warmup=0),
        "parallel": ParallelSection(),
        "optimizer": config.optimizer.model_copy(update={"nonfinite": "skip", "state": None}),
    }
    if request.convention is not None:
        changes["transfer"] = config.transfer.model_copy(update={"convention": request.convention})
    return use_float32(config.model_copy(update=changes))


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
    """Return the configuration without decay where none may be, and the parameters' names."""
    shape = planned_shape(widest)
    transfer = plan_transfer(widest, shape)
    assert transfer is not None
    groups = build_param_groups(meta_model(shape), config.optimizer)
    decayed = {name for group in groups if group["weight_decay"] for name in group["param_names"]}
    names = [
        name
        for name, row in transfer.rows.items()
        if row.multipliers.weight_decay is None and name in decayed
    ]
    if not names:
        return config, []
    given = config.optimizer.overrides
    # The last glob wins, so these come after all others.
    others = {key: value for key, value in given.items() if key not in names}
    own = {name: {**given.get(name, {}), "weight_decay": 0.0} for name in names}
    optimizer = config.optimizer.model_copy(update={"overrides": others | own})
    return config.model_copy(update={"optimizer": optimizer}), names
