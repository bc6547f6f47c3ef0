"""How often a fuzz test tries: a few fixed examples in the fast tier, many in the slow one.

`MUONSCALE_FUZZ=5000 pytest tests/fuzz -m "not slow"` tries as many new ones instead, and
shows what fails as it is: making it small takes long.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings


def tries(number: int, *, fixed: bool = True) -> settings:
    return settings(
        max_examples=number,
        derandomize=fixed,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=True,
        phases=[Phase.explicit, Phase.reuse, Phase.generate] + [Phase.shrink] * fixed,
    )


def tiers(few: int, many: int) -> pytest.MarkDecorator:
    """Parametrize a test by `tried`, the settings of a campaign."""
    if number := os.environ.get("MUONSCALE_FUZZ"):
        return pytest.mark.parametrize("tried", [tries(int(number), fixed=False)], ids=["campaign"])
    slow = pytest.param(tries(many), marks=pytest.mark.slow)
    return pytest.mark.parametrize("tried", [tries(few), slow], ids=["few", "many"])
