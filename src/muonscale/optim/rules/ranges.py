"""The ranges of the options that are numbers, wherever they are given."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from torch import Tensor

from muonscale.errors import ConfigError

AT_LEAST_0 = ("lr", "adamw_lr", "peak_lr", "weight_decay", "rms", "eps")
FRACTIONS = ("momentum", "normuon_beta2")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raise ConfigError for an option among `options` that is no number or outside its range."""
    for option in AT_LEAST_0:
        if option in options and not _number(option, options[option]) >= 0:
            raise ConfigError(
                f"{option} is {options[option]}: it cannot be below 0; give 0 or a number above it"
            )
    if "post_norm_eps" in options and not _number("post_norm_eps", options["post_norm_eps"]) > 0:
        raise ConfigError(
            f"post_norm_eps is {options['post_norm_eps']}: it must be above 0, or a row of zeros "
            "would be divided by zero"
        )
    for option in FRACTIONS:
        if option in options:
            _check_fraction(option, options[option])
    if "betas" in options:
        betas = options["betas"]
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ConfigError(f"betas is {betas!r}: give two numbers, such as (0.9, 0.95)")
        for beta in betas:
            _check_fraction("betas", beta)


def _number(option: str, value: object) -> float:
    """Return a finite number as float; one that torch keeps in a tensor of one element too."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if not (is_number or (isinstance(value, Tensor) and value.numel() == 1)):
        raise ConfigError(f"{option} is {value!r}: give a number")
    number = float(value)  # type: ignore[arg-type]
    if not math.isfinite(number):
        raise ConfigError(f"{option} is {number}: give a finite number")
    return number


def _check_fraction(option: str, value: object) -> None:
    if not 0 <= _number(option, value) < 1:
        raise ConfigError(f"{option} is {value}: 0 <= x < 1 is accepted")
