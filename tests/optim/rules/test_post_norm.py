from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon
from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.orthogonalize import exact_polar
from muonscale.optim.presets import PRESETS, preset
from muonscale.optim.rules.post_norm import LOCAL, POST_NORMS, PostNormContext, resolve_post_norm
from muonscale.optim.rules.scale import shape_factor

SHAPES = [(8, 32), (32, 8), (16, 16)]


def applied(name: str, O_NMK: Tensor, V_NM1: Tensor | None = None, eps: float = 1e-8) -> Tensor:
    context = PostNormContext(shape=tuple(O_NMK.shape[1:]), eps=eps, beta2=0.95, reducer=LOCAL)
    if name == "normuon" and V_NM1 is None:
        V_NM1 = torch.zeros(*O_NMK.shape[:2], 1, dtype=O_NMK.dtype)
    return POST_NORMS[name].apply(O_NMK, V_NM1, context)[0]


def polar(shape: tuple[int, int]) -> Tensor:
    torch.manual_seed(0)
    return exact_polar(torch.randn(3, *shape))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "dim"), [("row", -1), ("col_row", -1), ("col", -2), ("row_col", -2)]
)
def test_what_comes_last_has_unit_length(name: str, dim: int, shape) -> None:
    lengths = applied(name, polar(shape)).norm(dim=dim)
    torch.testing.assert_close(lengths, torch.ones_like(lengths), rtol=1e-5, atol=1e-5)


def test_two_way_names_say_the_order() -> None:
    O_NMK = polar((8, 32)) * torch.rand(3, 8, 32)
    assert torch.equal(applied("row_col", O_NMK), applied("col", applied("row", O_NMK)))
    assert torch.equal(applied("col_row", O_NMK), applied("row", applied("col", O_NMK)))
    assert not torch.allclose(applied("row_col", O_NMK), applied("col_row", O_NMK), rtol=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", [None, *POST_NORMS])
def test_rms_scale_reaches_its_target_for_every_shape(name: str | None, shape) -> None:
    norm = resolve_post_norm(name)
    U_NMK = polar(shape) if name is None else applied(name, polar(shape))
    factor = shape_factor("rms", shape, 0.2, None if norm is None else norm.last)
    rms = (factor * U_NMK).square().mean((-2, -1)).sqrt()
    assert rms.tolist() == pytest.approx([0.2] * 3, rel=1e-5)


def test_the_factor_for_max_would_double_the_step_of_an_oblong_matrix() -> None:
    """What Muon+ after Moonlight's factor would do: the reason for `last`."""
    wide = applied("col", polar((8, 32)))
    rms = (shape_factor("rms", (8, 32), 0.2) * wide).square().mean().sqrt()
    assert float(rms) == pytest.approx(0.4, rel=1e-4)


@pytest.mark.parametrize("name", POST_NORMS)
def test_a_zero_matrix_stays_zero(name: str) -> None:
    assert torch.equal(applied(name, torch.zeros(1, 4, 4)), torch.zeros(1, 4, 4))


@pytest.mark.parametrize("name", ["row", "col", "row_col", "col_row", "frobenius"])
def test_eps_keeps_what_is_nearly_zero_nearly_zero(name: str) -> None:
    tiny = torch.full((1, 4, 4), 1e-14, dtype=torch.float64)
    assert applied(name, tiny, eps=1e-8).abs().max() < 1e-5
    assert applied(name, tiny, eps=0.0).abs().max() > 0.1


def test_eps_is_within_the_root() -> None:
    O_NMK = torch.tensor([[[3.0, 4.0]]])
    expected = torch.tensor([[[3.0, 4.0]]]) / math.sqrt(25 + 11)
    torch.testing.assert_close(applied("row", O_NMK, eps=11.0), expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_snap_and_the_row_norm_are_different_things(shape) -> None:
    O_NMK = polar(shape) * 0.7
    snapped = applied("frobenius", O_NMK)
    assert snapped.norm(dim=(-2, -1)).tolist() == pytest.approx([math.sqrt(min(shape))] * 3)
    torch.testing.assert_close(snapped, O_NMK / 0.7, rtol=1e-6, atol=1e-6)  # balance untouched


@pytest.mark.parametrize("shape", SHAPES)
def test_normuon_keeps_the_length_and_levels_rows_over_time(shape) -> None:
    torch.manual_seed(0)
    O_NMK = polar(shape) * torch.linspace(0.2, 2.0, shape[0], dtype=torch.float64).unsqueeze(1)
    V_NM1 = torch.zeros(3, shape[0], 1, dtype=torch.float64)
    context = PostNormContext(shape=shape, eps=0.0, beta2=0.7, reducer=LOCAL)
    U_NMK = O_NMK
    for _ in range(4):
        U_NMK, V_NM1 = POST_NORMS["normuon"].apply(O_NMK, V_NM1, context)
        torch.testing.assert_close(U_NMK.norm(dim=(-2, -1)), O_NMK.norm(dim=(-2, -1)))
    rows = U_NMK.norm(dim=-1)
    torch.testing.assert_close(rows, rows.mean(-1, keepdim=True).expand_as(rows))
    expected = (1 - 0.7**4) * O_NMK.square().mean(-1, keepdim=True)
    torch.testing.assert_close(V_NM1, expected)


class Halves:
    """Sums of matrices cut in two along the columns, as two processes would form them."""

    def __init__(self, other_NMK: Tensor) -> None:
        self.other_NMK = other_NMK
        self.partner: list[Tensor] = []

    def sum_rows(self, X_NMK: Tensor) -> Tensor:
        return LOCAL.sum_rows(X_NMK)  # columns are whole

    def sum_cols(self, X_NMK: Tensor) -> Tensor:
        self.partner.append(LOCAL.sum_cols(X_NMK))
        return LOCAL.sum_cols(X_NMK) + self.other_NMK

    def sum_all(self, X_NMK: Tensor) -> Tensor:
        raise AssertionError("rows need no sum of everything")


def test_a_rule_sees_split_matrices_through_its_reducer() -> None:
    O_NMK = polar((8, 32))
    left, right = O_NMK.split(16, dim=2)
    reducer = Halves(right.square().sum(-1, keepdim=True))
    context = PostNormContext(shape=(8, 32), eps=1e-8, beta2=0.95, reducer=reducer)
    found, _ = POST_NORMS["row"].apply(left, None, context)
    torch.testing.assert_close(found, applied("row", O_NMK)[:, :, :16])
    assert len(reducer.partner) == 1


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="col_row"):
        resolve_post_norm("colrow")


def test_the_repository_recipe_is_what_its_code_does() -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.zeros(6, 24))
    G = torch.randn(6, 24)
    W.grad = G
    Muon(
        [W], lr=1.0, ns_dtype="float64", **(preset("muon_plus_repo") | {"post_norm": "row"})
    ).step()
    X = G.double()  # one step from zero: Nesterov does not change the direction
    X = X / X.norm()
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    X = X / torch.sqrt(X.square().sum(1, keepdim=True) + 1e-7)
    torch.testing.assert_close(W.detach().double(), -math.sqrt(6 / 24) * X, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_steps(name: str) -> None:
    W = nn.Parameter(torch.ones(4, 6))
    W.grad = torch.randn(4, 6)
    Muon([W], lr=0.1, **preset(name)).step()
    assert W.isfinite().all()
    assert not torch.equal(W.detach(), torch.ones(4, 6))


def test_presets_are_copies_and_moonlight_is_the_default() -> None:
    preset("keller")["scale"] = "none"
    assert preset("keller")["scale"] == "keller"
    defaults = Muon([nn.Parameter(torch.zeros(2, 2))]).defaults
    assert {key: defaults[key] for key in preset("moonlight")} == preset("moonlight")
    with pytest.raises(ConfigError, match="moonlight"):
        preset("moonlite")
