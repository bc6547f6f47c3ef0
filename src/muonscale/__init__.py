"""Train language models with the Muon family of optimizers, and find out what that buys.

The public names are loaded on first use, so that `import muonscale` is quick and imports nothing
that the part in use does not need. `errors` has all errors that a user can cause, and `nearest`,
which finds the names that they suggest ("did you mean").
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from muonscale.optim.hf_trainer import MuonFactory as MuonFactory
    from muonscale.optim.matrices.spec import MatrixSpec as MatrixSpec
    from muonscale.optim.migrate.convert_lr import convert_lr as convert_lr
    from muonscale.optim.migrate.convert_state import convert_state_dict as convert_state_dict
    from muonscale.optim.migrate.translate import translate_arguments as translate_arguments
    from muonscale.optim.muon import Muon as Muon
    from muonscale.optim.newton_schulz.orthogonalize import exact_polar as exact_polar
    from muonscale.optim.newton_schulz.orthogonalize import orthogonalize as orthogonalize
    from muonscale.optim.parameters.groups import parameter_groups as parameter_groups
    from muonscale.optim.parameters.report import grouping_report as grouping_report
    from muonscale.optim.presets import preset as preset
    from muonscale.transfer.parametrization import parametrize as parametrize

__version__ = "0.1.0"

_HOME = {
    "MatrixSpec": "muonscale.optim.matrices.spec",
    "Muon": "muonscale.optim.muon",
    "MuonFactory": "muonscale.optim.hf_trainer",
    "convert_lr": "muonscale.optim.migrate.convert_lr",
    "convert_state_dict": "muonscale.optim.migrate.convert_state",
    "exact_polar": "muonscale.optim.newton_schulz.orthogonalize",
    "orthogonalize": "muonscale.optim.newton_schulz.orthogonalize",
    "parameter_groups": "muonscale.optim.parameters.groups",
    "parametrize": "muonscale.transfer.parametrization",
    "preset": "muonscale.optim.presets",
    "grouping_report": "muonscale.optim.parameters.report",
    "translate_arguments": "muonscale.optim.migrate.translate",
}

__all__ = [
    "MatrixSpec",
    "Muon",
    "MuonFactory",
    "convert_lr",
    "convert_state_dict",
    "exact_polar",
    "grouping_report",
    "orthogonalize",
    "parameter_groups",
    "parametrize",
    "preset",
    "translate_arguments",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'muonscale' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
