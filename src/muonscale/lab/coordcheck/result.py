"""A coordinate check as plain values: `coordcheck.json`, which text, figure and page are made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import torch

from muonscale.lab.coordcheck.run import Measured
from muonscale.lab.coordcheck.slopes import CONFIDENCE
from muonscale.lab.coordcheck.tolerances import REACH
from muonscale.lab.coordcheck.verdict import Row, judge, judged_steps, passed, worst_of

FORMAT = 1
"""Of the JSON."""


def check_facts(found: Measured) -> dict[str, Any]:
    """Return everything that there is to say of a check, as plain values; not a number is None."""
    plan, asked = found.plan, found.plan.asked
    config = plan.config
    values = {(str(k[0]), k[1], k[2]): v for k, v in found.values.items()}
    rows = judge(plan.widths, values, found.rules, found.falls, asked.grow)
    seed = config.run.seed
    return {
        "format": FORMAT,
        "model": config.model.source,
        "model_type": plan.shape.model_type,
        "layers": plan.shape.num_hidden_layers,
        "convention": config.transfer.convention,
        "rule": config.optimizer.rule,
        "scale": config.optimizer.scale,
        "lr": config.optimizer.lr,
        "grow": asked.grow,
        "widths": list(plan.widths),
        "seeds": list(range(seed, seed + asked.seeds)),
        "steps": asked.steps,
        "judged_steps": list(judged_steps(asked.steps)),
        "batch_tokens": config.train.batch_tokens,
        "sequence_length": config.data.sequence_length,
        "confidence": CONFIDENCE,
        "reach": REACH,
        "notes": list(plan.notes),
        "passed": passed(rows),
        "parts": [_part(name, rows) for name in dict.fromkeys(row.part for row in rows)],
        "rows": [_row(row) for row in rows],
        "values": [
            {**key._asdict(), "values": _plain(values_SWT.tolist())}
            for key, values_SWT in found.values.items()
        ],
        "losses": _plain(found.losses.tolist()),
        "seconds": round(found.seconds, 1),
        "cpu_seconds": round(found.cpu_seconds, 1),
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("muonscale", "torch", "transformers")},
    }


def _part(name: str, rows: Sequence[Row]) -> dict[str, Any]:
    own = [row for row in rows if row.part == name]
    return {"part": name, "passed": passed(own), "worst": _row(worst_of(own))}


def _row(row: Row) -> dict[str, Any]:
    return {
        "part": row.part,
        "quantity": row.quantity,
        "name": row.name,
        "slope": _plain(row.slope.value),
        "low": _plain(row.slope.low),
        "high": _plain(row.slope.high),
        **asdict(row.limit),
        "outcome": row.outcome,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value if math.isfinite(value) else None
