"""Learning-rate schedules, as multipliers on every group's peak learning rate.

Because a schedule only multiplies, the ratios between groups hold at every step. A schedule is a
pure function of the step: there is no state to save. A run is one *stage* or several; where the batch
grows within a stage, its falling part goes by tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from torch.optim import Optimizer

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.config.sections import ScheduleSection, Stage


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


# Shape of the part that falls, from 1 to 0 as progress goes from 0 to 1. `cosine` and `linear` fall
# from the end of the warm-up; the other two hold, then fall over their `decay`.
FALL: dict[str, Callable[[float], float]] = {
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _linear,
    "constant-linear": _linear,
}
HOLDS = ("wsd", "constant-linear")


def as_steps(length: float, steps: int) -> int:
    """Read a length of a schedule: a fraction of the run below 1, a number of steps from 1."""
    return round(length * steps) if length < 1 else round(length)


@dataclass(frozen=True)
class Span:
    """A stage of a run, in steps."""

    stage: Stage
    first: int
    end: int
    """The step after its last."""
    low: float
    """Multiplier that its warm-up begins at."""

    @property
    def warmup(self) -> int:
        """Steps of its warm-up."""
        return as_steps(self.stage.warmup, self.end - self.first)

    @property
    def decay(self) -> int:
        """Steps at its end in which a shape that holds falls."""
        holds = self.stage.name in HOLDS
        return as_steps(self.stage.decay, self.end - self.first) if holds else 0

    @property
    def fall(self) -> int:
        """The step at which it begins to fall; `end` if it never does."""
        start = self.first + self.warmup
        if self.stage.name == "constant":
            return self.end
        return max(start, self.end - self.decay) if self.stage.name in HOLDS else start

    @property
    def high(self) -> float:
        """Multiplier that it ends at."""
        return self.stage.peak if self.stage.name == "constant" else self.stage.final


def spans(schedule: ScheduleSection, timeline: Timeline) -> list[Span]:
    """Return the stages of a run; a schedule without stages is one."""
    stages = schedule.stages or [Stage.model_validate(schedule.model_dump(exclude={"stages"}))]
    ends = [timeline.steps if s.until is None else timeline.step_at(s.until) for s in stages]
    found: list[Span] = []
    for stage, (first, end) in zip(stages, pairwise([0, *ends]), strict=True):
        found.append(Span(stage, first, end, found[-1].high if found else 0.0))
    return found


def span_at(found: list[Span], step: int) -> Span:
    """Return the stage that a step is in."""
    return next(span for span in found if step < span.end)


def multiplier(schedule: ScheduleSection, step: int, timeline: Timeline) -> float:
    """Return what multiplies the peak learning rate at a step.

    warm-up:  low + (peak - low) * (i + 1) / (warmup + 1) at its i-th step, so that no step has a
              learning rate of zero; low is where the stage before ended, 0 for the first
    hold:     peak
    fall:     final + (peak - final) * shape(progress), progress 0 at its first step and 1 at the end
              of the stage, by tokens

    Args:
        schedule: name, warm-up, decay and final multiplier, or stages of them.
        step: index of the step, from 0.
        timeline: the steps of the run.

    References: cosine, Loshchilov and Hutter, SGDR, arXiv 1608.03983; wsd (warm-up, stable, decay),
    Hu et al., MiniCPM, arXiv 2404.06395, section 4; constant-linear, Zhang et al., Muon+,
    arXiv 2602.21545 (constant for 40 % of the steps, then linear to 0.1); stages that take up the
    learning rate of the one before, Liu et al., Muon is scalable, arXiv 2502.16982, section 3.2.
    """
    span = span_at(spans(schedule, timeline), step)
    peak, final = span.stage.peak, span.stage.final
    if step < span.first + span.warmup:
        return span.low + (peak - span.low) * (step - span.first + 1) / (span.warmup + 1)
    if step < span.fall:
        return peak
    start, end = timeline.sequences_before(span.fall), timeline.sequences_before(span.end)
    progress = (timeline.sequences_before(step) - start) / (end - start)
    return final + (peak - final) * FALL[span.stage.name](progress)


def check_schedule(config: Config) -> None:
    """Refuse a schedule whose parts do not fit into the run, or its stage, or that leaves a corpus out.

    Raises:
        ConfigError: if warm-up and decay together are longer than that, or a corpus of the mixture
            has weight 0 in every stage.
    """
    weights = [config.data.weights, *(stage.weights or {} for stage in config.schedule.stages)]
    read = {name for given in weights for name, weight in given.items() if weight}
    if unused := sorted(config.data.weights.keys() - read):
        raise ConfigError(f"data.mixture: {unused[0]!r} has weight 0 in every stage; leave it out")
    for number, span in enumerate(spans(config.schedule, config.timeline)):
        stage, steps = span.stage, span.end - span.first
        no_fall = span.warmup == steps and stage.name != "constant"
        if span.warmup + span.decay > steps or no_fall:
            where = f"schedule.stages.{number}" if config.schedule.stages else "schedule"
            raise ConfigError(
                f"the schedule does not fit into {steps} steps: {where}.warmup={stage.warmup:g} is "
                f"{span.warmup} steps and {where}.decay={stage.decay:g} is {span.decay}; lower one of "
                "them"
            )


def apply_multiplier(optimizer: Optimizer, value: float) -> None:
    """Set every group's `lr` to `value` times its `peak_lr`, which `Muon` keeps and saves."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * value
