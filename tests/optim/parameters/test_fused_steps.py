"""A fused weight takes the steps that the same matrices take when they are stored apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, view
from muonscale.optim.muon import Muon
from muonscale.optim.parameters.fused_weights import stored_matrices
from muonscale.optim.parameters.module_survey import survey
from tests.optim.parameters import fused_cases

CASES: dict[str, tuple[tuple[int, ...], MatrixSpec]] = {
    "qkv": ((48, 16), MatrixSpec(splits=(16, 16, 16))),
    "qkv of Conv1D": ((16, 48), MatrixSpec(transposed=True, splits=(16, 16, 16))),
    "grouped-query": ((32, 16), MatrixSpec(splits=(16, 8, 8))),
    "grouped-query by groups": ((32, 16), MatrixSpec(splits=(16, 8, 8), groups=2)),
    "gated query": ((48, 16), MatrixSpec(splits=(16, 16, 8, 8), groups=4)),
    "every head in turn": ((48, 16), MatrixSpec(splits=(16, 16, 16), groups=4)),
    "a matrix for each head": ((48, 16), MatrixSpec(splits=(24, 12, 12), heads=(6, 3, 3))),
    "factors of experts": ((16, 24), MatrixSpec(heads=3, by_columns=True, interleaved=True)),
    "output by heads": ((16, 24), MatrixSpec(heads=3, by_columns=True)),
    "latent attention": ((40, 12), MatrixSpec(splits=(24, 16), groups=4)),
    "latent attention by heads": ((40, 12), MatrixSpec(splits=(24, 16), groups=4, heads=4)),
    "gate and up": ((40, 16), MatrixSpec(splits=(20, 20))),
    "gate and up, interleaved": ((40, 16), MatrixSpec(splits=(20, 20), groups=20)),
    "experts": ((4, 12, 16), PLAIN),
    "experts, gate and up": ((4, 24, 16), MatrixSpec(splits=(12, 12))),
    "experts as in gpt-oss": (
        (4, 16, 24), MatrixSpec(transposed=True, splits=(12, 12), groups=12)),
    "kernel": ((12, 4, 3), MatrixSpec(flattened=True)),
    "one row": ((1, 16), PLAIN),
    "one column": ((16, 1), PLAIN),
    "one number": ((1, 1), PLAIN),
}  # fmt: skip


def apart(X: Tensor, layout: MatrixSpec) -> list[Tensor]:
    return [one.clone() for batch in view(X, layout) for one in batch]


def optimizer(params: list[Tensor], layout: MatrixSpec | None, **options: Any) -> Muon:
    names = [f"p{i}" for i in range(len(params))]
    group: dict[str, Any] = {"params": params, "param_names": names, "rule": "muon"}
    if layout is not None:
        group["matrices"] = dict.fromkeys(names, layout)
    return Muon([group], lr=0.1, weight_decay=0.3, **options)


OPTIONS: list[dict[str, Any]] = [{}, {"scale": "spectral"}, {"post_norm": "row"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["rms", "spectral", "row"])
@pytest.mark.parametrize("case", CASES)
def test_fused_and_apart_take_the_same_steps(case: str, options: dict[str, Any]) -> None:
    shape, layout = CASES[case]
    generator = torch.Generator().manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(shape, generator=generator))
    parts = [torch.nn.Parameter(one) for one in apart(fused.detach(), layout)]
    together, single = (
        optimizer([fused], layout, **options),
        optimizer(list(parts), None, **options),
    )
    before = fused.detach().clone()
    for _ in range(3):
        fused.grad = torch.randn(shape, generator=generator)
        for part, G in zip(parts, apart(fused.grad, layout), strict=True):
            part.grad = G
        together.step()
        single.step()
    assert together.stats()["matrices"] == len(parts)
    for left, right in zip(apart(fused.detach(), layout), parts, strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=2e-5, atol=2e-6)
    assert not torch.allclose(before, fused)


ARCHITECTURES = [
    ("BarkSelfAttention", "att_proj"),
    ("DisentangledSelfAttention", "in_proj"),
    ("LevitAttention", "queries_keys_values.linear"),
    ("HieraMaskUnitAttention", "qkv"),
    ("EsmFoldSelfAttention", "proj"),
    ("EvollaSequenceCompressorAttention", "to_kv"),
    ("BambaMixer", "in_proj"),
    ("ZambaMambaMixer", "in_proj"),
    ("ZambaMambaMixer", "x_proj_weight"),
    ("MoshiGatingMLP", "fc1"),
    ("MoonshineDecoderMLP", "fc1"),
    ("PocketTTSFlowResBlock", "adaln_proj"),
    ("VibeVoiceDiffusionHeadFinalLayer", "linear_1"),
]


@pytest.mark.parametrize(("cls", "place"), ARCHITECTURES)
def test_the_fused_weight_of_an_architecture_steps_as_its_parts_apart(cls: str, place: str) -> None:
    """The parts are those into which the forward pass cuts the output, not those of the table."""
    module, weight = fused_cases.weight_of(cls, place)
    owner = next(found[0] for p, found in survey(module).owners.items() if p is weight)
    found, numbers = fused_cases.parts_by_data_flow(fused_cases.case_of(cls, place), module, weight)
    rows = [torch.isin(numbers, torch.tensor(sorted(part))) for part in sorted(found, key=min)]

    def cut(X: Tensor) -> list[Tensor]:
        return [X[mask].reshape(*X.shape[:-2], -1, X.shape[-1]).clone() for mask in rows]

    parts = [torch.nn.Parameter(part) for part in cut(weight.detach())]
    assert len(parts) > 1
    layout, _ = stored_matrices(weight, owner)
    together, single = optimizer([weight], layout), optimizer(list(parts), PLAIN)
    whole = torch.nn.Parameter(weight.detach().clone())
    unaware = optimizer([whole], PLAIN)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        weight.grad = torch.randn(weight.shape, generator=generator)
        whole.grad = weight.grad.clone()
        for part, G in zip(parts, cut(weight.grad), strict=True):
            part.grad = G
        for one in (together, single, unaware):
            one.step()
    for left, right in zip(cut(weight.detach()), parts, strict=True):
        torch.testing.assert_close(left, right.detach(), rtol=2e-5, atol=2e-6)
    assert (whole - weight).norm() > 0.05 * whole.norm()


@pytest.mark.parametrize("case", ["qkv", "every head in turn", "experts as in gpt-oss"])
def test_a_fused_weight_taken_for_one_matrix_goes_elsewhere(case: str) -> None:
    shape, layout = CASES[case]
    wrong = MatrixSpec(transposed=layout.transposed)
    steps = []
    for stored_as in (layout, wrong):
        fused = torch.nn.Parameter(torch.zeros(shape))
        fused.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        optimizer([fused], stored_as).step()
        steps.append(fused.detach())
    cosine = torch.nn.functional.cosine_similarity(steps[0].flatten(), steps[1].flatten(), dim=0)
    assert cosine < 0.97


@pytest.mark.parametrize("shape", [(1, 16), (16, 1), (1, 1)])
def test_a_row_or_a_column_takes_a_step_of_normalized_momentum(shape: tuple[int, int]) -> None:
    W = torch.nn.Parameter(torch.zeros(shape))
    W.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    optimizer([W], None).step()
    step = W.detach()
    cosine = torch.nn.functional.cosine_similarity(-step.flatten(), W.grad.flatten(), dim=0)
    assert cosine == pytest.approx(1.0, abs=1e-5)
    # Jordan's polynomial takes a singular value of 1 into [0.68, 1.13]
    assert 0.68 * 0.2 < step.square().mean().sqrt() / 0.1 < 1.13 * 0.2
    W.grad.zero_()
    fresh = torch.nn.Parameter(torch.zeros(shape))
    fresh.grad = torch.zeros(shape)
    optimizer([fresh], None).step()
    assert fresh.abs().max() == 0
