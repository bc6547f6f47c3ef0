from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from muonscale.lab.estimate.memory import (
    RankMemory,
    gathered_bytes,
    parameter_bytes,
    state_bytes,
    step_bytes,
    unreduced_bytes,
)
from muonscale.lab.estimate.resolve import ResolvedPlan
from muonscale.lab.models.build import build_model
from muonscale.lab.training.setup import build_optimizer
from tests.lab.estimate.build import planned, small_mixture
from tests.peak import peak_bytes

MUON = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def shapes(seen: ResolvedPlan) -> dict[str, tuple[int, ...]]:
    return {name: tuple(p.shape) for name, p in seen.model.named_parameters()}


def chunk_rows(shape: tuple[int, ...], ranks: int, rank: int) -> int:
    """Return the elements that torch.chunk gives a rank."""
    parts = torch.empty(shape, device="meta").chunk(ranks)
    return parts[rank].numel() if rank < len(parts) else 0


@pytest.mark.parametrize("ranks", [2, 3])
def test_shards_are_those_of_torch_padded_to_the_largest(ranks: int) -> None:
    seen = planned(f"fsdp={ranks}")
    largest = sum(chunk_rows(shape, ranks, 0) for shape in shapes(seen).values())
    for rank in range(ranks):
        assert parameter_bytes(seen.placement, rank) == 4 * largest
        assert parameter_bytes(seen.placement, rank) == 4 * largest
        state = {True: 0, False: 0}
        for name, shape in shapes(seen).items():
            on_muon = any(part in name for part in MUON)
            own = chunk_rows(shape, ranks, rank)
            state[on_muon] += own * (4 if on_muon else 8)
        assert state_bytes(seen.placement, rank) == state


@pytest.mark.parametrize(
    "option",
    [
        "post_norm=normuon",
        "second_moment=gradient",
        "second_moment=update",
        "constraint=row_magnitude",
        "row_fraction=0.5",
    ],
)
def test_state_is_that_of_the_real_optimizer(option: str) -> None:
    seen = planned("fsdp=1", f"optimizer.{option}")
    model = build_model(seen.shape, seed=0)
    optimizer = build_optimizer(model, seen.config.optimizer)
    held = sum(v.nbytes for state in optimizer.state.values() for v in state.values() if v.ndim)
    assert sum(state_bytes(seen.placement, 0).values()) == held


@pytest.mark.parametrize(
    "option",
    [
        "pre_norm=null",
        "pre_norm=aurora",
        "second_moment=update",
        "constraint=weight_norm",
        "constraint=row_magnitude",
    ],
)
def test_what_a_step_takes_on_one_process_is_near_what_it_does_take(option: str) -> None:
    words = ("optimizer.ns_dtype=float32", f"optimizer.{option}")
    seen = planned("fsdp=1", *words, target="llama-nano", device="cpu")
    model = build_model(seen.shape, seed=0)
    optimizer = build_optimizer(model, seen.config.optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    stated = step_bytes(seen.placement, "cpu", 0)
    assert 0.75 < stated / peak_bytes(optimizer.step) < 1.5


@pytest.mark.parametrize(("option", "each"), [("null", 4), ("gradient", 8), ("update", 8)])
def test_state_under_data_parallelism_is_partitioned_once(option: str, each: int) -> None:
    seen = planned("ddp=3", f"optimizer.second_moment={option}")
    sizes = {name: math.prod(shape) for name, shape in shapes(seen).items()}
    on_muon = sum(n for name, n in sizes.items() if any(part in name for part in MUON))
    states = [state_bytes(seen.placement, rank) for rank in range(3)]
    assert sum(state[True] for state in states) == each * on_muon
    assert sum(state[False] for state in states) == 8 * (sum(sizes.values()) - on_muon)
    assert parameter_bytes(seen.placement, 2) == 4 * sum(sizes.values())


def test_magnitudes_of_rows_are_on_every_rank_that_has_a_part_of_the_row() -> None:
    rows = {n: s[0] for n, s in shapes(planned("ddp=2")).items() if any(p in n for p in MUON)}
    for layout, divided in (("ddp=2", ()), ("fsdp=2", MUON), ("tp=2", MUON[:3] + MUON[4:6])):
        plain = planned(layout)
        seen = planned(layout, "optimizer.constraint=row_magnitude")
        more = sum(
            state_bytes(seen.placement, rank)[True] - state_bytes(plain.placement, rank)[True]
            for rank in range(2)
        )
        times = {n: 1 if any(part in n for part in divided) else 2 for n in rows}
        assert more == 4 * 4 * sum(times[n] * count for n, count in rows.items())


def test_tensor_parallelism_divides_matrices_and_not_norms() -> None:
    seen = planned("tp=2")
    expected = 0
    for name, shape in shapes(seen).items():
        expected += math.prod(shape) // (1 if "norm" in name else 2)
    assert parameter_bytes(seen.placement, 0) == parameter_bytes(seen.placement, 1) == 4 * expected
    assert gathered_bytes(seen.placement, seen.workload, 0) == 0


def test_two_layers_and_what_is_outside_them_are_gathered() -> None:
    seen = planned("fsdp=2", "train.precision=bfloat16")
    layer = sum(math.prod(s) for name, s in shapes(seen).items() if ".layers.0." in name)
    outside = sum(math.prod(s) for name, s in shapes(seen).items() if ".layers." not in name)
    assert gathered_bytes(seen.placement, seen.workload, 0) == 2 * (2 * layer + outside)
    assert unreduced_bytes(seen.placement, seen.workload) == 2 * 2 * max(layer, outside)


def test_autocast_copies_the_weights_of_a_process_alone() -> None:
    seen = planned("fsdp=1", "train.precision=bfloat16")
    assert gathered_bytes(seen.placement, seen.workload, 0) == 2 * seen.placement.elements


def test_partitioned_experts_are_neither_held_nor_gathered_elsewhere(tmp_path: Path) -> None:
    target = small_mixture(tmp_path)
    alone, dealt = planned("fsdp=4", target=target), planned("fsdp=4,ep=4", target=target)
    stacks = {n: s for n, s in shapes(alone).items() if ".experts." in n}
    of_a_layer = sum(math.prod(s) for n, s in stacks.items() if ".layers.1." in n)
    fewer = gathered_bytes(alone.placement, alone.workload, 0) - gathered_bytes(
        dealt.placement, dealt.workload, 0
    )
    # two layers in flight, of each three quarters of the experts
    assert fewer == 4 * 2 * of_a_layer * 3 // 4
    assert parameter_bytes(dealt.placement, 3) == parameter_bytes(alone.placement, 3)


def memory_of(**parts: object) -> RankMemory:
    sizes = {
        "parameters": 10,
        "gradients": 10,
        "matrix_state": 5,
        "elementwise_state": 2,
        "average": 0,
        "gathered": 9,
    }
    sizes |= {"gathered_layer": 4, "unreduced": 8, "activations": 30, "logits": 1}
    return RankMemory(**{**sizes, "step_workspace": 3, "gradients_stay": False, **parts})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("parts", "peak", "moment"),
    [
        ({}, 17 + 30 + 9 + 8, "backward"),
        ({"logits": 20}, 17 + 30 + 5 + 20, "loss"),
        ({"logits": 20, "gradients_stay": True}, 17 + 10 + 30 + 5 + 20, "loss"),
        ({"activations": 1}, 17 + 10 + 9 + 8, "backward"),
        ({"step_workspace": 60}, 17 + 10 + 60, "step"),
    ],
)
def test_the_most_is_there_at_one_of_three_moments(
    parts: dict[str, object], peak: int, moment: str
) -> None:
    memory = memory_of(**parts)
    assert memory.peak == peak == sum(memory.moments[moment].values())
