"""The measured runs of a ladder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from muonscale.lab.studies.search.variant_search import VariantSearch

if TYPE_CHECKING:
    from muonscale.lab.estimate.run_cost import RunCost


@dataclass(frozen=True)
class MeasuredRung:
    """Runs of one optimizer, on one rung, of one length."""

    variant: str
    rung: str
    values: Mapping[str, float]
    """Values that were found or come from a rule, by name."""
    main: bool
    """Whether it has the rung's own length, which the law of C uses."""
    cost: RunCost
    losses: Mapping[int, float]
    """Losses by seed; infinite where a run diverged."""
    search: VariantSearch | None
    """The search that found the values; None if nothing was searched."""

    @property
    def tuned(self) -> bool:
        """Whether every neighbor of the best setting was tried; True if nothing was searched."""
        return self.search is None or self.search.tuned
