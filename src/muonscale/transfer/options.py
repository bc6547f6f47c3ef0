"""The choices of a parametrization, which a configuration reads without torch."""

from __future__ import annotations

from typing import Literal

ConventionT = Literal["spectral", "adam_table", "standard"]
"""How multipliers depend on the width; the table of each is in `multipliers`."""
CONVENTIONS: tuple[ConventionT, ...] = ("spectral", "adam_table", "standard")
DepthT = Literal["none", "complete_p"]
"""How multipliers depend on the number of layers."""
DEPTHS: tuple[DepthT, ...] = ("none", "complete_p")
