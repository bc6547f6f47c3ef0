from __future__ import annotations

from typing import Any

import pytest
import torch

from muonscale.lab.training.gradients import clip_gradients, gradient_norms


def optimizer_of(*rules: str) -> torch.optim.Optimizer:
    generator = torch.Generator().manual_seed(0)
    groups: list[dict[str, Any]] = []
    for index, rule in enumerate(rules):
        parameters = [torch.nn.Parameter(torch.zeros(3, 4)) for _ in range(2)]
        for parameter in parameters:
            parameter.grad = torch.randn(3, 4, generator=generator)
        groups.append({"params": parameters, "name": str(index), "rule": rule})
    return torch.optim.SGD(groups, lr=1.0)


def flat(optimizer: torch.optim.Optimizer, *indices: int) -> torch.Tensor:
    groups = [optimizer.param_groups[i] for i in indices]
    return torch.cat([p.grad.flatten() for g in groups for p in g["params"]])


def test_norms_are_those_of_each_group() -> None:
    optimizer = optimizer_of("muon", "adamw")
    norms = gradient_norms(optimizer)
    for i in (0, 1):
        torch.testing.assert_close(norms[str(i)], flat(optimizer, i).norm())


def test_clipping_adamw_leaves_muon_gradients_and_equals_torch() -> None:
    optimizer = optimizer_of("muon", "adamw", "adamw")
    muon, adamw = flat(optimizer, 0), flat(optimizer, 1, 2)
    clip_gradients(optimizer, gradient_norms(optimizer), max_norm=1.0, clip="adamw")
    assert torch.equal(flat(optimizer, 0), muon)
    torch.testing.assert_close(flat(optimizer, 1, 2), adamw / adamw.norm())


def test_clipping_all_is_torch_clip_grad_norm() -> None:
    ours, theirs = optimizer_of("muon", "adamw"), optimizer_of("muon", "adamw")
    clip_gradients(ours, gradient_norms(ours), max_norm=0.5, clip="all")
    torch.nn.utils.clip_grad_norm_([p for g in theirs.param_groups for p in g["params"]], 0.5)
    torch.testing.assert_close(flat(ours, 0, 1), flat(theirs, 0, 1))


def test_small_gradients_are_left_alone() -> None:
    optimizer = optimizer_of("adamw")
    before = flat(optimizer, 0)
    clip_gradients(optimizer, gradient_norms(optimizer), max_norm=1e3, clip="all")
    assert torch.equal(flat(optimizer, 0), before)


@pytest.mark.parametrize("clip", ["adamw", "all"])
def test_missing_gradients_have_norm_zero(clip: Any) -> None:
    optimizer = optimizer_of("adamw")
    optimizer.zero_grad()
    norms = gradient_norms(optimizer)
    assert norms["0"] == 0
    clip_gradients(optimizer, norms, max_norm=1.0, clip=clip)
