"""A coordinate check as plain values: the content of `coordcheck.json`."""

from __future__ import annotations

from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from muonscale.lab.coordcheck.run import CheckMeasurement
from muonscale.lab.coordcheck.slopes import CONFIDENCE
from muonscale.lab.coordcheck.tolerances import REACH
from muonscale.lab.coordcheck.verdict import JudgedSlope, judge, judged_steps, passed, worst_of
from muonscale.lab.files import drop_nonfinite

FORMAT = 1
"""The version of the JSON format."""


def check_facts(measurement: CheckMeasurement) -> dict[str, Any]:
    """Return a check and its verdict as plain values; a number that is not finite is None."""
    plan, request = measurement.plan, measurement.plan.request
    config = plan.config
    values = {(str(k[0]), k[1], k[2]): v for k, v in measurement.values.items()}
    rows = judge(plan.widths, values, measurement.rules, measurement.falls, request.grow)
    parts = []
    for name in dict.fromkeys(row.part for row in rows):
        own = [row for row in rows if row.part == name]
        parts.append({"part": name, "passed": passed(own), "worst": _row(worst_of(own))})
    seed = config.run.seed
    facts = {
        "format": FORMAT,
        "model": config.model.source,
        "model_type": plan.shape.model_type,
        "layers": plan.shape.num_hidden_layers,
        "convention": config.transfer.convention,
        "rule": config.optimizer.rule,
        "scale": config.optimizer.scale,
        "lr": config.optimizer.lr,
        "grow": request.grow,
        "widths": list(plan.widths),
        "seeds": list(range(seed, seed + request.seeds)),
        "steps": request.steps,
        "judged_steps": list(judged_steps(request.steps)),
        "batch_tokens": config.train.batch_tokens,
        "sequence_length": config.data.sequence_length,
        "confidence": CONFIDENCE,
        "reach": REACH,
        "notes": list(plan.notes),
        "passed": passed(rows),
        "parts": parts,
        "rows": [_row(row) for row in rows],
        "values": [
            {**key._asdict(), "values": values_SWT.tolist()}
            for key, values_SWT in measurement.values.items()
        ],
        "losses": measurement.losses.tolist(),
        "seconds": round(measurement.seconds, 1),
        "cpu_seconds": round(measurement.cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("muonscale", "torch", "transformers")},
    }
    return drop_nonfinite(facts)


def _row(row: JudgedSlope) -> dict[str, Any]:
    return {
        "part": row.part,
        "quantity": row.quantity,
        "name": row.name,
        "slope": row.slope.value,
        "low": row.slope.low,
        "high": row.slope.high,
        **asdict(row.limit),
        "outcome": row.outcome,
    }
