"""Small checks that tests make."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from muonscale.lab.coordcheck.plan import CoordcheckRequest, plan_check
from muonscale.lab.coordcheck.result import check_facts
from muonscale.lab.coordcheck.run import measure
from muonscale.lab.training.console import RunConsole


def small(corpus: Path, cache: Path, **asked: Any) -> CoordcheckRequest:
    """Return a check of a very small Llama, with heads of 8."""
    overrides = [
        "run.threads=1",
        f"data.path={corpus}",
        f"data.cache={cache}",
        "data.vocab_size=300",
        "data.sequence_length=32",
        *asked.pop("overrides", []),
    ]
    given = {"target": "llama-pico", "widths": (16, 32, 64), "seeds": 1, "steps": 3}
    given["batch_tokens"] = 256
    return CoordcheckRequest(**{**given, "overrides": overrides, **asked})


def facts_of(asked: CoordcheckRequest) -> dict[str, Any]:
    """Return the facts of a check."""
    return check_facts(measure(plan_check(asked), RunConsole.silent()))


def bad_parts(facts: dict[str, Any]) -> set[str]:
    """Return the parts of which something has failed, or is not decided."""
    return {part["part"] for part in facts["parts"] if not part["passed"]}
