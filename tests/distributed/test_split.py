"""Matrices that several ranks share, for every rule, against one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from muonscale.optim.distributed import rank_group as domain
from muonscale.optim.distributed.assignment import assign_owners
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.newton_schulz.orthogonalize import orthogonalize, orthogonalize_part
from muonscale.optim.newton_schulz.subgroup import Subgroup, divided_axis, part_of
from muonscale.optim.rules import MUON
from tests.distributed.layouts import gathered, make, mesh_of, placed, reference, rows, whole


def train(
    row_name: str, subgroup_size: int, options: dict[str, Any]
) -> tuple[dict[str, Tensor], int]:
    """Train with teams of a size, forced by sending that costs nothing; count what they share."""
    row = next(row for row in rows(torch.distributed.get_world_size()) if row.name == row_name)
    place = placed(row, mesh_of(row))
    parameters, optimizer = make(place, **options)
    domain.assign_owners = functools.partial(
        assign_owners, subgroup_size=subgroup_size, subgroup_flops_per_byte=0
    )
    try:
        for seed in (1, 2):
            for name, parameter in parameters.items():
                parameter.grad = place(name, whole(name, seed))
            optimizer.step()
        (made,) = optimizer._context.rank_groups(optimizer.param_groups, MUON)
    finally:
        domain.assign_owners = assign_owners
    shared = {(t.parameter, t.matrix) for t in made.assignment.tasks if t.split is not None}
    return gathered(parameters), len(shared)


OPTIONS: dict[str, dict[str, Any]] = {
    "muon": {},
    "pre_norm": {"pre_norm": "row_col"},
    "aurora": {"pre_norm": "aurora"},
    "adamuon": {"pre_norm": "sign", "second_moment": "update"},
    "row_col": {"post_norm": "row_col"},
    "col_row": {"post_norm": "col_row"},
    "normuon": {"post_norm": "normuon"},
    "frobenius": {"post_norm": "frobenius"},
    "rms_exact": {"scale": "rms_exact"},
    "schatten4": {"ns_coefficients": "cans+schatten4"},
    "direct": {"ns_form": "direct"},
    "gram": {"ns_form": "gram"},
}


HSDP_RULES = ("adamuon", "pre_norm", "row_col", "normuon")
"""Those of the fast tests whose sums over rows and columns cross a mesh of two axes."""


@pytest.mark.parametrize(
    ("size", "team", "row", "rule"),
    [
        *((2, 2, "fsdp", rule) for rule in OPTIONS),
        *((4, 2, "hsdp", rule) for rule in HSDP_RULES),
        *(
            pytest.param(4, 2, "hsdp", rule, marks=pytest.mark.slow)
            for rule in OPTIONS
            if rule not in HSDP_RULES
        ),
    ],
)
def test_a_shared_matrix_is_updated_as_by_one_process(world, size, team, row, rule) -> None:
    expected = reference(2, **OPTIONS[rule])
    for result, shared in world(size).run(train, row, team, OPTIONS[rule]):
        assert shared > 5
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=5e-5)


TABLE = [(4, 4, "fsdp_tensor"), (4, 2, "experts_fsdp")]
TABLE += [
    pytest.param(size, size, row.name, marks=pytest.mark.slow)
    for size in (3, 4)
    for row in rows(size)
]


@pytest.mark.parametrize(("size", "team", "row"), TABLE)
def test_it_is_so_in_every_layout(world, size, team, row) -> None:
    expected = reference(2, post_norm="normuon")
    for result, shared in world(size).run(train, row, team, {"post_norm": "normuon"}):
        assert shared > 3
        for name, tensor in expected.items():
            torch.testing.assert_close(result[name], tensor, rtol=1e-4, atol=5e-5)


def parts(shape: tuple[int, int], segments: tuple[int, ...], divided: bool, dtype: str) -> float:
    """Return how far a team's parts are from the whole, relative to it."""
    size, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    generator = torch.Generator().manual_seed(0)
    X_NMK = torch.randn(3, *shape, generator=generator) * 1e-20
    axis = 1 if divided_axis(shape) == "rows" else 2
    start, stop = part_of(X_NMK.shape[axis], rank, size)
    group = torch.distributed.group.WORLD
    assert group is not None
    team = Subgroup(group, rank, size, divided)
    coefficients = resolve("jordan", 5)
    mine = orthogonalize_part(
        X_NMK.narrow(axis, start, stop - start), shape, team, coefficients, segments, dtype
    )
    wide = orthogonalize(X_NMK.double(), "jordan", 5, "direct")
    expected = wide.narrow(axis, start, stop - start)
    return float((mine.double() - expected).norm() / expected.norm()) if mine.numel() else 0.0


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-4), ("bfloat16", 0.1)])
@pytest.mark.parametrize("divided", [False, True])
@pytest.mark.parametrize("segments", [(1,) * 5, (3, 2)])
@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (17, 19), (5, 9)])
def test_parts_are_those_of_the_polar_factor(world, shape, segments, divided, dtype, most) -> None:
    for distance in world(3).run(parts, shape, segments, divided, dtype):
        assert distance < most
