"""The runs of a search at the places of a study, and what they found for every variant."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from muonscale.errors import ConfigError
from muonscale.lab.studies.planned_run import PlannedRun
from muonscale.lab.studies.search.config import SearchSection
from muonscale.lab.studies.search.descent import Descent, Setting, descend_equally
from muonscale.lab.studies.study import ExpectedRuns, Outcomes, collect_losses

RunAt = Callable[[str, Mapping[str, float], int], PlannedRun]
"""Makes the run of a variant, with values by name, and a seed, at one place of the study."""


@dataclass(frozen=True)
class VariantSearch:
    """The search of one variant at one place."""

    names: tuple[str, ...]
    """The searched keys."""
    runs: tuple[PlannedRun, ...]
    """All runs so far, setting by setting."""
    tried: tuple[tuple[dict[str, float], dict[int, float]], ...]
    """Values by name and losses by seed of every setting; losses are infinite where a run diverged,
    and absent where it failed or has not ended."""
    descent: Descent
    best: dict[str, float] | None
    """Values of the best setting; None until the search has ended."""
    stopped: str | None
    """Why a search that has ended has no best setting."""

    @property
    def ended(self) -> bool:
        """Whether no more runs are wanted."""
        return self.descent.ended

    @property
    def tuned(self) -> bool:
        """Whether every neighbor of the best setting was tried and is not better."""
        return self.descent.tuned

    @property
    def edges(self) -> list[str]:
        """Ends at which the best setting is, such as `lr high`; empty if it is inside."""
        sides = {-1: "low", 1: "high"}
        return [f"{self.names[axis]} {sides[side]}" for axis, side in self.descent.edges]

    def rows(self) -> list[dict[str, Any]]:
        """Return the settings as plain values: values, losses by seed, mean, diverged runs."""
        return [
            {
                "values": values,
                "losses": {str(seed): loss for seed, loss in losses.items()},
                "mean": statistics.fmean(losses.values()) if losses else math.nan,
                "diverged": sum(math.isinf(loss) for loss in losses.values()),
            }
            for values, losses in self.tried
        ]

    def tree(self) -> dict[str, Any]:
        """Return what was found, as plain values for JSON."""
        return {
            "points": self.rows(),
            "best": self.best,
            "tuned": self.tuned,
            "edges": self.edges,
        }


def search_places(
    section: SearchSection, variants: Iterable[str], places: Iterable[RunAt], outcomes: Outcomes
) -> list[dict[str, VariantSearch]]:
    """Return the searches at the places of a study by variant, as far as they can be known.

    With `begin: previous` a place is left out until the search of the place before has ended. With
    `at: first` all places have the search of the first.
    """
    variants, places = list(variants), list(places)
    first = {variant: section.first_setting(variant) for variant in variants}
    starts, found = first, []
    for run in places:
        here = _search_place(section, run, outcomes, starts)
        if section.at == "first":
            return [here] * len(places)
        found.append(here)
        if section.begin == "previous":
            if not all(search.ended for search in here.values()):
                break
            starts = {name: search.descent.best or first[name] for name, search in here.items()}
    return found


def _search_place(
    section: SearchSection, run: RunAt, outcomes: Outcomes, starts: Mapping[str, Setting]
) -> dict[str, VariantSearch]:
    @cache
    def runs_of(variant: str, setting: Setting) -> list[PlannedRun]:
        """Return the runs of a setting, none if it has a value that its key does not accept."""
        values = section.values(variant, setting)
        try:
            return [run(variant, values, seed) for seed in section.seeds]
        except ConfigError:
            if setting == starts[variant]:
                raise
            return []

    def loss_of(variant: str, setting: Setting) -> float | None:
        """Return the mean loss of a setting, None while runs are missing, NaN if one failed.

        A setting without runs counts as failed: a search goes on without it, and is not tuned if
        the best setting is beside it.
        """
        known = [outcomes.get(run.id) for run in runs_of(variant, setting)]
        if not known:
            return math.nan
        if any(outcome is None or not outcome.ended for outcome in known):
            return None
        return statistics.fmean(outcome.loss for outcome in known if outcome is not None)

    losses = {variant: cache(partial(loss_of, variant)) for variant in starts}
    found = {}
    for variant, descent in descend_equally(losses, starts, section.settings, section.most).items():
        groups = {setting: runs_of(variant, setting) for setting in descent.tried}
        tried = tuple(
            (
                section.values(variant, setting),
                collect_losses(outcomes[run.id] for run in runs if run.id in outcomes),
            )
            for setting, runs in groups.items()
        )
        best = stopped = None
        if descent.ended:
            if descent.best is None:
                stopped = f"{variant}: no setting of the search has a finite loss"
            else:
                best = section.values(variant, descent.best)
        all_runs = tuple(run for runs in groups.values() for run in runs)
        names = section.names(variant)
        found[variant] = VariantSearch(names, all_runs, tried, descent, best, stopped)
    return found


def first_stop(searches: Iterable[Mapping[str, VariantSearch]]) -> str | None:
    """Return why the first search without a result has none, None if all have one."""
    each = (search.stopped for place in searches for search in place.values())
    return next((stopped for stopped in each if stopped), None)


def expect_search(
    section: SearchSection, name: str, example: PlannedRun, search: VariantSearch | None
) -> ExpectedRuns:
    """Return the runs that the search of one variant at one place is expected to have.

    Args:
        section: of the study.
        name: of the variant and the place, for the account.
        example: one of the runs.
        search: the search so far, if it has begun.
    """
    seeds = len(section.seeds)
    tried = 0 if search is None else len(search.descent.tried)
    most = tried if search is not None and search.ended else section.most
    return ExpectedRuns(
        name=f"{name}: search",
        part="tuning",
        example=example,
        runs=max(section.settings, tried) * seeds,
        most=most * seeds,
    )


def expect_best(
    section: SearchSection,
    name: str,
    example: PlannedRun,
    seeds: Collection[int],
    *,
    searched: bool,
) -> ExpectedRuns:
    """Return the runs at a best setting that its search does not do.

    Args:
        section: of the study.
        name: for the account.
        example: one of the runs.
        seeds: of the runs.
        searched: whether the search was done at the same place, so that its seeds are there.
    """
    runs = len(set(seeds) - set(section.seeds if searched else ()))
    return ExpectedRuns(name=name, part="final", example=example, runs=runs, most=runs)
