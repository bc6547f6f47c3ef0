"""Learning-rate schedules, as multipliers on every group's peak learning rate.

Since a schedule only multiplies, the ratios between groups are the same at every step. A schedule
is a function of the step and has no state. A run consists of one *stage* or several. If the batch
size changes within a stage, the decay is a function of the tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from torch.optim import Optimizer

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.config.sections import OptionPoint, ScheduleSection, Stage
from muonscale.optim.muon import Muon
from muonscale.optim.option_schedule import OptionFunction, OptionSchedule


def _linear(progress: float) -> float:
    return 1 - progress


# Shape of the decay, from 1 to 0 as progress goes from 0 to 1. `cosine` and `linear` decay from the
# end of the warm-up; the other two are constant, then decay over `decay`.
DECAY_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    "linear": _linear,
    "wsd": _linear,
    "constant-linear": _linear,
}
SHAPES_WITH_PLATEAU = ("wsd", "constant-linear")


def as_steps(length: float, steps: int) -> int:
    """Convert a length of a schedule to steps: below 1 it is a fraction of the run."""
    return round(length * steps) if length < 1 else round(length)


@dataclass(frozen=True)
class Span:
    """A stage of a run, in steps."""

    stage: Stage
    first: int
    end: int
    """Step after the last one of the stage."""
    low: float
    """Multiplier at which the warm-up begins."""

    @property
    def warmup(self) -> int:
        """Number of warm-up steps."""
        return as_steps(self.stage.warmup, self.end - self.first)

    @property
    def decay(self) -> int:
        """Number of decay steps at the end of a shape that is constant before."""
        holds = self.stage.name in SHAPES_WITH_PLATEAU
        return as_steps(self.stage.decay, self.end - self.first) if holds else 0

    @property
    def decay_start(self) -> int:
        """Step at which the decay begins; `end` if there is none."""
        start = self.first + self.warmup
        if self.stage.name == "constant":
            return self.end
        return (
            max(start, self.end - self.decay) if self.stage.name in SHAPES_WITH_PLATEAU else start
        )

    @property
    def high(self) -> float:
        """Multiplier at the end of the stage."""
        return self.stage.peak if self.stage.name == "constant" else self.stage.final


def spans(schedule: ScheduleSection, timeline: Timeline) -> list[Span]:
    """Return the stages of a run; a schedule without stages has one."""
    stages = schedule.all_stages
    ends = [timeline.steps if s.until is None else timeline.step_at(s.until) for s in stages]
    result: list[Span] = []
    for stage, (first, end) in zip(stages, pairwise([0, *ends]), strict=True):
        result.append(Span(stage, first, end, result[-1].high if result else 0.0))
    return result


def multiplier(
    schedule: ScheduleSection,
    step: int,
    timeline: Timeline,
    stages: Sequence[Span] | None = None,
) -> float:
    """Return the multiplier of the peak learning rate at a step.

    warm-up:   low + (peak - low) * (i + 1) / (warmup + 1) at its i-th step, so that no step has a
               learning rate of zero; low is the end of the stage before, 0 for the first
    constant:  peak
    decay:     final + (peak - final) * shape(progress), progress 0 at its first step and 1 at the
               end of the stage, by tokens

    Args:
        schedule: name, warm-up, decay and final multiplier, or stages of them.
        step: index of the step, from 0.
        timeline: the steps of the run.
        stages: `spans` of both, for a caller that asks for many steps.

    References: cosine, Loshchilov and Hutter, SGDR, arXiv 1608.03983; wsd (warm-up, stable, decay),
    Hu et al., MiniCPM, arXiv 2404.06395, section 4; constant-linear, Zhang et al., Muon+,
    arXiv 2602.21545 (constant for 40 % of the steps, then linear to 0.1); stages that continue at
    the learning rate of the one before, Liu et al., Muon is scalable, arXiv 2502.16982, section
    3.2.
    """
    span = next(s for s in stages or spans(schedule, timeline) if step < s.end)
    peak, final = span.stage.peak, span.stage.final
    if step < span.first + span.warmup:
        return span.low + (peak - span.low) * (step - span.first + 1) / (span.warmup + 1)
    if step < span.decay_start:
        return peak
    start, end = timeline.sequences_before(span.decay_start), timeline.sequences_before(span.end)
    progress = (timeline.sequences_before(step) - start) / (end - start)
    return final + (peak - final) * DECAY_SHAPES[span.stage.name](progress)


def _step_of(point: OptionPoint, steps: int) -> int:
    """Return the step of a point of an option's schedule."""
    return steps - 1 if point.at == "end" else as_steps(point.at, steps)


def option_functions(
    config: Config,
) -> tuple[dict[str, OptionFunction], dict[str, OptionFunction]]:
    """Return what `schedule.options` gives: functions of the step by option or group and option.

    Returns:
        Functions that give values, and functions that give multipliers.

    Raises:
        ConfigError: for points that are not in order.
    """
    values: dict[str, OptionFunction] = {}
    multipliers: dict[str, OptionFunction] = {}
    for key, points in config.schedule.options.items():
        at = [_step_of(point, config.steps) for point in points]
        if any(b <= a for a, b in pairwise(at)):
            raise ConfigError(
                f"schedule.options.{key}: the points are at steps {', '.join(map(str, at))} of "
                f"{config.steps}; each must be after the one before"
            )
        heights = [p.times if p.value is None else p.value for p in points]
        function = partial(np.interp, xp=at, fp=heights)
        (multipliers if points[0].value is None else values)[key] = function
    return values, multipliers


def build_option_schedule(optimizer: Muon, config: Config) -> OptionSchedule | None:
    """Return the schedule of options other than learning rates, None if there is none.

    Raises:
        ConfigError: for a group that does not exist, or a value out of range at any step.
    """
    values, multipliers = option_functions(config)
    if not (values or multipliers):
        return None
    try:
        schedule = OptionSchedule(optimizer, values=values, multipliers=multipliers)
        for points in config.schedule.options.values():  # the ends of straight lines
            for point in points:
                schedule.set(_step_of(point, config.steps))
        schedule.set(0)
    except ConfigError as error:
        raise ConfigError(f"schedule.options: {error}") from None
    return schedule


def check_schedule(config: Config) -> None:
    """Check that the parts of a schedule fit into the run or stage, and that every corpus is read.

    Raises:
        ConfigError: if warm-up and decay together are too long, or a corpus of the mixture has
            weight 0 in every stage.
    """
    weights = [config.data.weights, *(stage.weights or {} for stage in config.schedule.stages)]
    read = {name for given in weights for name, weight in given.items() if weight}
    if unused := sorted(config.data.weights.keys() - read):
        raise ConfigError(f"data.mixture: {unused[0]!r} has weight 0 in every stage; leave it out")
    for number, span in enumerate(spans(config.schedule, config.timeline)):
        stage, steps = span.stage, span.end - span.first
        no_decay = span.warmup == steps and stage.name != "constant"
        if span.warmup + span.decay > steps or no_decay:
            where = f"schedule.stages.{number}" if config.schedule.stages else "schedule"
            raise ConfigError(
                f"the schedule does not fit into {steps} steps: {where}.warmup={stage.warmup:g} is "
                f"{span.warmup} steps and {where}.decay={stage.decay:g} is {span.decay}"
            )


def apply_multiplier(optimizer: Optimizer, value: float) -> None:
    """Set every group's `lr` to `value` times its `peak_lr`, which `Muon` saves."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * value
