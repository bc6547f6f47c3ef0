"""How the lowest loss of a telescope falls with the width."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from muonscale.errors import StudyError
from muonscale.lab.fits.bootstrap import Draws
from muonscale.lab.fits.laws.power import PowerLaw
from muonscale.lab.fits.laws.power_offset import LEAST_SIZES, OffsetPowerLaw
from muonscale.lab.fits.result import Interval
from muonscale.lab.fits.statistics import pool_noise
from muonscale.lab.studies.telescope.levels import Losses, mean_loss

RESAMPLES = 300


def fit_width_law(lowest: Mapping[int, Losses]) -> dict[str, Any]:
    """Return the law of the lowest loss by width.

    It is `E + a * width^-b` from four widths on, and `a * width^-b` for three.

    Args:
        lowest: losses by seed of the best place of every width.
    """
    groups = {width: each for width, each in lowest.items() if math.isfinite(mean_loss(each))}
    widths, losses = [float(w) for w in groups], [mean_loss(each) for each in groups.values()]
    found: dict[str, Any] = {"widths": widths, "losses": losses, "note": ""}
    # The noise of a log mean loss, the luck of seeds included, for the width with the fewest seeds.
    place = np.repeat(np.arange(len(groups)), [len(each) for each in groups.values()])
    values = np.log([loss for each in groups.values() for loss in each.values()])
    sd = pool_noise(place, values) if groups else None
    noise = None if sd is None else sd / math.sqrt(min(len(each) for each in groups.values()))
    try:
        law_type = OffsetPowerLaw if len(widths) >= LEAST_SIZES else PowerLaw
        law = law_type.fit(widths, losses)
        draws = Draws.none(law.theta) if noise is None else law.draw(RESAMPLES, noise=noise)
    except StudyError as error:
        return found | {"note": str(error)}
    names = ("coefficient", "exponent")
    parameters = {}
    for number, name in enumerate(names if law_type is PowerLaw else ("offset", *names)):
        value = draws.parameter(number)
        if name != "exponent":  # the fits have the logarithms of these
            value = Interval(*map(math.exp, (value.value, value.low, value.high)))
        parameters[name] = asdict(value)
    fit = {"status": law.status.value, "residual": law.residuals.rms, "parameters": parameters}
    return found | fit
