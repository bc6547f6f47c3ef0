"""MuonBP: blocks on most steps, whole matrices on every `block_period`-th, and what is sent."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from muonscale.optim.distributed.assignment import traffic
from muonscale.optim.matrices.spec import view
from muonscale.optim.rules import MUON
from muonscale.optim.rules.reference import newton_schulz
from tests.distributed.layouts import (
    SHAPES,
    TOLERANCES,
    gathered,
    make,
    mesh_of,
    placed,
    reference,
    rows,
    whole,
)
from tests.optim.compare import JORDAN

LR, DECAY, MU = 0.1, 0.1, 0.95


def train(row_name: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    """Return parameters, the numbers of the elements on this rank, and bytes sent and stated."""
    row = next(row for row in rows(torch.distributed.get_world_size()) if row.name == row_name)
    place = placed(row, mesh_of(row))
    parameters, optimizer = make(place, **options)
    sent = []
    for seed in range(1, steps + 1):
        for name, parameter in parameters.items():
            parameter.grad = place(name, whole(name, seed))
        optimizer.step()
        (domain,) = optimizer._context.rank_groups(optimizer.param_groups, MUON)
        sent.append(domain.log.bytes_sent)
    here = domain.assignment.ranks.index(torch.distributed.get_rank())
    values = traffic(domain.assignment)
    numbers = {
        name: place(name, torch.arange(math.prod(shape)).view(shape)).to_local()
        for name, (shape, _) in SHAPES.items()
    }
    stated = 4 * values.sent(here)
    return {
        "parameters": gathered(parameters), "numbers": numbers, "sent": sent, "stated": stated
    }  # fmt: skip


def blocks(name: str, numbers: list[Tensor]) -> list[Tensor]:
    """Return `[rows, columns]` of element numbers, for what each rank holds of each matrix."""
    shape, spec = SHAPES[name]
    matrices = [m for part in view(torch.arange(math.prod(shape)).view(shape), spec) for m in part]
    found = {}
    for matrix in matrices:
        for local in numbers:
            here = torch.isin(matrix, local)
            block = matrix[here.any(1)][:, here.any(0)]
            assert here.sum() == block.numel()
            found[tuple(block.flatten().tolist())] = block  # replicas have the same
    return [block for block in found.values() if block.numel()]


def expected(name: str, numbers: list[Tensor], steps: int, period: int) -> Tensor:
    """Return a parameter in float64 from the formula, with blocks given as element numbers."""
    shape, _ = SHAPES[name]
    W, M = whole(name, 0).double().flatten(), torch.zeros(math.prod(shape)).double()
    every = [torch.arange(math.prod(shape)).view(shape)]
    for t in range(steps):
        G = whole(name, t + 1).double().flatten()
        M = MU * M + (1 - MU) * G
        N, U = MU * M + (1 - MU) * G, torch.zeros_like(M)
        for block in blocks(name, every if t % period == 0 else numbers):
            O_MK = newton_schulz(N[block], JORDAN)
            U[block] = 0.2 * math.sqrt(max(block.shape)) * O_MK
        W = (1 - LR * DECAY) * W - LR * U
    return W.view(shape)


@pytest.mark.parametrize(
    ("size", "row"),
    [
        *((2, row.name) for row in rows(2)),
        *((4, row) for row in ("hsdp", "fsdp_tensor", "experts_fsdp")),
        *(pytest.param(3, row.name, marks=pytest.mark.slow) for row in rows(3)),
        *(pytest.param(4, row.name, marks=pytest.mark.slow) for row in rows(4)[:4]),
    ],
)
def test_blocks_are_orthogonalized_as_matrices_of_their_own(world, size, row) -> None:
    results = world(size).run(train, row, 4, {"block_period": 3})
    plain = reference(4)
    changed = 0
    for name in SHAPES:
        numbers = [result["numbers"][name] for result in results]
        tensor = expected(name, numbers, 4, 3).float()
        for result in results:
            torch.testing.assert_close(result["parameters"][name], tensor, **TOLERANCES)
        changed += not torch.allclose(tensor, plain[name], atol=1e-3)
    assert changed > 5 or row == "experts"  # there every matrix is whole on its ranks


def test_nothing_is_sent_in_steps_on_blocks(world) -> None:
    for result in world(2).run(train, "fsdp", 7, {"block_period": 3}):
        each = result["stated"]
        assert result["sent"] == [each, each, each, 2 * each, 2 * each, 2 * each, 3 * each]


@pytest.mark.parametrize("constraint", ["weight_norm", "row_magnitude"])
def test_a_constraint_holds_for_whole_matrices_on_blocks_too(world, constraint) -> None:
    results = world(2).run(train, "tensor", 3, {"block_period": 2, "constraint": constraint})
    for result in results:
        for name, (_, spec) in SHAPES.items():
            W = result["parameters"][name]
            assert torch.equal(W, results[0]["parameters"][name]), name
            if constraint == "weight_norm":
                for new, old in zip(view(W, spec), view(whole(name, 0), spec), strict=True):
                    torch.testing.assert_close(new.norm(dim=(1, 2)), old.norm(dim=(1, 2)))


def test_one_process_and_replicas_have_no_blocks(world) -> None:
    plain = reference(3)
    for options in ({"block_period": 2}, {"block_period": 1}):
        for name, tensor in reference(3, **options).items():
            assert torch.equal(tensor, plain[name])
    for result in world(2).run(train, "experts", 3, {"block_period": 2}):
        for name in ("plain", "tall", "experts"):  # replicated, or stacks of whole matrices
            torch.testing.assert_close(result["parameters"][name], plain[name], **TOLERANCES)
