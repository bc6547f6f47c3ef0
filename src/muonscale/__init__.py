"""Train language models with the Muon family of optimizers, and find out what that buys.

The public names are loaded on first use, so that `import muonscale` is quick and imports nothing
that the part in use does not need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muonscale.optim.convert_lr import convert_lr as convert_lr
    from muonscale.optim.convert_state import convert_state_dict as convert_state_dict
    from muonscale.optim.factory import MuonFactory as MuonFactory
    from muonscale.optim.groups import parameter_groups as parameter_groups
    from muonscale.optim.matrices import Matrices as Matrices
    from muonscale.optim.muon import Muon as Muon
    from muonscale.optim.orthogonalize import exact_polar as exact_polar
    from muonscale.optim.orthogonalize import orthogonalize as orthogonalize
    from muonscale.optim.presets import preset as preset
    from muonscale.optim.report import routing_report as routing_report
    from muonscale.optim.translate import translate_arguments as translate_arguments
    from muonscale.transfer.parametrization import parametrize as parametrize

__version__ = "0.1.0"

_HOME = {
    "Matrices": "muonscale.optim.matrices",
    "Muon": "muonscale.optim.muon",
    "MuonFactory": "muonscale.optim.factory",
    "convert_lr": "muonscale.optim.convert_lr",
    "convert_state_dict": "muonscale.optim.convert_state",
    "exact_polar": "muonscale.optim.orthogonalize",
    "orthogonalize": "muonscale.optim.orthogonalize",
    "parameter_groups": "muonscale.optim.groups",
    "parametrize": "muonscale.transfer.parametrization",
    "preset": "muonscale.optim.presets",
    "routing_report": "muonscale.optim.report",
    "translate_arguments": "muonscale.optim.translate",
}

__all__ = [
    "Matrices",
    "Muon",
    "MuonFactory",
    "convert_lr",
    "convert_state_dict",
    "exact_polar",
    "orthogonalize",
    "parameter_groups",
    "parametrize",
    "preset",
    "routing_report",
    "translate_arguments",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'muonscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
