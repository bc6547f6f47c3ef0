"""The Triton kernel: in Triton's interpreter on a CPU, compiled for a GPU, and refused by name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from muonscale import Muon
from muonscale.errors import ConfigError
from muonscale.optim.newton_schulz.flops import ns_flops
from muonscale.optim.newton_schulz.kernels import LARGEST_SIDE, symmetric_product
from muonscale.optim.newton_schulz.orthogonalize import orthogonalize
from tests.optim.newton_schulz import triton_cases

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from muonscale.optim.newton_schulz.kernels.triton import CONTRACTED_TILE, TILE, symmetric_kernel
for dtype in ("bf16", "fp16"):
    for bias in (False, True):
        signature = {name: "i32" for name in symmetric_kernel.arg_names}
        signature |= {name: f"*{dtype}" for name in ("out", "left", "right", "bias")}
        signature |= {"beta": "fp32", "alpha": "fp32"}
        constants = {"HAS_BIAS": bias, "TILE": TILE, "CONTRACTED_TILE": CONTRACTED_TILE}
        constants["WIDEN"] = False
        signature |= {name: "constexpr" for name in constants}
        source = triton.compiler.ASTSource(symmetric_kernel, signature, constants)
        made = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        assert "mma" in made.asm["ptx"], "no tensor cores"
        print(len(made.asm["cubin"]))
"""


def in_process(*arguments: str, **variables: str) -> str:
    """Run Python in a process of its own: the interpreter is chosen when Triton is imported."""
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environ = {**kept, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p), **variables}
    done = subprocess.run(
        [sys.executable, *arguments], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def interpreted() -> dict[str, dict[str, Any]]:
    return json.loads(in_process(triton_cases.__file__, TRITON_INTERPRET="1"))


@needs_triton
def test_products_agree_with_float64_and_are_symmetric(interpreted: dict[str, Any]) -> None:
    products = interpreted["products"]
    assert len(products) == 2 * len(triton_cases.SIZES) * 6 + 1
    assert {k: v for k, v in products.items() if not (v["excess"] <= 1 and v["symmetric"])} == {}


@needs_triton
def test_newton_schulz_is_as_accurate_as_with_mirrored_products(
    interpreted: dict[str, Any],
) -> None:
    for name, errors in interpreted["polar"].items():
        # Mirroring rounds both halves alike. In the Gram form that alone can cost several times the
        # error of torch's products, so the kernel is compared with these mirrored.
        assert errors["triton"] < 1.5 * errors["mirrored"] + 1e-3, (name, errors)
        assert errors["triton"] < 0.05 and errors["size"] > 0.5, (name, errors)


@needs_triton
@pytest.mark.slow
def test_it_compiles_for_a_gpu_with_tensor_cores(tmp_path: Any) -> None:
    path = tmp_path / "compile_kernel.py"
    path.write_text(COMPILE)
    sizes = in_process(str(path), TRITON_CACHE_DIR=str(tmp_path / "cache")).split()
    assert len(sizes) == 4 and min(map(int, sizes)) > 1000


@pytest.mark.parametrize(
    ("dtype", "side", "named"),
    [
        (torch.float32, 8, "float32"),
        (torch.float64, 8, "float64"),
        (torch.bfloat16, LARGEST_SIDE + 1, str(LARGEST_SIDE)),
        (torch.bfloat16, 8, "cpu"),
    ],
)
@needs_triton
def test_it_refuses_what_it_cannot_multiply(dtype: torch.dtype, side: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        symmetric_product(side, dtype, "cpu", "triton")


def test_it_refuses_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install triton"):
        orthogonalize(torch.eye(3), dtype="bfloat16", kernel="triton")


def test_it_counts_half_of_the_symmetric_products() -> None:
    options = {"dtype": torch.bfloat16, "device": "cuda", "form": "direct"}
    plain = ns_flops((1024, 1024), **options)
    assert 0.66 < ns_flops((1024, 1024), kernel="triton", **options) / plain < 0.72


def test_stats_name_the_kernel() -> None:
    W = torch.nn.Parameter(torch.eye(3))
    assert Muon([W]).stats()["ns_kernel"] == "torch"
    with pytest.raises(ConfigError, match="ns_kernel"):
        Muon([W], ns_kernel="tritn")
