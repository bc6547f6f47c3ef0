"""A bare `nn.Parameter` is what its module's code does with it, and AdamW's where that is not known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonscale.errors import GroupingError
from muonscale.optim.matrices.spec import MatrixSpec
from muonscale.optim.muon import Muon
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.parameter_use import Use, UseKind, parameter_use
from muonscale.optim.parameters.report import grouping_report
from muonscale.optim.parameters.roles import Role, RoleAssignment, assign_roles

PLAIN, TRANSPOSED = MatrixSpec(), MatrixSpec(transposed=True)


def roles_of(model: nn.Module) -> dict[str, RoleAssignment]:
    return {a.name: a for a in assign_roles(model)}


class Expression(nn.Module):
    """Holds `w` and uses it as the subclass's `forward` says."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(*shape))
        self.scale = 2.0
        self.layer = nn.Identity()


class Linear(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class Right(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w


class RightOfTranspose(Expression):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.w.to(x.dtype).transpose(-1, -2)
        return torch.matmul(x, weight)


class Left(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return (self.w @ x.mT).mT


class Scaled(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * self.scale)


class Batch(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w)


class OneOfStack(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([F.linear(part, self.w[i]) for i, part in enumerate(x)])


class Heads(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bh,hnd->bnd", x, self.w).flatten(1)


class Back(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bnd,hnd->bh", x.unflatten(1, self.w.shape[1:]), self.w)


class Grouped(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("gbi,goi->gbo", x, self.w)


class ByMethod(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return self.project(x, self.w)

    def project(self, x: Tensor, weight: Tensor) -> Tensor:
        return x.matmul(weight)


class Chosen(Expression):
    def forward(this, x: Tensor) -> Tensor:
        return F.embedding(x, this.w)


class Indexed(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return self.w[x]


class Token(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.w.expand(len(x), -1, -1), x], dim=1)


class Fed(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(self.w[None] + x)


class Given(Expression):
    def forward(self, batch: int) -> Tensor:
        return self.w.expand(batch, -1, -1)


class Gain(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.w


class Decay(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return x * -torch.exp(self.w.float())


class Kernel(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return F.conv1d(x, self.w.unsqueeze(1), groups=len(self.w))


class Unknown(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return torch.linalg.solve(self.w, x)


class Moved(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.w.reshape(4, 4)


class Contradiction(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w) @ self.w


class Unused(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("kind", "shape", "given", "matrices"),
    [
        (Linear, (6, 4), (3, 4), PLAIN),
        (Right, (4, 6), (3, 4), TRANSPOSED),
        (RightOfTranspose, (6, 4), (3, 4), PLAIN),
        (Left, (6, 4), (3, 4), PLAIN),
        (Scaled, (6, 4), (3, 4), PLAIN),
        (Batch, (5, 4, 6), (5, 3, 4), TRANSPOSED),
        (OneOfStack, (5, 6, 4), (5, 3, 4), PLAIN),
        (Heads, (4, 2, 3), (3, 4), MatrixSpec(flattened=True, transposed=True)),
        (Back, (4, 2, 3), (3, 6), MatrixSpec(flattened=True)),
        (Grouped, (5, 6, 4), (5, 3, 4), PLAIN),
        (ByMethod, (4, 6), (3, 4), TRANSPOSED),
    ],
)
def test_a_matrix_is_stored_as_its_gradient_says(
    kind: type[Expression], shape: tuple, given: tuple, matrices: MatrixSpec
) -> None:
    """The gradient of one sample has rank 1, with the sample along `in`: that is the oracle."""
    from muonscale.optim.matrices.spec import view

    module = kind(*shape)
    use = parameter_use(module, "w", module.w.ndim)
    assert use is not None and (use.kind, use.matrices) == (UseKind.MATRIX, matrices)
    x = torch.zeros(given)
    x[..., 0, :] = torch.randn(given[-1])  # one sample for each matrix
    module(x).mul(torch.randn_like(module(x))).sum().backward()
    for batch in view(module.w.grad, matrices):
        for matrix in batch:
            sample = x[..., 0, :].reshape(-1, given[-1])
            cosine = F.cosine_similarity(matrix, sample[:1].expand_as(matrix), dim=1).abs()
            assert torch.allclose(cosine, torch.ones(len(matrix)), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        (Chosen, (9, 4), UseKind.TABLE),
        (Indexed, (9, 4), UseKind.TABLE),
        (Token, (2, 4), UseKind.TABLE),
        (Given, (2, 4), UseKind.TABLE),
        (Fed, (2, 4), UseKind.ELEMENTWISE),
        (Gain, (2, 4), UseKind.ELEMENTWISE),
        (Decay, (2, 4), UseKind.ELEMENTWISE),
        (Kernel, (6, 3), UseKind.KERNEL),
    ],
)
def test_tables_gains_and_kernels_are_read_from_the_code(
    kind: type[Expression], shape: tuple, expected: UseKind
) -> None:
    use = parameter_use(kind(*shape), "w", len(shape))
    assert isinstance(use, Use) and use.kind == expected
    groups = parameter_groups(nn.Sequential(nn.Linear(4, 4), kind(*shape)))
    rows = {row.name: row for row in grouping_report(groups).rows}
    assert (rows["1.w"].rule, rows["1.w"].guessed) == ("adamw", False)


@pytest.mark.parametrize(
    ("kind", "shape"),
    [(Unknown, (4, 4)), (Moved, (2, 8)), (Contradiction, (4, 4)), (Unused, (4, 4))],
)
def test_a_doubtful_use_is_on_adamw_and_said(kind: type[Expression], shape: tuple) -> None:
    model = nn.Sequential(nn.Linear(4, 4), kind(*shape), nn.LayerNorm(4))
    assert parameter_use(model[1], "w", len(shape)) is None
    with pytest.warns(UserWarning, match=r"1 parameter is a guess of 5: 1\.w"):
        groups = parameter_groups(model)
    row = next(row for row in grouping_report(groups).rows if row.name == "1.w")
    assert (row.role, row.rule, row.guessed) == ("unknown", "adamw", True)
    report = grouping_report(Muon(groups, lr=0.1), model)
    assert "guessed: 1 parameter, first 1.w on adamw" in report.summary()
    assert report.as_dict()["guessed"] == ["1.w"]
    with pytest.raises(GroupingError, match=r"1\.w"):
        parameter_groups(model, strict=True)


@pytest.mark.parametrize(
    ("options", "rule"),
    [({"rule": "muon"}, "muon"), ({"rule": "adamw"}, "adamw"), ({"role": "hidden"}, "muon")],
)
def test_an_override_ends_a_guess(options: dict, rule: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), Unknown(4, 4))
    groups = parameter_groups(model, strict=True, overrides={"1.w": options})
    row = next(row for row in grouping_report(groups).rows if row.name == "1.w")
    assert (row.rule, row.guessed) == (rule, False)


def test_another_option_leaves_a_guess_a_guess() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Unknown(4, 4))
    with pytest.raises(GroupingError, match=r"1\.w"):
        parameter_groups(model, strict=True, overrides={"1.w": {"lr": 0.1}})


def test_code_without_its_source_is_a_guess() -> None:
    space: dict = {"nn": nn, "torch": torch}
    exec(
        "class Typed(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.w = nn.Parameter(torch.zeros(4, 4))\n"
        "    def forward(self, x):\n"
        "        return x @ self.w\n",
        space,
    )
    found = roles_of(space["Typed"]())
    assert (found["w"].role, found["w"].guessed) == (Role.UNKNOWN, True)


def test_a_linear_of_ones_own_is_known_by_the_features_it_declares() -> None:
    class Quantized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_features, self.out_features = 4, 6
            self.weight = nn.Parameter(torch.zeros(6, 4))

    found = roles_of(nn.Sequential(Quantized(), nn.LayerNorm(6)))
    assert (found["0.weight"].role, found["0.weight"].guessed) == (Role.HIDDEN, False)


class Experts(nn.Module):
    """As dense mixtures of experts and per-head attention write them."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(5, 4, 6))
        self.down = nn.Parameter(torch.randn(5, 6, 4))
        self.query = nn.Parameter(torch.randn(2, 4, 3))
        self.output = nn.Parameter(torch.randn(2, 3, 4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.einsum("td,edh->teh", x, self.up).relu()
        x = torch.einsum("teh,ehd->ted", hidden, self.down).mean(1)
        heads = torch.einsum("... d, h d k -> ... h k", x, self.query)
        return torch.einsum("thk,hkd->td", heads, self.output)


def test_stacks_in_einsum_are_a_matrix_for_each_expert_and_head() -> None:
    model = nn.Sequential(Experts(), nn.LayerNorm(4))
    found = roles_of(model)
    for name in ("up", "down", "query", "output"):
        assert (found[f"0.{name}"].role, found[f"0.{name}"].matrices) == (Role.HIDDEN, TRANSPOSED)


class Masked(Expression):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.register_buffer("mask", torch.ones(shape))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * self.mask)


class Squashed(Expression):
    def forward(self, x: Tensor) -> Tensor:
        return x @ torch.tanh(self.w)


class Merged(Expression):
    def __init__(self, *shape: int) -> None:
        super().__init__(*shape)
        self.a = nn.Parameter(torch.zeros(2, shape[1]))
        self.b = nn.Parameter(torch.zeros(shape[0], 2))

    def forward(self, x: Tensor) -> Tensor:
        weight: Tensor = self.w + self.b @ self.a * self.scale
        return F.linear(x, weight)


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ws = nn.ParameterList([torch.randn(4, 6), torch.randn(6, 4)])
        self.named = nn.ParameterDict({"gain": torch.ones(3, 4)})

    def forward(self, x: Tensor) -> Tensor:
        for w in self.ws:
            x = x @ w
        return x * self.named["gain"]


@pytest.mark.parametrize(
    ("kind", "matrices"), [(Masked, PLAIN), (Squashed, TRANSPOSED), (Merged, PLAIN)]
)
def test_a_weight_that_is_changed_before_its_product_is_a_matrix(
    kind: type[Expression], matrices: MatrixSpec
) -> None:
    found = roles_of(nn.Sequential(kind(4, 4), nn.LayerNorm(4)))["0.w"]
    assert (found.role, found.matrices, found.guessed) == (Role.HIDDEN, matrices, False)


def test_listed_parameters_are_read_where_the_list_is_used() -> None:
    found = roles_of(nn.Sequential(Listed(), nn.LayerNorm(4)))
    for name in ("0.ws.0", "0.ws.1"):
        assert (found[name].role, found[name].matrices) == (Role.HIDDEN, TRANSPOSED)
    assert found["0.named.gain"].role == Role.NORM


def test_methods_that_set_values_are_no_use() -> None:
    class Initialized(Right):
        def _reset_parameters(self) -> None:
            nn.init.xavier_uniform_(self.w)
            self.w.data.copy_(self.w * 2)

        def regularization(self) -> Tensor:
            return self.w.norm()

    found = roles_of(nn.Sequential(Initialized(4, 6), nn.LayerNorm(6)))["0.w"]
    assert (found.role, found.matrices) == (Role.HIDDEN, TRANSPOSED)
