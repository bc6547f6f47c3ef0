"""The gradient noise scale of a batch study's runs, where they recorded it.

`telemetry.noise_scale_every` measures it (`muonscale.lab.training.noise_scale`). It is a property
of the weights and not of the batch, so runs of all batch sizes estimate the same number at one
loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from muonscale.lab.report.page import Block, Table, Text
from muonscale.lab.studies.batch.measurements import Key
from muonscale.lab.studies.report_blocks import Found
from muonscale.lab.studies.study import Outcome

EXPLANATION = (
    "The gradient noise scale tr(Sigma)/|G|^2 (McCandlish et al., arXiv 1812.06162, appendix A.1) "
    "at the last measurement before the loss was reached, over the compared runs of all batch "
    "sizes: geometric mean, lowest and highest. It depends on the gradient alone, not on the "
    "learning rate, momentum or update rule, so it is a size to expect and not a measured critical "
    "batch."
)


def collect_noise_scales(
    targets: Iterable[Found], measured: Mapping[Key, list[Outcome]]
) -> list[dict[str, Any]]:
    """Return the noise scale of each variant at each target, in tokens, where it was recorded.

    `measured` holds the runs at the best setting by variant and batch size.
    """
    rows = []
    for target in targets:
        for variant in target["variants"]:
            scales = []
            for place in variant["places"]:
                if place["state"] == "reached":
                    scales += [
                        last_scale(outcome, place["tokens"])
                        for outcome in measured[variant["name"], place["batch"]]
                        if outcome.result is not None
                    ]
            if found := [scale for scale in scales if scale is not None]:
                rows.append(
                    {
                        "target": target["target"],
                        "variant": variant["name"],
                        "scale": math.exp(sum(map(math.log, found)) / len(found)),
                        "low": min(found),
                        "high": max(found),
                        "runs": len(found),
                    }
                )
    return rows


def last_scale(outcome: Outcome, tokens: float) -> float | None:
    """Return the last noise scale that a run recorded up to a number of tokens, None if none."""
    scale = None
    for record in outcome.folder.read_metrics("train"):
        if "noise_scale" in record:
            if record["tokens"] > tokens:
                break
            scale = record["noise_scale"]["scale"] or scale
    return scale


def noise_blocks(rows: list[Found]) -> list[Block]:
    """Return the blocks of a report about the noise scale; none if it was not recorded."""
    if not rows:
        return []
    table = Table(
        name="noise-scale",
        head=("loss", "variant", "noise scale (tokens)", "lowest", "highest", "runs"),
        rows=tuple(
            (
                f"{row['target']:g}",
                row["variant"],
                *(f"{row[key]:,.0f}" for key in ("scale", "low", "high")),
                str(row["runs"]),
            )
            for row in rows
        ),
    )
    return [Text(EXPLANATION), table]
