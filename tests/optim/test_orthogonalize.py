from __future__ import annotations

import pytest
import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim import orthogonalize as module
from muonscale.optim.coefficients import resolve_triples
from muonscale.optim.orthogonalize import exact_polar, ns_dtype, ns_flops, orthogonalize
from muonscale.optim.reference import newton_schulz

SHAPES = [(16, 16), (24, 8), (8, 24), (1, 7), (7, 1), (1, 1), (2, 40)]


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def distance(X: Tensor, Y: Tensor) -> float:
    return float((X.double() - Y.double()).norm() / Y.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_slow_version(shape: tuple[int, int]) -> None:
    G = matrix(*shape)
    expected = newton_schulz(G, list(resolve_triples("jordan", 5)))
    assert distance(orthogonalize(G, dtype=torch.float32), expected) < 1e-5
    assert distance(orthogonalize(G.double()), expected) < 1e-12


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_singular_vectors_are_kept_and_values_mapped(shape: tuple[int, int]) -> None:
    G = matrix(*shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G / G.norm(), full_matrices=False)
    for a, b, c in resolve_triples("jordan", 5):
        S = a * S + b * S**3 + c * S**5
    assert distance(orthogonalize(G), U @ torch.diag(S) @ Vh) < 1e-12


def test_a_convergent_polynomial_reaches_the_exact_polar_factor() -> None:
    G = matrix(12, 20, dtype=torch.float64)
    P = orthogonalize(G, (15 / 8, -10 / 8, 3 / 8), steps=30)
    assert distance(P, exact_polar(G)) < 1e-10


def test_steps_of_a_schedule_differ() -> None:
    G = matrix(6, 9, dtype=torch.float64)
    triples = [(3.4445, -4.7750, 2.0315), (1.5, -0.5, 0.0)]
    expected = newton_schulz(G, triples)
    assert distance(orthogonalize(G, triples, steps=2), expected) < 1e-12


@pytest.mark.parametrize("shape", [(24, 8), (16, 16)])
def test_the_transpose_gives_the_transpose(shape: tuple[int, int]) -> None:
    G = matrix(*shape)
    assert distance(orthogonalize(G.T), orthogonalize(G).T) < 1e-5


def test_the_transposes_layout_does_not_matter() -> None:
    G = matrix(24, 8)
    assert torch.equal(orthogonalize(G.T), orthogonalize(G.T.contiguous()))


@pytest.mark.parametrize("exponent", [-30, -20, -9, 9, 20, 30])
def test_length_does_not_matter(exponent: int) -> None:
    G = matrix(8, 24)
    unit = G / G.norm()
    assert distance(orthogonalize(unit * 10.0**exponent), orthogonalize(unit)) < 1e-5


def test_a_zero_matrix_gives_zero_beside_others() -> None:
    G = torch.stack([matrix(4, 6), torch.zeros(4, 6), matrix(4, 6, seed=1)])
    P = orthogonalize(G)
    assert torch.equal(P[1], torch.zeros_like(P[1]))
    assert P[0].norm() > 1


def test_a_nonfinite_matrix_spoils_no_other() -> None:
    G = matrix(3, 4, 6)
    expected = orthogonalize(G)
    G[1, 2, 3] = float("nan")
    P = orthogonalize(G)
    assert P[1].isnan().all()
    assert torch.equal(P[::2], expected[::2])


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_a_batch_equals_a_loop_and_the_cap_changes_nothing(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    G = matrix(2, 5, *shape)
    looped = torch.stack([orthogonalize(g) for g in G.view(10, *shape)]).view_as(G)
    torch.testing.assert_close(orthogonalize(G), looped, rtol=0, atol=2e-5)
    lengths: list[int] = []
    run = module._newton_schulz
    monkeypatch.setattr(
        module, "_newton_schulz", lambda X, t: (lengths.append(len(X)), run(X, t))[1]
    )
    per_matrix = (2 * 8 * 24 + 2 * 8 * 8) * ns_dtype("cpu").itemsize
    capped = orthogonalize(G, workspace_bytes=3 * per_matrix)
    assert lengths == [3, 3, 3, 1]
    torch.testing.assert_close(capped, looped, rtol=0, atol=2e-5)


def test_the_input_is_not_written_to() -> None:
    for G in (matrix(4, 6), matrix(6, 4), matrix(4, 6, dtype=torch.bfloat16)):
        before = G.clone()
        P = orthogonalize(G)
        assert torch.equal(G, before)
        assert P.data_ptr() != G.data_ptr()


def test_empty_batches_and_matrices_pass_through() -> None:
    for shape in [(0, 4, 6), (3, 0, 6), (0, 5)]:
        assert orthogonalize(torch.zeros(shape)).shape == shape


def test_bf16_is_used_when_asked_for() -> None:
    G = matrix(16, 32)
    P = orthogonalize(G, dtype=torch.bfloat16)
    assert P.dtype == torch.bfloat16
    assert distance(P, orthogonalize(G, dtype=torch.float32)) < 0.1


@pytest.mark.parametrize(
    ("onednn", "avx512_bf16", "amx", "expected"),
    [
        (True, True, False, torch.bfloat16),
        (True, False, True, torch.bfloat16),
        (True, False, False, torch.float32),
        (False, True, True, torch.float32),
    ],
)
def test_auto_is_bf16_only_where_the_cpu_has_its_instructions(
    onednn: bool,
    avx512_bf16: bool,
    amx: bool,
    expected: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(module, "_fast_bf16", lambda *_: module._cpu_has_bf16_products())
    assert ns_dtype("cpu") == expected
    assert orthogonalize(matrix(4, 4)).dtype == expected
    assert orthogonalize(matrix(4, 4).double()).dtype == torch.float64


def test_an_unknown_dtype_and_a_vector_are_refused() -> None:
    with pytest.raises(ConfigError, match="auto"):
        orthogonalize(matrix(4, 4), dtype="fast")
    assert orthogonalize(matrix(4, 4), dtype="bfloat16").dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="no matrix"):
        orthogonalize(torch.zeros(4))


def test_flops_count_the_products() -> None:
    # X X^T and B X: 2*S*S*L each; A A: 2*S*S*S
    assert ns_flops((8, 24), 5) == ns_flops((24, 8), 5) == 5 * (4 * 64 * 24 + 2 * 512)
    assert ns_flops((3, 8, 24), 1) == 3 * ns_flops((8, 24), 1)


def test_the_exact_polar_factor_is_orthogonal_and_nearest() -> None:
    G = matrix(5, 9)
    P = exact_polar(G)
    torch.testing.assert_close(P @ P.T, torch.eye(5, dtype=torch.float64))
    # O^T G is the positive semidefinite factor
    assert torch.linalg.eigvalsh(P @ G.double().T).min() > 0


def test_the_exact_polar_factor_leaves_the_null_space_alone() -> None:
    G = matrix(6, 2, dtype=torch.float64) @ matrix(2, 8, seed=1, dtype=torch.float64)
    values = torch.linalg.svdvals(exact_polar(G))
    expected = torch.tensor([1.0, 1.0, 0, 0, 0, 0], dtype=torch.float64)
    torch.testing.assert_close(values, expected)
    assert torch.equal(exact_polar(torch.zeros(3, 4)), torch.zeros(3, 4, dtype=torch.float64))
