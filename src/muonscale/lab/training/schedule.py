"""Learning-rate schedules, as multipliers on every group's peak learning rate.

Because a schedule only multiplies, the ratios between groups hold at every step. A schedule is a
pure function of the step: there is no state to save.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer

from muonscale.errors import ConfigError
from muonscale.lab.config import ScheduleSection


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _linear(progress: float) -> float:
    return 1 - progress


# Shape of the part that falls, from 1 to 0 as progress goes from 0 to 1. `cosine` and `linear` fall
# from the end of the warm-up; the other two hold, then fall over `schedule.decay`.
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


def multiplier(schedule: ScheduleSection, step: int, steps: int) -> float:
    """Return what multiplies the peak learning rate at a step.

    warm-up:  (step + 1) / (warmup + 1), so that no step has a learning rate of zero
    hold:     1
    fall:     final + (1 - final) * shape(progress), progress 0 at its first step, 1 when the run ends

    Args:
        schedule: name, warm-up, decay and final multiplier.
        step: index of the step, 0 to steps - 1.
        steps: optimizer steps of the run.

    References: cosine, Loshchilov and Hutter, SGDR, arXiv 1608.03983; wsd (warm-up, stable, decay),
    Hu et al., MiniCPM, arXiv 2404.06395, section 4; constant-linear, Zhang et al., Muon+,
    arXiv 2602.21545 (constant for 40 % of the steps, then linear to 0.1).
    """
    warmup = as_steps(schedule.warmup, steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    start = warmup
    if schedule.name in HOLDS:
        start = max(warmup, steps - as_steps(schedule.decay, steps))
    if step < start:
        return 1.0
    progress = (step - start) / (steps - start)
    return schedule.final + (1 - schedule.final) * FALL[schedule.name](progress)


def check_schedule(schedule: ScheduleSection, steps: int) -> None:
    """Refuse a schedule whose parts do not fit into the run.

    Raises:
        ConfigError: if warm-up and decay together are longer than the run.
    """
    warmup = as_steps(schedule.warmup, steps)
    decay = as_steps(schedule.decay, steps) if schedule.name in HOLDS else 0
    if warmup + decay > steps or warmup == steps:
        raise ConfigError(
            f"the schedule does not fit into {steps} steps: schedule.warmup={schedule.warmup:g} is "
            f"{warmup} steps and schedule.decay={schedule.decay:g} is {decay}; lower one of them"
        )


def apply_multiplier(optimizer: Optimizer, value: float) -> None:
    """Set every group's `lr` to `value` times its `peak_lr`, which `Muon` keeps and saves."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * value
