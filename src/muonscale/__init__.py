"""Train language models with the Muon family of optimizers, and find out what that buys.

The public names are loaded on first use, so that `import muonscale` is quick and imports nothing
that the part in use does not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muonscale.optim.groups import parameter_groups as parameter_groups
    from muonscale.optim.groups import routing_report as routing_report
    from muonscale.optim.muon import Muon as Muon
    from muonscale.optim.orthogonalize import exact_polar as exact_polar
    from muonscale.optim.orthogonalize import orthogonalize as orthogonalize

__version__ = "0.1.0"

_HOME = {
    "Muon": "muonscale.optim.muon",
    "exact_polar": "muonscale.optim.orthogonalize",
    "orthogonalize": "muonscale.optim.orthogonalize",
    "parameter_groups": "muonscale.optim.groups",
    "routing_report": "muonscale.optim.groups",
}

__all__ = ["Muon", "exact_polar", "orthogonalize", "parameter_groups", "routing_report"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'muonscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
