"""What a coordinate check measures, against singular values and models made by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config

from muonscale import orthogonalize, parameter_groups, parametrize
from muonscale.errors import ConfigError
from muonscale.optim.matrices.spec import MatrixSpec
from muonscale.optim.parameters.roles import Role, RoleAssignment
from muonscale.transfer.constants import ForwardConstants
from muonscale.transfer.coordinates import (
    RESIDUAL,
    Coordinate,
    CoordinateProbe,
    largest_singular_values,
    parameter_norms,
)

torch.manual_seed(0)
MATRICES = {
    "random": torch.randn(3, 40, 300),
    "tall": torch.randn(2, 200, 64),
    "polar": orthogonalize(torch.randn(2, 96, 96), dtype="float32"),
    "rank two": torch.randn(2, 50, 2) @ torch.randn(2, 2, 70),
    "one column": torch.randn(4, 30, 1),
}


@pytest.mark.parametrize("kind", MATRICES)
def test_power_iteration_gives_the_largest_singular_value(kind: str) -> None:
    X = MATRICES[kind]
    exact = torch.linalg.svdvals(X)[:, 0]
    found = largest_singular_values(X)
    assert (found <= exact * (1 + 1e-4)).all()
    torch.testing.assert_close(found, exact, rtol=0.02, atol=0)


def test_zeros_have_norm_0_and_what_is_not_finite_has_none() -> None:
    assert largest_singular_values(torch.zeros(2, 3, 4)).tolist() == [0, 0]
    assert largest_singular_values(torch.full((1, 3, 4), math.inf)).isnan().all()


def assignment(parameter: Tensor, role: Role, matrices: MatrixSpec | None) -> RoleAssignment:
    return RoleAssignment(
        name="w", parameter=parameter, aliases=("w",), role=role, matrices=matrices, why=""
    )


def test_norms_are_of_logical_matrices_and_relative_to_their_sides() -> None:
    fused = torch.randn(24, 36)  # (in, out) of three stacked matrices, as GPT-2 stores them
    layout = MatrixSpec(transposed=True, splits=(12, 12, 12))
    found = parameter_norms(fused, assignment(fused, Role.HIDDEN, layout))
    expected = [torch.linalg.svdvals(part)[0] / math.sqrt(12 / 24) for part in fused.T.split(12)]
    torch.testing.assert_close(torch.cat(found), torch.stack(expected), rtol=0.02, atol=0)
    stack = torch.randn(5, 10, 40)
    (found,) = parameter_norms(stack, assignment(stack, Role.HIDDEN, MatrixSpec()))
    torch.testing.assert_close(found, torch.linalg.svdvals(stack)[:, 0] * 2, rtol=0.02, atol=0)


def test_tables_and_vectors_have_a_root_mean_square() -> None:
    for role, tensor in ((Role.EMBEDDING, torch.randn(50, 8)), (Role.NORM, torch.randn(9))):
        (found,) = parameter_norms(tensor, assignment(tensor, role, MatrixSpec()))
        assert float(found) == pytest.approx(float(tensor.double().square().mean().sqrt()))


class Net(nn.Module):
    """An embedding, two layers of one linear map, a norm and a head."""

    def __init__(self, width: int, std: float) -> None:
        super().__init__()
        self.table = nn.Embedding(11, width)
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 11, bias=False)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=std)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


IDS = torch.arange(11)[None]


def probe_of(net: Net) -> CoordinateProbe:
    def forward() -> dict[tuple[str, str], Tensor]:
        return {("logits", "logits"): net(IDS)}

    return CoordinateProbe(net, forward, final_norm="norm")


def root_mean_square(x: Tensor) -> float:
    return float(x.detach().double().square().mean().sqrt())


def test_outputs_and_their_changes_are_those_computed_by_hand() -> None:
    net = Net(8, std=0.3)
    probe = probe_of(net)
    first = probe.measure()
    x = net.table(IDS)
    before = [x, *(x := layer(x) for layer in net.layers)]
    assert first[Coordinate("size", "embedding", "table")] == pytest.approx(
        root_mean_square(before[0])
    )
    both = torch.stack(before[1:])
    assert first[Coordinate("size", "hidden", "layers.*")] == pytest.approx(root_mean_square(both))
    assert first[Coordinate("size", RESIDUAL, "norm")] == pytest.approx(
        root_mean_square(before[-1])
    )
    assert {key.quantity for key in first} == {"size", "weight"}
    with torch.no_grad():
        net.layers[1].weight.add_(0.1)
    second = probe.measure()
    y = net.table(IDS)
    after = [y := layer(y) for layer in net.layers]
    assert second[Coordinate("change", "hidden", "layers.*")] == pytest.approx(
        root_mean_square(torch.stack(after) - both)
    )
    assert second[Coordinate("change", "embedding", "table")] == 0
    # 0.1 everywhere has spectral norm 0.1 * 8; one of two layers has it
    assert second[Coordinate("update", "hidden", "layers.*.weight")] == pytest.approx(
        0.8 / math.sqrt(2), rel=1e-4
    )


def test_changes_are_since_the_first_time_and_updates_since_the_last() -> None:
    net = Net(8, std=0.3)
    probe = probe_of(net)
    probe.measure()
    with torch.no_grad():
        for _ in range(2):
            net.table.weight.add_(1.0)
            found = probe.measure()
    assert found[Coordinate("change", "embedding", "table")] == pytest.approx(2)
    assert found[Coordinate("update", "embedding", "table.weight")] == pytest.approx(1)


@pytest.mark.parametrize(
    ("quantity", "name", "std", "slope"),
    [
        # Sums of `width` random terms: their root. Two layers of it are dominated by the second.
        ("size", "layers.*", lambda width: 1.0, 1.0),
        ("size", "layers.*", lambda width: width**-0.5, 0.0),
        ("weight", "layers.*.weight", lambda width: 1.0, 0.5),
        ("weight", "layers.*.weight", lambda width: width**-0.5, 0.0),
    ],
)
def test_a_linear_net_has_the_slopes_of_its_weights(
    quantity: str, name: str, std: Callable[[int], float], slope: float
) -> None:
    widths = (64, 512)
    found = []
    for width in widths:
        torch.manual_seed(1)
        coordinates = probe_of(Net(width, std(width))).measure()
        found.append(coordinates[Coordinate(quantity, "hidden", name)])  # type: ignore[arg-type]
    assert math.log(found[1] / found[0]) / math.log(8) == pytest.approx(slope, abs=0.06)


def test_measuring_leaves_weights_gradients_and_random_numbers_alone() -> None:
    net = Net(8, std=0.3)
    before = {name: p.clone() for name, p in net.named_parameters()}
    state = torch.random.get_rng_state()
    probe = probe_of(net)
    probe.measure()
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())


def test_a_final_norm_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"'model\.norm'"):
        CoordinateProbe(Net(8, 1.0), dict, final_norm="model.norm")


def gpt2(width: int) -> nn.Module:
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    shape = {"n_layer": 1, "n_positions": 16, "n_head": width // 8, "vocab_size": 32}
    return AutoModelForCausalLM.from_config(GPT2Config(n_embd=width, **shape, **ends))


def test_what_was_folded_is_divided_out_again() -> None:
    model, base = gpt2(32), gpt2(8)
    transfer = parametrize(model, base, parameter_groups(model, lr=1.0))
    assert transfer.rows["transformer.ln_f.weight"].fold == 1 / 4  # logits of a tied head
    assert transfer.rows["transformer.wte.weight"].fold == 1
    assert transfer.as_dict()["rows"][0]["fold"] == 1
    probe = CoordinateProbe(model, dict, transfer=transfer, final_norm="transformer.ln_f")
    model(torch.arange(8)[None])
    probe._forward = lambda: model(torch.arange(8)[None]) and {}
    probe.measure()
    with torch.no_grad():
        model.get_parameter("transformer.ln_f.weight").add_(0.5)
    found = probe.measure()
    assert found[Coordinate("update", "norm", "transformer.ln_f.weight")] == pytest.approx(2)


def test_the_output_of_a_folded_projection_is_that_of_the_model_with_the_factor() -> None:
    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.head_dim, self.scaling = width, width**-0.5
            self.q_proj = nn.Linear(width, width, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x)

    def build(width: int) -> nn.Module:
        return nn.Sequential(Attention(width), nn.LayerNorm(width))

    model, base = build(64), build(16)
    constants = ForwardConstants(final_norm="1")
    groups = parameter_groups(model, lr=1.0)
    transfer = parametrize(model, base, groups, constants=constants)
    assert transfer.rows["0.q_proj.weight"].fold == pytest.approx(1 / 2)
    x = torch.randn(4, 64)
    sizes = {}
    for name, given in (("with", transfer), ("without", None)):
        probe = CoordinateProbe(model, lambda: (model(x), {})[1], transfer=given, final_norm="1")
        sizes[name] = probe.measure()[Coordinate("size", "hidden", "*.q_proj")]
    assert sizes["with"] == pytest.approx(2 * sizes["without"])
