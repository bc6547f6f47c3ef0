"""Parametrized, lazy and oddly declared modules keep their type."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from muonscale.errors import GroupingError
from muonscale.optim.matrices.spec import MatrixSpec
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.roles import Role, assign_roles


def old_weight_norm(module: nn.Module) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(module)


def pruned(module: nn.Module) -> nn.Module:
    return prune.l1_unstructured(module, "weight", 0.5)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize(
    ("wrap", "weight", "magnitude"),
    [
        (
            parametrizations.weight_norm,
            "parametrizations.weight.original1",
            "parametrizations.weight.original0",
        ),
        (parametrizations.spectral_norm, "parametrizations.weight.original", None),
        (old_weight_norm, "weight_v", "weight_g"),
        (torch.nn.utils.spectral_norm, "weight_orig", None),
        (pruned, "weight_orig", None),
    ],
)
@pytest.mark.parametrize(
    ("module", "role", "matrices"),
    [
        (lambda: nn.Embedding(11, 8), Role.EMBEDDING, MatrixSpec()),
        (lambda: nn.Linear(8, 8), Role.HIDDEN, MatrixSpec()),
        (lambda: nn.Conv1d(8, 6, 5), Role.CONVOLUTION, MatrixSpec(flattened=True)),
        (lambda: nn.Linear(8, 11), Role.HEAD, MatrixSpec()),
    ],
)
def test_a_parametrized_weight_is_what_its_layer_is(
    wrap: Callable,
    weight: str,
    magnitude: str | None,
    module: Callable,
    role: Role,
    matrices: MatrixSpec,
) -> None:
    first = [] if role == Role.EMBEDDING else [nn.Embedding(11, 8)]
    last = [nn.LayerNorm(8)] if role != Role.HEAD else []
    model = nn.Sequential(*first, wrap(module()), *last)
    found = {a.name: a for a in assign_roles(model)}
    at = len(first)
    assert (found[f"{at}.{weight}"].role, found[f"{at}.{weight}"].matrices) == (role, matrices)
    if magnitude is not None:
        assert found[f"{at}.{magnitude}"].role == Role.NORM
    assert not any(a.guessed for a in found.values())


def test_a_fused_weight_stays_fused_when_it_is_parametrized() -> None:
    attention = nn.MultiheadAttention(8, 2)
    parametrizations.weight_norm(attention, "in_proj_weight")
    found = {a.name: a for a in assign_roles(attention)}
    name = "parametrizations.in_proj_weight.original1"
    assert found[name].matrices == MatrixSpec(splits=(8, 8, 8))


def test_parts_of_another_parametrization_are_guesses() -> None:
    class LowRank(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return a @ b

        def right_inverse(self, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return w[:, :2].clone(), w[:2].clone()

    model = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6))
    parametrize.register_parametrization(model[0], "weight", LowRank(), unsafe=True)
    found = {a.name: a for a in assign_roles(model)}
    guessed = [name for name, a in found.items() if a.guessed]
    expected = [f"0.parametrizations.weight.original{i}" for i in (0, 1)]
    assert guessed == expected


def test_a_lazy_module_gets_a_sentence() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4))
    with pytest.raises(GroupingError, match=r"1\.weight of LazyLinear has no shape yet"):
        parameter_groups(model)
    model(torch.zeros(2, 4))
    assert parameter_groups(model)


def test_an_input_embedding_that_is_a_convolution_is_a_convolution() -> None:
    class Vision(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patches, self.body = nn.Conv2d(3, 8, 4), nn.Linear(8, 8)

        def get_input_embeddings(self) -> nn.Module:
            return self.patches

    model = Vision()
    found = {a.name: a for a in assign_roles(model)}
    assert found["patches.weight"].role == Role.CONVOLUTION
    groups = parameter_groups(model, overrides={"convolution": {"rule": "muon"}})
    spec = next(g for g in groups if g["role"] == "convolution")["matrices"]["patches.weight"]
    assert spec == MatrixSpec(flattened=True)
