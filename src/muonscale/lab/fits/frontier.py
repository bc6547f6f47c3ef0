"""Iso-loss curves: time to a loss by number of devices, and whether one curve is faster everywhere.

Practical Efficiency of Muon (arXiv 2505.02222, section 3.3, figures 1 and 2). On n devices a loss L
takes the shortest time that a measured batch size allows:

    time(n) = min over B of S_L(B) * seconds(B, n)

Only measured batch sizes are considered. Where the best one is the smallest or the largest that
reached the loss, a batch size beyond it might be faster, so that the time is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import CONFIDENCE, Draws, Seed, join
from muonscale.lab.fits.laws.quadratic import EdgeT
from muonscale.lab.fits.result import BoolArray, FloatArray, Interval
from muonscale.lab.fits.steps_to_loss import StepsToLoss

CERTAIN = 0.95
"""Smallest share of draws with which a curve is judged to be inside another one."""


@dataclass(frozen=True, kw_only=True)
class IsoLoss:
    """One optimizer's times to one loss."""

    devices: FloatArray
    """Numbers of devices, rising, `[n]`."""
    batches: FloatArray
    """`[b]`"""
    step_seconds: FloatArray
    """Seconds of a step, `[n, b]`; infinite where the devices cannot divide the batch."""
    draws: Draws
    """Log steps to the loss, `[b]`, and others that might have been measured."""
    edges: tuple[EdgeT | None, ...]
    """The end of the batch sizes that reached the loss at which the best one is, `[n]`."""

    @property
    def seconds(self) -> FloatArray:
        """Time to the loss, `[n]`; infinite where no batch size reached it."""
        return np.exp(self.log_seconds(self.draws.estimate))

    @property
    def batch(self) -> FloatArray:
        """The batch size with this time, in tokens, `[n]`; NaN where none reached the loss."""
        best = self._log_times(self.draws.estimate).argmin(axis=-1)
        return np.where(np.isfinite(self.seconds), self.batches[best], np.nan)

    @property
    def device_seconds(self) -> FloatArray:
        """Seconds summed over the devices, `[n]`."""
        return self.devices * self.seconds

    @property
    def efficient(self) -> BoolArray:
        """Whether no smaller number of devices is as fast (the Pareto frontier), `[n]`."""
        before = np.minimum.accumulate(np.concatenate([[np.inf], self.seconds[:-1]]))
        return self.seconds < before

    @property
    def known(self) -> BoolArray:
        """Whether the time is finite and no upper bound, `[n]`."""
        return np.isfinite(self.seconds) & np.array([edge is None for edge in self.edges])

    def log_seconds(self, log_steps: FloatArray) -> FloatArray:
        """Return log times `[..., n]` for log steps `[..., b]`."""
        return self._log_times(log_steps).min(axis=-1)

    def band(self) -> tuple[FloatArray, FloatArray]:
        """Return the ends of the interval of every time, `[n]`; NaN if no noise is known.

        Every draw has its own best batch size.
        """
        _, low, high = self.draws.band(self.log_seconds)
        return np.exp(low), np.exp(high)

    def _log_times(self, log_steps: FloatArray) -> FloatArray:
        return log_steps[..., None, :] + np.log(self.step_seconds)


def trace_iso_loss(
    steps: StepsToLoss,
    step_seconds: FloatArray,
    devices: Sequence[int],
    sequence_length: int,
    resamples: int = 1000,
    seed: Seed = 0,
    level: float = CONFIDENCE,
) -> IsoLoss:
    """Return the iso-loss curve of an optimizer.

    Args:
        steps: steps to the loss, by batch size.
        step_seconds: seconds of a step, `[n, b]`; infinite where the devices cannot divide a batch.
        devices: numbers of devices, rising, `[n]`.
        sequence_length: tokens; a device has at least one sequence.
        resamples: number of draws.
        seed: seed of the draws; every optimizer needs its own.
        level: level of the intervals.

    Raises:
        StudyError: for device counts that do not rise, or seconds of another shape or below 0.
    """
    counts = np.asarray(devices, np.float64)
    shape = (len(counts), len(steps.batches))
    if step_seconds.shape != shape or not (step_seconds > 0).all():
        raise StudyError(
            f"seconds of a step must be above 0, with a row for each of {shape[0]} device counts "
            f"and a column for each of {shape[1]} batch sizes, got shape {step_seconds.shape}"
        )
    if len(counts) == 0 or counts[0] < 1 or (np.diff(counts) <= 0).any():
        raise StudyError(f"devices={list(devices)} must be rising numbers from 1 on")
    try:
        draws = Draws(steps.log_steps, steps.draw(resamples, seed, level), level)
    except StudyError:  # one seed: the curve has no band and cannot be judged
        draws = Draws.none(steps.log_steps, level)
    ends, edges = np.flatnonzero(steps.reached), []
    for log_times, n in zip(steps.log_steps + np.log(step_seconds), counts, strict=True):
        best = int(log_times.argmin())
        edge: EdgeT | None = None
        if np.isfinite(log_times[best]):
            if best == ends[-1]:
                edge = "high"
            elif best == ends[0] and steps.batches[best] > n * sequence_length:
                edge = "low"  # a smaller batch could be divided, but was not measured
        edges.append(edge)
    return IsoLoss(
        devices=counts,
        batches=steps.batches,
        step_seconds=step_seconds,
        draws=draws,
        edges=tuple(edges),
    )


@dataclass(frozen=True, kw_only=True)
class Dominance:
    """Whether one iso-loss curve is strictly inside another one."""

    inside: bool | None
    """True: the first is inside the second. False: the second is inside the first."""
    drawn: bool
    """Whether the noise of both is known. Otherwise there is no interval and no verdict."""
    share: float
    """Share of draws in which the first is faster at every device count in `judged`; NaN if there
    is no such count, or no noise is known."""
    reverse: float
    """Share of draws in which the second is faster at every device count in `reverse_judged`."""
    judged: BoolArray
    """Whether the time of the second is no upper bound at a device count, `[n]`."""
    reverse_judged: BoolArray
    """Whether the time of the first is no upper bound at a device count, `[n]`."""
    ratio: FloatArray
    """Time of the first over time of the second, `[n]`; NaN where neither reached the loss."""
    low: FloatArray
    """Lower end of the interval of `ratio`, `[n]`."""
    high: FloatArray
    mean: Interval
    """Geometric mean of the ratio of the frontiers over log devices (`mean_log_seconds`)."""


def judge_dominance(first: IsoLoss, second: IsoLoss) -> Dominance:
    """Judge whether the first curve is strictly inside the second.

    It is (True) if the first is faster at every judged device count in at least 95 % of the draws,
    all counts in the same draw. A count is judged if the time of the second is no upper bound
    there, since such a time might be shorter with a batch size that was not measured. The time of
    the first may be an upper bound, which only makes it longer. The result is False if the second
    is inside the first by the same rule, and None otherwise, also if no count can be judged or no
    noise is known.

    Raises:
        StudyError: if the curves have different devices, numbers of draws or levels.
    """
    if not np.array_equal(first.devices, second.devices):
        raise StudyError(
            "iso-loss curves must have the same device counts, got "
            f"{first.devices.tolist()} and {second.devices.tolist()}"
        )
    drawn, split_at = join(first.draws, second.draws), len(first.batches)

    def log_ratio(log_steps: FloatArray) -> FloatArray:
        times = first.log_seconds(log_steps[..., :split_at])
        with np.errstate(invalid="ignore"):  # neither reached the loss
            return times - second.log_seconds(log_steps[..., split_at:])

    def mean_ratio(log_steps: FloatArray) -> FloatArray:
        times = mean_log_seconds(first.log_seconds(log_steps[..., :split_at]), first.devices)
        other = mean_log_seconds(second.log_seconds(log_steps[..., split_at:]), second.devices)
        with np.errstate(invalid="ignore"):
            return times - other

    ratio, low, high = (np.exp(values) for values in drawn.band(log_ratio))
    mean = drawn.interval(mean_ratio)
    draws = log_ratio(drawn.samples)

    def share_of(faster: BoolArray, judged: BoolArray) -> float:
        """Return the share of draws `[resamples, n]` that are faster at all judged counts."""
        if not len(faster) or not judged.any():
            return float("nan")
        return float(faster[:, judged].all(axis=1).mean())

    share, reverse = share_of(draws < 0, second.known), share_of(draws > 0, first.known)
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


def mean_log_seconds(log_seconds: FloatArray, devices: FloatArray) -> FloatArray:
    """Return the mean over log devices of the log time on at most that many devices, `[...]`.

    With log devices and log time as the two objectives, differences of this mean are differences of
    the frontiers' hypervolumes (Zitzler and Thiele, IEEE Transactions on Evolutionary Computation
    3(4), 1999) over the width of the range. The reference point is at twice the largest number of
    devices, so that the last time counts for one more doubling. Its time cancels in a difference.

    Args:
        log_seconds: log times, `[..., n]`.
        devices: numbers of devices, rising, `[n]`.
    """
    widths = np.diff(np.log(np.append(devices, 2 * devices[-1])))
    least = np.minimum.accumulate(log_seconds, axis=-1)
    return (least * widths).sum(axis=-1) / widths.sum()
