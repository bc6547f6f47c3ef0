"""Convolutions on Muon, held against reshapes of plain torch and an SVD in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale.errors import ConfigError, GroupingError
from muonscale.optim.hf_trainer import MuonFactory
from muonscale.optim.matrices.spec import MatrixSpec, view
from muonscale.optim.muon import Muon
from muonscale.optim.parameters.convolutions import kernel_matrices
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.report import grouping_report

LR, RMS = 0.1, 0.2
EXACT = [(2.0, -1.5, 0.5)] * 12
"""Newton-Schulz steps with the fixed point 1, which converge to the polar factor."""


def polar(G: Tensor) -> Tensor:
    U, _, Vh = torch.linalg.svd(G.double(), full_matrices=False)
    return U @ Vh


def step(G: Tensor) -> Tensor:
    """Return the change of one matrix (out, in) in the first step, without decay."""
    return -LR * RMS * max(G.shape) ** 0.5 * polar(G)


def conv_step(G: Tensor, groups: int) -> Tensor:
    parts = [step(part.reshape(len(part), -1)).view(part.shape) for part in G.chunk(groups)]
    return torch.cat(parts)


def transposed_step(G: Tensor, groups: int) -> Tensor:
    """The map of the values at one position to the patch that they are added into."""
    parts = [
        step(part.permute(*range(1, part.ndim), 0).reshape(-1, len(part))).T.reshape(part.shape)
        for part in G.chunk(groups)
    ]
    return torch.cat(parts)


CASES: dict[str, nn.Module] = {
    "1d": nn.Conv1d(6, 10, 3),
    "2d": nn.Conv2d(4, 12, (3, 2)),
    "3d": nn.Conv3d(2, 6, 2),
    "1x1": nn.Conv2d(8, 5, 1),
    "grouped": nn.Conv2d(8, 12, 3, groups=4),
    "a multiplier of channels": nn.Conv2d(4, 12, 3, groups=4),
    "transposed 1d": nn.ConvTranspose1d(6, 4, 3),
    "transposed 2d": nn.ConvTranspose2d(4, 6, (3, 2)),
    "transposed grouped": nn.ConvTranspose2d(8, 12, 3, groups=4),
}


def net(conv: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"conv": type(conv)(**_arguments(conv)), "linear": nn.Linear(4, 4)})


def _arguments(conv: Any) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "groups")
    return {name: getattr(conv, name) for name in names}


def seeded(shape: torch.Size, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_each_groups_matrix_alone(case: str) -> None:
    model = net(CASES[case])
    conv = model.get_submodule("conv")
    optimizer = Muon(
        model, lr=LR, weight_decay=0.0, convolutions="muon", ns_coefficients=EXACT, ns_steps=12
    )
    before = conv.weight.detach().clone()
    conv.weight.grad = seeded(conv.weight.shape)
    optimizer.step()
    oracle = transposed_step if "transposed" in case else conv_step
    change = conv.weight.detach() - before
    expected = oracle(conv.weight.grad, conv.groups).float()
    torch.testing.assert_close(change, expected, rtol=2e-3, atol=2e-5)
    assert optimizer.stats()["matrices"] == conv.groups


@pytest.mark.parametrize("case", ["2d", "grouped", "transposed grouped"])
@pytest.mark.parametrize("options", [{}, {"post_norm": "normuon"}, {"post_norm": "col_row"}])
def test_channels_last_takes_the_same_steps(case: str, options: dict[str, Any]) -> None:
    weights = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = net(CASES[case]).to(memory_format=memory_format)
        conv = model.get_submodule("conv")
        optimizer = Muon(model, lr=LR, convolutions="muon", **options)
        for seed in range(3):
            G = seeded(conv.weight.shape, seed)
            conv.weight.grad = G.to(memory_format=memory_format)
            optimizer.step()
        assert conv.weight.is_contiguous(memory_format=memory_format)
        weights.append(conv.weight.detach())
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_the_matrix_of_a_convolution_is_what_multiplies_its_patches() -> None:
    x = seeded(torch.Size((2, 8, 5, 5))).double()
    conv = nn.Conv2d(8, 12, 3, groups=4).double()
    (W_GOI,) = view(conv.weight, kernel_matrices(conv.weight, conv))
    patches = nn.functional.unfold(x, 3).view(2, 4, 18, 9)  # of each group's channels
    y = torch.einsum("goi,bgip->bgop", W_GOI, patches).reshape(2, 12, 3, 3)
    torch.testing.assert_close(y, nn.functional.conv2d(x, conv.weight, groups=4))


def test_the_matrix_of_a_transposed_convolution_is_what_multiplies_each_position() -> None:
    x = seeded(torch.Size((2, 8, 5, 5))).double()
    conv = nn.ConvTranspose2d(8, 12, 3, groups=4, bias=False).double()
    (W_GOI,) = view(conv.weight, kernel_matrices(conv.weight, conv))
    assert tuple(W_GOI.shape) == (4, 27, 2)
    patches = torch.einsum("goi,bgip->bgop", W_GOI, x.view(2, 4, 2, 25)).reshape(2, 108, 25)
    torch.testing.assert_close(nn.functional.fold(patches, 7, 3), conv(x))


def test_a_step_of_a_1x1_convolution_is_that_of_the_linear_layer() -> None:
    linear, conv = nn.Linear(6, 10, bias=False), nn.Conv2d(6, 10, 1, bias=False)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.view(10, 6, 1, 1))
    for model in (linear, conv):
        optimizer = Muon(nn.ModuleList([model]), lr=LR, convolutions="muon", scale="spectral")
        model.weight.grad = seeded(torch.Size((10, 6))).view(model.weight.shape)
        optimizer.step()
    torch.testing.assert_close(conv.weight.view(10, 6), linear.weight)


@pytest.mark.parametrize(
    "conv",
    [nn.Conv1d(6, 6, 3, groups=6), nn.Conv2d(3, 1, 3), nn.ConvTranspose2d(6, 6, 3, groups=6)],
)
def test_kernels_that_are_vectors_stay_on_adamw_and_it_is_said(conv: nn.Module) -> None:
    model = nn.ModuleDict({"conv": conv, "linear": nn.Linear(4, 4)})
    found = {
        row.name: row for row in grouping_report(parameter_groups(model, convolutions="muon")).rows
    }
    assert found["conv.weight"].rule == "adamw"
    assert "vectors" in found["conv.weight"].why
    assert found["linear.weight"].rule == "muon"


def test_a_role_override_puts_depthwise_kernels_on_muon_each_alone() -> None:
    model = nn.ModuleDict({"conv": nn.Conv1d(6, 6, 3, groups=6), "linear": nn.Linear(4, 4)})
    groups = parameter_groups(model, overrides={"convolution": {"rule": "muon"}})
    found = {row.name: row for row in grouping_report(groups).rows}
    assert found["conv.weight"].holds == ((6, 1, 3),)


def test_convolutions_are_on_adamw_by_default_and_with_rule_adamw() -> None:
    model = net(CASES["2d"])
    by_default = parameter_groups(model)
    assert _rules(by_default)["conv.weight"] == "adamw"
    assert set(_rules(parameter_groups(model, rule="adamw", convolutions="muon")).values()) == {
        "adamw"
    }


def test_a_convolution_on_muon_has_the_learning_rate_of_hidden_matrices() -> None:
    model = net(CASES["2d"])
    groups = parameter_groups(model, lr=0.1, adamw_lr=0.2, convolutions="muon")
    rates = {name: g["lr"] for g in groups for name in g["param_names"]}
    assert rates["conv.weight"] == rates["linear.weight"] == 0.1
    assert rates["conv.bias"] == 0.2


def test_an_override_chooses_which_convolutions() -> None:
    model = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3), "b": nn.Conv2d(4, 4, 3), "c": nn.Linear(4, 4)})
    muon = _rules(parameter_groups(model, overrides={"a.*": {"convolutions": "muon"}}))
    assert (muon["a.weight"], muon["b.weight"], muon["a.bias"]) == ("muon", "adamw", "adamw")
    both = {"convolutions": "muon", "overrides": {"a.*": {"convolutions": "adamw"}}}
    back = _rules(parameter_groups(model, **both))
    assert (back["a.weight"], back["b.weight"]) == ("adamw", "muon")
    with pytest.raises(GroupingError, match=r"c\.weight"):
        parameter_groups(model, overrides={"c.*": {"convolutions": "muon"}})


@pytest.mark.parametrize("make", [Muon, parameter_groups, MuonFactory()])
def test_other_words_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"convolutions.*'yes'"):
        make(net(CASES["2d"]), convolutions="yes")


def test_muon_without_a_model_refuses_the_word() -> None:
    groups = parameter_groups(net(CASES["2d"]))
    with pytest.raises(ConfigError, match="convolutions='muon'"):
        Muon(groups, convolutions="muon")


def test_a_network_of_convolutions_alone_is_trained() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, stride=2),
        nn.GELU(),
        nn.Conv2d(16, 16, 3, groups=4),
        nn.GELU(),
        nn.ConvTranspose2d(16, 3, 4, stride=2),
    )
    x = torch.randn(8, 3, 12, 12)
    optimizer = Muon(model, lr=0.02, convolutions="muon")
    losses = []
    for _ in range(30):
        y = model(x)
        loss = (y - x[..., : y.shape[-2], : y.shape[-1]]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert optimizer.stats()["matrices"] == 6


def test_the_matrices_of_a_grouped_transposed_kernel_are_where_its_index_says() -> None:
    X = torch.arange(8 * 3 * 2).view(8, 3, 2)
    (batch,) = view(X, MatrixSpec(flattened=True, transposed=True, heads=4, by_columns=True))
    for group in range(4):
        for channel in range(2):
            assert torch.equal(batch[group, :, channel], X[group * 2 + channel].flatten())


def _rules(groups: list[dict[str, Any]]) -> dict[str, str]:
    return {name: g["rule"] for g in groups for name in g["param_names"]}
