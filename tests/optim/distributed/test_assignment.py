"""Who works on what, without a process group."""

from __future__ import annotations

import random
from collections import defaultdict

import pytest

from muonscale.errors import LayoutError
from muonscale.optim.distributed.assignment import ParamCost, assign_owners, shapes_of, traffic
from muonscale.optim.matrices.sharding import Cut, Sharding
from muonscale.optim.newton_schulz.flops import ns_flops


def planned(name: str, shape: tuple[int, ...], world: int, cut: int | None = 0) -> ParamCost:
    cuts = (None if cut is None else Cut(cut),)
    sharding = Sharding(shape, mesh=(world,), cuts=cuts, ranks=tuple(range(world)))
    flops = tuple(ns_flops(matrix) for matrix in shapes_of(sharding))
    return ParamCost(name=name, sharding=sharding, kind="all", flops=flops)


def layers(number: int, world: int) -> list[ParamCost]:
    """Llama-60M-like: d 512, ffn 1376."""
    found = []
    for n in range(number):
        found += [planned(f"{n}.{m}", (512, 512), world) for m in "qkvo"]
        found += [planned(f"{n}.{m}", (1376, 512), world) for m in ("gate", "up")]
        found.append(planned(f"{n}.down", (512, 1376), world))
    return found


def test_every_matrix_has_one_owner_and_the_loads_are_even() -> None:
    plan = assign_owners(layers(8, 4))
    assert len(plan.tasks) == 56
    assert len({(task.parameter, task.matrix) for task in plan.tasks}) == 56
    loads = plan.loads()
    assert max(loads) * 4 <= 1.1 * sum(loads)


def test_the_order_of_the_parameters_has_no_influence() -> None:
    parameters = layers(3, 3)
    plan = assign_owners(parameters)
    random.Random(0).shuffle(parameters)
    assert assign_owners(parameters) == plan
    assert assign_owners(parameters).digest == plan.digest
    assert assign_owners(layers(2, 3)).digest != plan.digest


def test_a_matrix_that_is_whole_on_a_rank_stays_where_moving_it_saves_nothing() -> None:
    stack = planned("experts", (8, 64, 64), 4)
    assert [task.owner for task in assign_owners([stack]).tasks] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert sum(traffic(assign_owners([stack])).sent_in) == 0


def test_an_expert_stack_on_few_ranks_is_spread_where_that_pays() -> None:
    lone = planned("experts", (2, 2048, 2048), 4)  # ranks 2 and 3 have none
    others = [planned(f"{n}", (2048, 2048), 4, cut=None) for n in range(2)]
    cheap = assign_owners([lone, *others], flops_per_byte=0)
    assert sorted(task.owner for task in cheap.tasks) == [0, 1, 2, 3]
    stack = planned("experts", (4, 512, 512), 1)
    assert {task.owner for task in assign_owners([stack]).tasks} == {0}
    crowded = ParamCost(
        name="crowded",
        sharding=Sharding((3, 4096, 4096), mesh=(2,), cuts=(Cut(0, 1),), ranks=(0, 1)),
        kind="all",
        flops=(10**12,) * 3,
    )
    assert sorted(t.owner for t in assign_owners([crowded], flops_per_byte=10**6).tasks) == [
        0,
        0,
        1,
    ]
    two_of_two = assign_owners([crowded, planned("x", (8, 8), 2)], flops_per_byte=1)
    assert max(two_of_two.loads()) < 2.1e12


def test_rounds_hold_what_was_said_and_one_matrix_at_least() -> None:
    plan = assign_owners(layers(4, 2), round_bytes=3 * 2**20)
    held: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for task in plan.tasks:
        held[task.owner, task.round].append(4 * task.shape[0] * task.shape[1])
    assert plan.rounds > 4
    assert all(len(sizes) == 1 or sum(sizes) <= 3 * 2**20 for sizes in held.values())
    assert assign_owners(layers(1, 2), round_bytes=1).rounds == 4


def test_settled_owners_stay_and_count() -> None:
    settled = {("0.q", 0): 1, ("0.k", 0): 1}
    plan = assign_owners(layers(1, 2), owners=settled)
    owners = {plan.parameters[t.parameter].name: t.owner for t in plan.tasks}
    assert (owners["0.q"], owners["0.k"]) == (1, 1)
    loads = plan.loads()
    assert max(loads) <= 0.6 * sum(loads)


def test_what_a_shard_sends_is_all_but_what_it_owns() -> None:
    plan = assign_owners(layers(8, 4))
    moved = traffic(plan)
    elements = sum(task.shape[0] * task.shape[1] for task in plan.tasks)
    assert sum(moved.sent_in) == sum(moved.sent_out) == elements * 3 // 4
    assert moved.sent_in == moved.received_out
    assert moved.sent_out == moved.received_in


def test_copies_take_turns_in_sending() -> None:
    sharding = Sharding((64, 64), mesh=(2, 2), cuts=(None, Cut(0)), ranks=(0, 1, 2, 3))
    many = [ParamCost(name=f"{n:02}", sharding=sharding, kind="all", flops=(1,)) for n in range(8)]
    moved = traffic(assign_owners(many))
    assert len(set(moved.sent_in)) == 1
    assert sum(moved.sent_in) == 8 * 64 * 64 // 2  # the owner holds half, some copy the other


def test_parameters_of_other_ranks_are_refused() -> None:
    with pytest.raises(LayoutError, match=r"b .*\(0, 1, 2\).* a .*\(0, 1\)"):
        assign_owners([planned("a", (4, 4), 2), planned("b", (4, 4), 3)])
