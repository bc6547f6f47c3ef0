"""How the lowest loss of a telescope falls with the width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import Draws
from muonscale.lab.fits.laws.power import PowerLaw
from muonscale.lab.fits.laws.power_offset import LEAST_SIZES, OffsetPowerLaw
from muonscale.lab.fits.result import Interval
from muonscale.lab.fits.statistics import pool_noise
from muonscale.lab.studies.telescope.levels import Level, Losses, mean

if TYPE_CHECKING:
    from muonscale.lab.studies.telescope.study import Telescope

RESAMPLES = 300
OFFSET_NAMES = ("offset", "coefficient", "exponent")


def law_of(
    study: Telescope, levels: Sequence[Level], target: Mapping[int, float]
) -> dict[str, Any] | None:
    """Return the law of the lowest loss by width, of all levels and the target.

    It is `E + a * width^-b` from four widths on, `a * width^-b` of three.
    """
    groups = {level.width: level.losses[level.best] for level in levels if level.best is not None}
    if target:
        groups[study.config.target_width] = target
    groups = {width: each for width, each in groups.items() if math.isfinite(mean(each))}
    widths, losses = [float(w) for w in groups], [mean(each) for each in groups.values()]
    noise = _noise(list(groups.values()))
    try:
        law, draws = _fitted(widths, losses, noise)
    except StudyError as error:
        return {"widths": widths, "losses": losses, "note": str(error)}
    names = ("coefficient", "exponent") if isinstance(law, PowerLaw) else OFFSET_NAMES
    return {
        "widths": widths,
        "losses": losses,
        "note": "",
        "status": law.status.value,
        "residual": law.residuals.rms,
        "parameters": {
            name: asdict(_parameter(draws, place, log=name != "exponent"))
            for place, name in enumerate(names)
        },
    }


def _fitted(
    widths: list[float], losses: list[float], noise: float | None
) -> tuple[OffsetPowerLaw | PowerLaw, Draws]:
    """Return the law, and what it would be under the noise of seeds."""
    law_type = OffsetPowerLaw if len(widths) >= LEAST_SIZES else PowerLaw
    law = law_type.fit(widths, losses)
    if noise is None:
        return law, Draws.none(law.theta)
    return law, law.draw(RESAMPLES, noise=noise)


def _parameter(draws: Draws, place: int, *, log: bool) -> Interval:
    """Return a parameter of a law; the fits have logarithms of all but exponents."""
    found = draws.parameter(place)
    return Interval(*map(math.exp, (found.value, found.low, found.high))) if log else found


def _noise(groups: Sequence[Losses]) -> float | None:
    """Return the noise of a log mean loss, the luck of seeds included; None of single seeds.

    It is that of the width with the fewest seeds.
    """
    place = np.repeat(np.arange(len(groups)), [len(each) for each in groups])
    values = np.log([loss for each in groups for loss in each.values()])
    sd = pool_noise(place, values) if len(groups) else None
    return None if sd is None else sd / math.sqrt(min(len(each) for each in groups))
