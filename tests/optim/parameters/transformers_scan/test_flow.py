"""The data flow itself, on a few lines of modeling code."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from tests.optim.parameters.transformers_scan.findings import Findings
from tests.optim.parameters.transformers_scan.flow import scan
from tests.optim.parameters.transformers_scan.source import parse


def flow(init: str, forward: str, more: str = "", dedent: bool = True) -> Findings:
    """Scan a module with these statements in its methods, and with `more` after it."""
    code = "\n".join(
        [
            "class Layer(nn.Module):",
            "    def __init__(self, d):",
            *textwrap.indent(textwrap.dedent(init), " " * 8).splitlines(),
            "    def forward(self, x, index=None):",
            *textwrap.indent(textwrap.dedent(forward), " " * 8).splitlines(),
            textwrap.dedent(more) if dedent else more,
        ]
    )
    return scan([parse(Path("models/new/modeling_new.py"), code)])


QKV = "self.qkv = nn.Linear(d, 3 * d)"


@pytest.mark.parametrize(
    "forward",
    [
        "q, k, v = self.qkv(x).chunk(3, dim=-1)",
        "q, k, v = torch.split(self.qkv(x), [4, 4, 4], dim=2)",
        "q, k, v = self.qkv(x).reshape(len(x), -1, 3, self.heads, 8).permute(2, 0, 3, 1, 4)",
        "q = self.qkv(x)[..., :8]",
        "y = self.qkv(x).transpose(1, 2)\ny = F.silu(self.conv1d(y))\nB, C, x = y.chunk(3, dim=-2)",
        "y = self.qkv(x)\nif index:\n    y = y.float()\na, b = torch.unbind(y.view(*s, 2, -1), 2)",
        "y = self.qkv(x).view(len(x), -1, self.heads, 24)\nq, k, v = y.chunk(3, dim=-1)",
        "x = F.glu(self.qkv(x), dim=-1)",
        "v = self.qkv(x).view((*shape, -1, 8)).transpose(1, 2)\na, b = torch.chunk(v, 2, dim=1)",
        "q, k, v = (t.contiguous() for t in self.qkv(x).chunk(3, -1))",
    ],
)
def test_a_piece_of_the_features_is_a_cut(forward: str) -> None:
    assert set(flow(QKV, forward).cut_keys()) == {("Layer", "qkv")}


@pytest.mark.parametrize(
    "forward",
    [
        "return self.qkv(x)[:, 0]",
        "return self.qkv(x)[:, -1, :]",
        "first, rest = self.qkv(x).split([1, 8], dim=1)",
        "y = self.qkv(x).view(batch, length, self.heads, 8)\nreturn y.transpose(1, 2)[:, :, -1]",
        "y = self.qkv(self.qkv(x).softmax(-1) @ x)\nreturn y.mean(1)",
        "y = x + self.qkv(x)[:, :8]",
        "return x.chunk(2, dim=-1)",
    ],
)
def test_a_piece_of_the_sequence_is_none(forward: str) -> None:
    assert flow(QKV, forward).cuts == []


def test_a_method_that_is_given_an_output_may_cut_it() -> None:
    method = """
        def weigh(self, y):
            a, b = y.chunk(2, -1)
            return a * b
    """
    found = flow(
        QKV,
        "return self.weigh(self.qkv(x))",
        textwrap.indent(textwrap.dedent(method), "    "),
        False,
    )
    assert set(found.cut_keys()) == {("Layer", "qkv")}


def test_a_cut_around_a_module_names_the_place_of_the_layer() -> None:
    wrapper = """
    class Block(nn.Module):
        def __init__(self, d):
            self.inner = Layer(d)
        def forward(self, x):
            return self.inner(x).chunk(2, -1)
    """
    found = flow(QKV, "return self.qkv(x)", wrapper)
    assert set(found.cut_keys()) == {("Block", "inner.qkv")}


def test_a_cut_in_a_base_class_is_reported_once() -> None:
    found = flow(QKV, "return self.qkv(x).chunk(3, -1)", "class Other(Layer):\n    pass")
    assert set(found.cut_keys()) == {("Layer", "qkv")}


@pytest.mark.parametrize(
    ("forward", "kind"),
    [
        ("return x @ self.w", "matrix_right"),
        ("return torch.baddbmm(x, x, self.w)", "matrix_right"),
        ("return self.w @ x", "matrix_left"),
        ("return F.linear(x, self.w)", "linear"),
        ("return torch.einsum('bi,io->bo', x, self.w)", "einsum"),
        ("return F.embedding(index, self.w)", "lookup"),
        ("return F.conv1d(x, self.w.unsqueeze(1), groups=4)", "kernel"),
        ("return x + self.w[None]", "elementwise"),
        ("w = self.w.float()\nreturn x * w", "elementwise"),
        ("return torch.cat([self.w.expand(3, -1, -1), x], 1)", "table"),
    ],
)
def test_the_use_of_a_bare_parameter(forward: str, kind: str) -> None:
    found = flow("self.w = nn.Parameter(torch.empty(4, 8))", forward)
    assert {use.kind for use in found.uses} == {kind}
    assert set(found.parameters) == {("Layer", "w")}


def test_a_parameter_is_followed_into_a_function_that_is_given_the_module() -> None:
    function = "def attend(module, x):\n    return x + module.w[None, :, None]"
    found = flow("self.w = nn.Parameter(torch.empty(4, 8))", "return attend(self, x)", function)
    assert [use.kind for use in found.use_keys()["Layer", "w"]] == ["elementwise"]


def test_what_a_product_with_a_parameter_gives_may_be_cut() -> None:
    experts = "self.gate_up_proj = nn.Parameter(torch.empty(2, 4, 8))"
    found = flow(experts, "return torch.bmm(x, self.gate_up_proj).chunk(2, dim=-1)")
    assert set(found.cut_keys()) == {("Layer", "gate_up_proj")}
