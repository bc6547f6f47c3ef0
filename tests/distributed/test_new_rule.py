"""A post-normalisation made up here: what one process does with it, every layout does too."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muonscale import Muon
from muonscale.optim.distributed.zero1 import gather
from muonscale.optim.rules.post_norm import POST_NORMS, PostNorm, PostNormContext
from tests.distributed.layouts import SHAPES, gathered, make, mesh_of, placed, rows, whole

STEPS = 3


def _resist(
    O_NMK: Tensor, V_NM1: Tensor | None, context: PostNormContext
) -> tuple[Tensor, Tensor | None]:
    """`V <- V + sum_j O_ij^2`, `P = O / sqrt(1 + V)`, then columns about 0, at the length of O."""
    assert V_NM1 is not None
    reducer = context.reducer
    V_NM1 = V_NM1 + reducer.sum_cols(O_NMK.square())
    P_NMK = O_NMK / (1 + V_NM1).sqrt()
    P_NMK = P_NMK - 0.1 * reducer.sum_rows(P_NMK) / context.shape[0]
    before, after = reducer.sum_all(O_NMK.square()), reducer.sum_all(P_NMK.square())
    return P_NMK * (before / (after + context.eps)).sqrt(), V_NM1


@contextmanager
def installed() -> Generator[None]:
    POST_NORMS["resist"] = PostNorm(apply=_resist, last=None, row_state=True, source="this test")
    try:
        yield
    finally:
        del POST_NORMS["resist"]


Result = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Parameters and row states."""


def row_states(optimizer: Muon) -> dict[str, Tensor]:
    group = optimizer.param_groups[0]
    pairs = zip(group["param_names"], group["params"], strict=True)
    return {name: optimizer.state[p]["row_second_moment"] for name, p in pairs}


def stay(name: str, tensor: Tensor) -> Tensor:
    return tensor


def train(row_name: str, post_norm: str | None) -> Result:
    """Train with a layout of the table, "replicated", or "alone"."""
    place = stay
    group = dist.group.WORLD if row_name == "replicated" else None
    if row_name not in ("replicated", "alone"):
        row = next(row for row in rows(dist.get_world_size()) if row.name == row_name)
        place = placed(row, mesh_of(row))
    with installed():
        parameters, optimizer = make(place, post_norm=post_norm, process_group=group)
        for seed in range(1, STEPS + 1):
            for name, parameter in parameters.items():
                parameter.grad = place(name, whole(name, seed))
            optimizer.step()
        if post_norm is None:
            return gathered(parameters), {}
        states = {name: gather(state, group) for name, state in row_states(optimizer).items()}
    return gathered(parameters), states


TABLE = [(size, row.name) for size in (1, 2, 3, 4) for row in rows(size)]
TABLE += [(size, "replicated") for size in (2, 3, 4)]


@pytest.fixture(scope="module")
def expected() -> Result:
    return train("alone", "resist")


FAST = {
    *((2, row.name) for row in rows(2)),
    *((3, "columns"), (3, "replicated"), (4, "hsdp"), (4, "fsdp_tensor"), (4, "experts_fsdp")),
}
"""Every row of the table; the slow tests have all numbers of processes."""


@pytest.mark.parametrize(
    ("size", "row"),
    [
        pytest.param(
            size,
            row,
            id=f"{row}-{size}",
            marks=() if (size, row) in FAST else pytest.mark.slow,
        )
        for size, row in TABLE
    ],
)
def test_a_rule_of_ones_own_works_in_every_layout(world, expected, size, row) -> None:
    for parameters, states in world(size).run(train, row, "resist"):
        for name, tensor in expected[0].items():
            torch.testing.assert_close(parameters[name], tensor, rtol=1e-4, atol=2e-5)
        assert states.keys() == expected[1].keys() == SHAPES.keys()
        for name, tensor in expected[1].items():
            torch.testing.assert_close(states[name], tensor, rtol=1e-4, atol=2e-5)


def test_the_rule_does_on_one_process_what_it_says(expected) -> None:
    """Two steps of one matrix, from the polar factors that Muon without the rule applies."""
    updates, rule_updates = [], []
    for post_norm, found in ((None, updates), ("resist", rule_updates)):
        with installed():
            W = torch.nn.Parameter(torch.zeros(16, 24))
            options = {"ns_dtype": "float32", "weight_decay": 0.0, "scale": "none"}
            optimizer = Muon([W], lr=1.0, post_norm=post_norm, **options)
            for seed in (1, 2):
                before = W.detach().clone()
                W.grad = whole("plain", seed)
                optimizer.step()
                found.append(before - W.detach())
    V = torch.zeros(16, 1)
    for O, U in zip(updates, rule_updates, strict=True):  # noqa: E741
        V += O.square().sum(1, keepdim=True)
        P = O / (1 + V).sqrt()
        P -= 0.1 * P.mean(0, keepdim=True)
        torch.testing.assert_close(U, P * (O.norm() / P.norm()), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected[0]["plain"], train("alone", None)[0]["plain"], atol=1e-3)
