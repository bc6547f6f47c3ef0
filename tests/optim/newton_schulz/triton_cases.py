"""What `test_triton` runs in Triton's interpreter, in a process of its own: prints JSON."""

from __future__ import annotations

import json
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from muonscale.optim.newton_schulz import orthogonalize as ns
from muonscale.optim.newton_schulz.kernels import symmetric_product
from muonscale.optim.newton_schulz.kernels.torch import product_

SIZES = ((2, 5, 3), (1, 16, 16), (3, 64, 32), (1, 65, 200), (2, 130, 31), (1, 200, 70))
"""N, S and K: below a tile, whole tiles, odd, and two to four tiles."""


def excess(found: Tensor, terms: list[Tensor]) -> float:
    """Return the largest error of an element in units of what rounding allows.

    The interpreter truncates to bfloat16, so an element may be off by eps of itself. Sums are in
    float32: they may be off by far less than eps of the sum of magnitudes, `terms[1]`.
    """
    expected, magnitudes = terms
    allowed = torch.finfo(found.dtype).eps * expected.abs() + 1e-5 * magnitudes + 1e-6
    return float(((found.double() - expected).abs() / allowed).max())


def product_cases() -> dict[str, dict[str, float | bool]]:
    """Return the error and the symmetry of products of all sizes, dtypes and layouts."""
    cases = {}
    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        for count, side, contracted in SIZES:
            X = torch.randn(count, side, contracted).to(dtype)
            padded = torch.full((count, 2 * side, contracted + 3), torch.nan, dtype=dtype)
            strided = padded[:, ::2, :contracted].copy_(X)
            tall = X.mT.contiguous()
            bias = torch.randn(count, side, side)
            bias = (bias + bias.mT).to(dtype)
            for name, left in (("whole", X), ("strided", strided), ("tall", tall.mT)):
                for beta in (0.0, -2.5):
                    wide = X.double()
                    expected, magnitudes = wide @ wide.mT, wide.abs() @ wide.mT.abs()
                    out = torch.full((count, side, side + 8), torch.nan, dtype=dtype)[..., :side]
                    product, _ = symmetric_product(side, dtype, "cpu", "triton")
                    if beta:
                        product(out, left, left.mT, bias=bias, beta=beta, alpha=0.5)
                        expected = 0.5 * expected + beta * bias.double()
                        magnitudes = magnitudes + (beta * bias.double()).abs()
                    else:
                        product(out, left, left.mT)
                    cases[f"{out.dtype} {tuple(X.shape)} {name} {beta}"] = {
                        "excess": excess(out, [expected, magnitudes]),
                        "symmetric": torch.equal(out, out.mT),
                    }
    # What is below the diagonal is never taken, even in a tile on it.
    X, Y = torch.randn(2, 1, 70, 70).half()
    out = torch.empty_like(X)
    symmetric_product(70, X.dtype, "cpu", "triton")[0](out, X, Y)
    upper, magnitudes = (X.double() @ Y.double()).triu(), X.double().abs() @ Y.double().abs()
    terms = [upper + upper.triu(1).mT, torch.maximum(magnitudes, magnitudes.mT)]
    cases["not symmetric"] = {"excess": excess(out, terms), "symmetric": torch.equal(out, out.mT)}
    return cases


plain = ns.symmetric_product


def mirrored(*args: Any) -> tuple[Any, int]:
    """Return torch's product with its upper triangle mirrored."""

    def product(out: Tensor, left: Tensor, right: Tensor, **options: Any) -> None:
        product_(out, left, right, **options)
        out.copy_(out.triu() + out.triu(1).mT)

    return product, plain(*args)[1]


def polar_cases() -> dict[str, dict[str, float]]:
    """Return the errors of whole Newton-Schulz against float64, with Triton and with torch."""
    cases = {}
    for form, coefficients in (("direct", "jordan"), ("gram", "gram_ns")):
        for shape in ((2, 24, 70), (90, 33), (1, 72, 72)):
            X = torch.randn(shape)
            truth = ns.orthogonalize(X.double(), coefficients, form="direct")
            errors = {"size": float(truth.norm() / ns.exact_polar(X).norm())}
            for name in ("torch", "mirrored", "triton"):
                kernel = "triton" if name == "triton" else "torch"
                with patch.object(
                    ns, "symmetric_product", mirrored if name == "mirrored" else plain
                ):
                    polar = ns.orthogonalize(X, coefficients, 5, form, "float16", kernel=kernel)
                errors[name] = float((polar.double() - truth).norm() / truth.norm())
            cases[f"{form} {shape}"] = errors
    return cases


if __name__ == "__main__":
    print(json.dumps({"products": product_cases(), "polar": polar_cases()}))
