from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from muonscale import Muon
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.rules.step_inputs import named

Build = Callable[[str], nn.Module]
SetGradients = Callable[[nn.Module, int], None]
JORDAN = list(resolve("jordan", 5).triples)


def close(X: Tensor, Y: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(X.double(), Y.double(), rtol=tolerance, atol=tolerance)


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def states(optimizer: Muon) -> dict[str, dict[str, Tensor]]:
    pairs = ((n, p) for g in optimizer.param_groups for n, p in named(g))
    return {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in pairs}


def equal(X: object, Y: object) -> bool:
    """Return whether two nests of dicts and tensors have the same values, bit for bit."""
    if isinstance(X, dict) and isinstance(Y, dict):
        return X.keys() == Y.keys() and all(equal(X[key], Y[key]) for key in X)
    assert isinstance(X, Tensor)
    assert isinstance(Y, Tensor)
    return X.dtype == Y.dtype and torch.equal(X, Y)
