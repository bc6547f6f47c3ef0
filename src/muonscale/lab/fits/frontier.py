"""Devices against time to a loss: iso-loss curves, which optimizer's lies inside which.

Practical Efficiency of Muon (arXiv 2505.02222, section 3.3, figures 1 and 2). On n devices a loss L
takes the shortest time that a measured batch size allows:

    time(n) = min over B of S_L(B) * seconds(B, n)

Batch sizes between those that were measured are not looked at. Where the best one is the smallest or
the largest that reached the loss, one beyond might be faster: the time is an upper bound there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import LEVEL, Draws, Seed, join
from muonscale.lab.fits.result import BoolArray, FloatArray, Interval
from muonscale.lab.fits.steps_to_loss import StepsToLoss

EdgeT = Literal["low", "high"]

CERTAIN = 0.95
"""Share of draws from which on a curve is said to lie inside another one."""


@dataclass(frozen=True, kw_only=True)
class IsoLoss:
    """One optimizer's times to one loss."""

    devices: FloatArray
    """Rising, `[n]`."""
    batches: FloatArray
    """`[b]`"""
    step_seconds: FloatArray
    """Of a step, `[n, b]`; infinite where a batch cannot be shared by so many devices."""
    draws: Draws
    """Log steps to the loss, `[b]`, and others that might have been measured."""
    edges: tuple[EdgeT | None, ...]
    """Where the best batch size is at an end of those that reached the loss, `[n]`."""

    @property
    def seconds(self) -> FloatArray:
        """Time to the loss, `[n]`; infinite where no batch size reached it."""
        return np.exp(self.log_seconds(self.draws.estimate))

    @property
    def batch(self) -> FloatArray:
        """The batch size that gives it, tokens, `[n]`; NaN where none does."""
        best = self._each(self.draws.estimate).argmin(axis=-1)
        return np.where(np.isfinite(self.seconds), self.batches[best], np.nan)

    @property
    def device_seconds(self) -> FloatArray:
        """What the devices spend together, `[n]`."""
        return self.devices * self.seconds

    @property
    def efficient(self) -> BoolArray:
        """Whether no smaller number of devices is as fast, `[n]`: Pareto's frontier of both."""
        before = np.minimum.accumulate(np.concatenate([[np.inf], self.seconds[:-1]]))
        return self.seconds < before

    @property
    def known(self) -> BoolArray:
        """Whether the time is one, and not an upper bound, `[n]`."""
        inside = np.array([edge is None for edge in self.edges])
        return np.isfinite(self.seconds) & inside

    def log_seconds(self, log_steps: FloatArray) -> FloatArray:
        """Return log times `[..., n]` of log steps `[..., b]`."""
        return self._each(log_steps).min(axis=-1)

    def band(self) -> tuple[FloatArray, FloatArray]:
        """Return the ends of the interval of every time, `[n]`; NaN if no noise is known.

        The best batch size is chosen anew in every draw.
        """
        _, low, high = self.draws.band(self.log_seconds)
        return np.exp(low), np.exp(high)

    def _each(self, log_steps: FloatArray) -> FloatArray:
        return log_steps[..., None, :] + np.log(self.step_seconds)


def iso_loss(
    steps: StepsToLoss,
    step_seconds: FloatArray,
    devices: Sequence[int],
    sequence_length: int,
    resamples: int = 1000,
    seed: Seed = 0,
    level: float = LEVEL,
) -> IsoLoss:
    """Return the iso-loss curve of an optimizer.

    Args:
        steps: to the loss, by batch size.
        step_seconds: of a step, `[n, b]`; infinite where a batch cannot be shared.
        devices: rising, `[n]`.
        sequence_length: tokens; a device has at least one sequence.
        resamples: number of draws.
        seed: of the draws; other optimizers get another one.
        level: of the intervals.

    Raises:
        StudyError: for device counts that do not rise, or seconds of another shape or below 0.
    """
    counts = np.asarray(devices, np.float64)
    shape = (len(counts), len(steps.batches))
    if step_seconds.shape != shape or not (step_seconds > 0).all():
        raise StudyError(
            f"seconds of a step must be above 0 and have a row for each of {shape[0]} device counts "
            f"and a column for each of {shape[1]} batch sizes, got shape {step_seconds.shape}"
        )
    if len(counts) == 0 or counts[0] < 1 or (np.diff(counts) <= 0).any():
        raise StudyError(f"devices={list(devices)} must rise from one to the next, from 1 on")
    try:
        draws = Draws(steps.log_steps, steps.draw(resamples, seed, level), level)
    except StudyError:  # one seed: the curve has no band, and says nothing of dominance
        draws = Draws.none(steps.log_steps, level)
    totals = steps.log_steps + np.log(step_seconds)
    ends = np.flatnonzero(steps.reached)
    edges = tuple(
        _edge(row, ends, steps.batches, n * sequence_length)
        for row, n in zip(totals, counts, strict=True)
    )
    return IsoLoss(
        devices=counts,
        batches=steps.batches,
        step_seconds=step_seconds,
        draws=draws,
        edges=edges,
    )


def _edge(
    log_times: FloatArray, reached: np.ndarray, batches: FloatArray, least: float
) -> EdgeT | None:
    """Return at which end the best batch is; none where nothing smaller could be shared."""
    best = int(log_times.argmin())
    if not np.isfinite(log_times[best]):
        return None
    if best == reached[-1]:
        return "high"
    return "low" if best == reached[0] and batches[best] > least else None


@dataclass(frozen=True, kw_only=True)
class Dominance:
    """Whether one iso-loss curve lies strictly inside another one."""

    inside: bool | None
    """True: the first lies inside the second; False: the second inside the first."""
    drawn: bool
    """Whether the noise of both is known; without it there is no interval and no verdict."""
    share: float
    """Of draws in which the first is faster at every count of devices that `judged` has; NaN if there
    is none, or no noise is known."""
    reverse: float
    """The same with the two exchanged."""
    judged: BoolArray
    """Counts of devices at which the second's time is one and not an upper bound, `[n]`."""
    reverse_judged: BoolArray
    ratio: FloatArray
    """Time of the first over time of the second, `[n]`; NaN where neither has one."""
    low: FloatArray
    """Ends of its interval, `[n]`."""
    high: FloatArray
    mean: Interval
    """Geometric mean of the ratio of the frontiers over log devices (`mean_log_seconds`)."""


def dominance(first: IsoLoss, second: IsoLoss) -> Dominance:
    """Judge whether the first curve lies strictly inside the second.

    The rule: it does (True) if the first is faster at every judged count of devices in at least 95 % of
    the draws, all counts in the same draw. Judged are those at which the second's time is no upper
    bound, since it might be shorter with a batch size that was not measured; the first's may be one, as
    that only makes it longer. False if the second lies inside the first by the same rule. None otherwise,
    or if no count can be judged, or no noise is known.

    Raises:
        StudyError: if the curves have other devices, or were not drawn alike.
    """
    if not np.array_equal(first.devices, second.devices):
        raise StudyError(
            f"iso-loss curves are of {first.devices.tolist()} and of {second.devices.tolist()} devices; give them the same counts"
        )
    drawn, split_at = join(first.draws, second.draws), len(first.batches)

    def log_ratio(log_steps: FloatArray) -> FloatArray:
        times = first.log_seconds(log_steps[..., :split_at])
        with np.errstate(invalid="ignore"):  # neither has a time
            return times - second.log_seconds(log_steps[..., split_at:])

    def mean_ratio(log_steps: FloatArray) -> FloatArray:
        times = mean_log_seconds(first.log_seconds(log_steps[..., :split_at]), first.devices)
        other = mean_log_seconds(second.log_seconds(log_steps[..., split_at:]), second.devices)
        with np.errstate(invalid="ignore"):
            return times - other

    ratio, low, high = (np.exp(values) for values in drawn.band(log_ratio))
    mean = drawn.interval(mean_ratio)
    draws = log_ratio(drawn.samples)
    share, reverse = _share(draws < 0, second.known), _share(draws > 0, first.known)
    return Dominance(
        inside=True if share >= CERTAIN else False if reverse >= CERTAIN else None,
        drawn=len(draws) > 0,
        share=share,
        reverse=reverse,
        judged=second.known,
        reverse_judged=first.known,
        ratio=ratio,
        low=low,
        high=high,
        mean=Interval(*np.exp([mean.value, mean.low, mean.high]).tolist()),
    )


def _share(faster: BoolArray, judged: BoolArray) -> float:
    """Return the share of draws `[resamples, n]` that are faster at all judged counts."""
    if not len(faster) or not judged.any():
        return float("nan")
    return float(faster[:, judged].all(axis=1).mean())


def mean_log_seconds(log_seconds: FloatArray, devices: FloatArray) -> FloatArray:
    """Return the mean over log devices of the log time on as many devices or fewer, `[...]`.

    With log devices and log time as the two objectives, differences of this are differences of the
    frontiers' hypervolumes (Zitzler and Thiele, IEEE Transactions on Evolutionary Computation 3(4),
    1999) over the width of the range. The reference point is at twice the most devices, so that the last
    time counts as one more doubling; where it is in time does not matter to a difference.

    Args:
        log_seconds: `[..., n]`
        devices: rising, `[n]`
    """
    widths = np.diff(np.log(np.append(devices, 2 * devices[-1])))
    least = np.minimum.accumulate(log_seconds, axis=-1)
    return (least * widths).sum(axis=-1) / widths.sum()
