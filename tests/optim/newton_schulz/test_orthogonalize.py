from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz import orthogonalize as module
from muonscale.optim.newton_schulz.coefficients import (
    SCHEDULES,
    Coefficients,
    resolve,
)
from muonscale.optim.newton_schulz.orthogonalize import exact_polar, ns_dtype, orthogonalize
from muonscale.optim.rules.reference import newton_schulz

SHAPES = [(16, 16), (24, 8), (8, 24), (1, 7), (7, 1), (1, 1), (2, 40)]


def matrix(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def distance(X: Tensor, Y: Tensor) -> float:
    return float((X.double() - Y.double()).norm() / Y.double().norm())


@pytest.mark.parametrize("shape", SHAPES)
def test_it_equals_the_slow_version(shape: tuple[int, int]) -> None:
    G = matrix(*shape)
    expected = newton_schulz(G, list(resolve("jordan", 5).triples))
    assert distance(orthogonalize(G, dtype=torch.float32), expected) < 1e-5
    assert distance(orthogonalize(G.double()), expected) < 1e-12


@pytest.mark.parametrize("shape", [(16, 16), (24, 8), (8, 24)])
def test_singular_vectors_are_kept_and_values_mapped(shape: tuple[int, int]) -> None:
    G = matrix(*shape, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(G / G.norm(), full_matrices=False)
    for a, b, c in resolve("jordan", 5).triples:
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
    run = module._prepare

    def counted(X: Tensor, *rest: Any) -> tuple[Tensor, bool]:
        lengths.append(len(X))
        return run(X, *rest)

    monkeypatch.setattr(module, "_prepare", counted)
    per_matrix = (2 * 8 * 24 + 4 * 8 * 8) * ns_dtype("cpu").itemsize
    capped = orthogonalize(G, workspace_bytes=3 * per_matrix)
    assert sum(lengths) == 10
    assert max(lengths) <= 3
    torch.testing.assert_close(capped, looped, rtol=0, atol=2e-5)


def test_the_cap_bounds_what_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    G = matrix(40, 32, 32)
    cap = 5 * (2 + 4) * 32 * 32 * 4
    held: list[Tensor] = []
    make = module.empty_squares

    def kept(*arguments: Any) -> Tensor:
        held.append(make(*arguments))
        return held[-1]

    monkeypatch.setattr(module, "empty_squares", kept)
    orthogonalize(G, workspace_bytes=cap)
    assert len(held) <= 4 * torch.get_num_threads()
    # Besides four Gram matrices there is one spare matrix, as large as each of them here.
    assert cap / 2 < sum(square.nbytes for square in held) * 5 / 4 <= cap


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("shape", [(3, 16, 16), (3, 40, 16), (16, 40), (300, 290)])
def test_both_forms_are_the_same_polynomial(name: str, shape: tuple[int, ...]) -> None:
    G = matrix(*shape, dtype=torch.float64)
    steps = max(5, SCHEDULES[name].least_steps)
    direct = orthogonalize(G, name, steps, "direct")
    for restarts in (None, (), (2,), (1, 3)):
        coefficients = replace(resolve(name, steps), restarts=restarts)
        # Rounding is magnified by the square of the slope of a segment, most without a restart.
        tolerance = 1e-12 if restarts != () else 1e-11
        assert distance(orthogonalize(G, coefficients, steps, "gram"), direct) < tolerance


def test_the_forms_agree_to_fourteen_digits() -> None:
    G = matrix(4, 64, 160, dtype=torch.float64)
    direct, gram_form = (orthogonalize(G, form=form) for form in ("direct", "gram"))
    assert 0 < distance(gram_form, direct) < 2e-14


@pytest.mark.parametrize("name", ["jordan", "you5", "polar_express", "aol_flash"])
@pytest.mark.parametrize("decay", [0.0, 1.0, 2.0, 6.0])
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_float32_is_near_float64_whatever_the_spectrum(name: str, decay: float, form: str) -> None:
    U, V = (torch.linalg.qr(matrix(n, 96, dtype=torch.float64, seed=n)).Q for n in (96, 256))
    rank = torch.arange(1, 97, dtype=torch.float64)
    spectrum = rank**-decay if decay < 3 else torch.logspace(0, -decay, 96, dtype=torch.float64)
    G = U @ torch.diag(spectrum) @ V.T
    expected = orthogonalize(G, name, 5, "direct")
    # The last one is for the rounding of G itself; the worst are at 3e-5.
    assert distance(orthogonalize(G, name, 5, form, torch.float32), expected) < 1e-4


def test_without_a_restart_float32_is_not_enough_for_decaying_spectra() -> None:
    U, V = (torch.linalg.qr(matrix(n, 96, dtype=torch.float64, seed=n)).Q for n in (96, 256))
    G = U @ torch.diag(torch.arange(1, 97, dtype=torch.float64) ** -2) @ V.T
    expected = orthogonalize(G, form="direct")
    restarts = {
        given: orthogonalize(
            G, replace(resolve("jordan", 5), restarts=given), 5, "gram", torch.float32
        )
        for given in (None, ())
    }
    assert distance(restarts[()], expected) > 10 * distance(restarts[None], expected)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("form", ["direct", "gram"])
@pytest.mark.parametrize("exponent", [-100, 100])
def test_length_does_not_matter_to_any_normalization(name: str, form: str, exponent: int) -> None:
    """By powers of two, which round nothing: steep sets make much of the last bit of their input."""
    G = matrix(2, 8, 24)
    steps = max(5, SCHEDULES[name].least_steps)
    unit = orthogonalize(G, name, steps, form)
    assert distance(orthogonalize(G * 2.0**exponent, name, steps, form), unit) < 1e-5
    assert torch.equal(orthogonalize(G * 0, name, steps, form), torch.zeros_like(G))


@pytest.mark.parametrize("shape", [(8, 24), (24, 8)])
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_a_normalization_is_what_it_says(shape: tuple[int, int], form: str) -> None:
    G = matrix(*shape, dtype=torch.float64)
    wide = G if shape[0] < shape[1] else G.T
    A = wide @ wide.T
    divided = {
        ("frobenius", 1.0): wide / wide.norm(),
        ("frobenius", 1.25): wide / (1.25 * wide.norm()),
        ("schatten4", 1.0): wide / torch.linalg.svdvals(wide).pow(4).sum().pow(0.25),
        ("aol", 1.0): wide / A.abs().sum(1, keepdim=True).sqrt(),
    }
    triples = resolve("you5", 5).triples
    for (kind, margin), X in divided.items():
        for a, b, c in triples:
            X = a * X + b * X @ X.T @ X + c * X @ X.T @ X @ X.T @ X
        given = Coefficients(triples=triples, normalization=kind, margin=margin)  # type: ignore[arg-type]
        found = orthogonalize(G, given, 5, form)
        assert distance(found if shape[0] < shape[1] else found.T, X) < 1e-13, (kind, margin)


@pytest.mark.parametrize("kind", ["frobenius", "schatten4", "aol"])
def test_no_normalization_leaves_a_singular_value_above_one(kind: str) -> None:
    for G in (matrix(8, 24), torch.ones(4, 6), torch.eye(5), matrix(24, 8, seed=3)):
        # One step of p(s) = s: what comes out is the normalised matrix.
        given = Coefficients(triples=((1.0, 0.0, 0.0),), normalization=kind)  # type: ignore[arg-type]
        assert torch.linalg.svdvals(orthogonalize(G.double(), given, 1)).max() < 1 + 1e-12


def test_a_zero_row_stays_zero_under_aol() -> None:
    G = matrix(6, 20)
    G[2] = 0
    P = orthogonalize(G, "aol_flash", 4)
    assert torch.equal(P[2], torch.zeros(20))
    assert P.isfinite().all()


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_zero_rows_and_columns_leave_the_rest_alone(form: str) -> None:
    G = matrix(12, 30)
    padded = torch.zeros(20, 44)
    padded[:12, :30] = G
    P = orthogonalize(padded, form=form)
    assert distance(P[:12, :30], orthogonalize(G, form=form)) < 1e-5
    P[:12, :30] = 0
    assert torch.equal(P, torch.zeros_like(P))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["jordan", "polar_express", "aol_flash", "you5+schatten4"])
@pytest.mark.parametrize("form", ["direct", "gram"])
def test_16_bits_are_near_the_rest(dtype: torch.dtype, name: str, form: str) -> None:
    G = matrix(32, 80) * 1e-9
    expected = orthogonalize(G.double(), name, 5)
    close = {torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    assert distance(orthogonalize(G, name, 5, form, dtype), expected) < close


def test_the_spectrum_after_five_jordan_steps_is_in_its_range() -> None:
    # A Gaussian 64 x 160 has no singular value below 0.01 of its norm.
    values = torch.linalg.svdvals(orthogonalize(matrix(3, 64, 160), dtype=torch.float32))
    assert values.min() > 0.6818 - 1e-4
    assert values.max() < 1.1344 + 1e-4
    # Hence an update RMS below 0.2 at Moonlight's factor, and not far below.
    rms = 0.2 * (values.square().mean()).sqrt()
    assert 0.15 < rms < 0.2


@pytest.mark.parametrize("form", ["direct", "gram"])
def test_strides_do_not_matter(form: str) -> None:
    G = matrix(30, 24, 3)
    views = [G.permute(2, 0, 1), G.permute(2, 1, 0), G[::2, :, 0], G.flip(0)[:, :, 1]]
    for view in views:
        assert torch.equal(
            orthogonalize(view, form=form), orthogonalize(view.contiguous(), form=form)
        )
    image = matrix(1, 4, 6, 8).to(memory_format=torch.channels_last)
    assert torch.equal(orthogonalize(image), orthogonalize(image.contiguous()))


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
