"""The gradient noise scale of a batch study's runs, where they recorded it: a cheap companion.

`telemetry.noise_scale_every` measures it (`muonscale.lab.training.noise_scale`). It is a property of
the weights and not of the batch, so the runs of all batch sizes estimate the same number at one loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from muonscale.lab.report.page import Block, Table, Text
from muonscale.lab.studies.study import Outcome, Outcomes

SAID = (
    "The gradient noise scale tr(Sigma)/|G|^2 (McCandlish et al., arXiv 1812.06162, appendix A.1) at the last "
    "measurement before the loss was reached, of the runs that count at each batch size: geometric mean, lowest "
    "and highest. It knows the gradient alone: the learning rate, momentum and what an optimizer makes of a "
    "gradient are not in it, so it is a size to expect and no critical batch that was measured."
)


def noise_scales(targets: Iterable[Mapping[str, Any]], outcomes: Outcomes) -> list[dict[str, Any]]:
    """Return the noise scale of each variant at each target, in tokens; those without one are left out.

    Args:
        targets: as `batch_found.found_of` has them.
        outcomes: of the study's runs.
    """
    rows = []
    for target in targets:
        for variant in target["variants"]:
            found = [
                scale
                for place in variant["places"]
                if place["state"] == "reached"
                for outcome in _counted(outcomes, variant["name"], place)
                if (scale := scale_before(outcome, place["tokens"])) is not None
            ]
            if found:
                mean = math.exp(sum(map(math.log, found)) / len(found))
                ends = {"low": min(found), "high": max(found)}
                rows.append(
                    {
                        "target": target["target"],
                        "variant": variant["name"],
                        "scale": mean,
                        **ends,
                        "runs": len(found),
                    }
                )
    return rows


def _counted(outcomes: Outcomes, variant: str, place: Mapping[str, Any]) -> list[Outcome]:
    """Return the finished runs that count at a batch size: those of its best learning rate."""
    wanted = {"variant": variant, "batch": place["batch"], "lr": place["lr"]}
    return [
        outcome
        for outcome in outcomes.values()
        if outcome.result is not None and wanted.items() <= outcome.run.coordinates.items()
    ]


def scale_before(outcome: Outcome, tokens: float) -> float | None:
    """Return the noise scale that a run recorded last before so many tokens, None if it did not."""
    scale = None
    for record in outcome.folder.read_metrics():
        if record["kind"] == "train" and "noise_scale" in record:
            if record["tokens"] > tokens:
                break
            scale = record["noise_scale"]["scale"] or scale
    return scale


def noise_blocks(rows: list[Mapping[str, Any]]) -> list[Block]:
    """Return what a page says of the noise scales; nothing where none was recorded."""
    if not rows:
        return []
    table = Table(
        name="noise-scale",
        head=("loss", "variant", "noise scale (tokens)", "lowest", "highest", "runs"),
        rows=tuple(
            (
                f"{row['target']:g}",
                row["variant"],
                f"{row['scale']:,.0f}",
                f"{row['low']:,.0f}",
                f"{row['high']:,.0f}",
                str(row["runs"]),
            )
            for row in rows
        ),
    )
    return [Text(SAID), table]
