from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from muonscale.lab.estimate.flops import newton_schulz_flops
from muonscale.lab.estimate.resolve import ResolvedPlan
from muonscale.lab.estimate.traffic import (
    Message,
    activation_flow,
    count_exchanges,
    optimizer_messages,
    shared_messages,
)
from muonscale.optim.matrices.sharding import local_shape
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.rules.muon import MuonUpdate
from tests.lab.estimate.build import planned, small_mixture

TOKENS = 768


def bytes_by_kind(messages: list[Message]) -> dict[str, int]:
    """Return the bytes sent, by kind of collective."""
    kinds: dict[str, int] = {}
    for message in messages:
        kinds[message.kind] = kinds.get(message.kind, 0) + message.sent
    return kinds


def common(seen: ResolvedPlan) -> dict[str, int]:
    flow = activation_flow(seen.shape, seen.model, seen.placement)
    return bytes_by_kind(shared_messages(seen.placement, seen.workload, flow))


def elements(seen: ResolvedPlan, *, layers: bool) -> int:
    return sum(
        p.numel() for name, p in seen.model.named_parameters() if (".layers." in name) == layers
    )


def test_layers_are_gathered_twice_and_the_rest_once_for_every_micro_batch() -> None:
    seen = planned("fsdp=4", "train.micro_batch_tokens=64", "train.precision=bfloat16")
    assert seen.workload.micro_batches == 3
    layers, rest = elements(seen, layers=True), elements(seen, layers=False)
    # every axis divides by four: nothing is padded
    assert common(seen) == {
        "all_gather": 3 * 2 * (2 * layers + rest) * 3 // 4,
        "reduce_scatter": 3 * 2 * (layers + rest) * 3 // 4,
    }


def test_shards_that_do_not_divide_travel_padded() -> None:
    seen = planned("fsdp=3")
    padded = sum(3 * -(-p.shape[0] // 3) * p[0].numel() for _, p in seen.model.named_parameters())
    assert common(seen)["reduce_scatter"] == 4 * padded * 2 // 3
    assert padded > seen.placement.elements


def test_replicas_sum_their_shards_once_a_step() -> None:
    seen = planned("hsdp=2x2", "train.micro_batch_tokens=64")
    shard = seen.placement.elements // 2
    assert common(seen)["all_reduce"] == 4 * shard  # 2 (R - 1) / R of it, with R = 2


def test_data_parallelism_sums_gradients_once_a_step_and_updates_travel() -> None:
    seen = planned("ddp=2", "train.micro_batch_tokens=64")
    assert common(seen) == {"all_reduce": 4 * seen.placement.elements}
    exchanges = count_exchanges(seen.placement)
    both = [bytes_by_kind(optimizer_messages(seen.placement, exchanges, r)) for r in range(2)]
    assert both[0] == both[1]  # padded to who has most
    # whole updates, float32: at least half of all elements, and little more
    assert 1 <= both[0]["all_gather"] / (4 * seen.placement.elements / 2) < 1.1
    plain = count_exchanges(planned("ddp=2", "optimizer.rule=adamw").placement)
    assert not plain.matrices and plain.partitioned


def test_tensor_parallelism_sums_activations_and_gathers_logits() -> None:
    seen = planned("tp=2")
    width, logits = 4 * TOKENS * 32, 4 * TOKENS * 1024
    # of each of two layers two sums forward and two backward; the embedding's rows; the head's input
    assert common(seen) == {"all_reduce": (2 * 4 + 2) * width, "all_gather": logits // 2}
    again = planned("tp=2", "train.activation_checkpointing=true")
    assert common(again)["all_reduce"] == (2 * 6 + 2) * width


def test_a_divided_sequence_sends_as_much_in_halves() -> None:
    whole, divided = common(planned("tp=2")), common(planned("tp=2,sp"))
    width, logits = 4 * TOKENS * 32, 4 * TOKENS * 1024
    norms = 5 * 32 * 4
    assert divided["reduce_scatter"] == (2 * 4 + 1) * width // 2
    assert divided["all_gather"] == (2 * 4 + 2) * width // 2 + logits // 2
    assert divided["all_reduce"] == width + norms
    # the gradients of the embedding's rows are gathered, and norms summed
    assert sum(divided.values()) == sum(whole.values()) + width // 2 + norms


def test_tokens_go_to_their_experts_and_back_both_ways(tmp_path: Path) -> None:
    seen = planned("fsdp=4,ep=2", target=small_mixture(tmp_path))
    copies = TOKENS // 4 * 2 * 2  # two experts in each of two layers
    assert common(seen)["all_to_all"] == 4 * copies * 32 * 4 // 2
    alone = planned("fsdp=4", target=small_mixture(tmp_path))
    stacks = sum(p.numel() for name, p in seen.model.named_parameters() if ".experts." in name)
    # half of the experts each, shared by two ranks instead of four
    before, after = alone.placement.elements, seen.placement.elements - stacks
    assert common(alone)["reduce_scatter"] == 4 * before * 3 // 4
    assert common(seen)["reduce_scatter"] == 4 * (after * 3 // 4 + stacks // 2 // 2)


@pytest.mark.parametrize("layout", ["fsdp=3", "hsdp=2x3", "ddp=4", "fsdp=2,tp=2", "fsdp=3,tp=2,sp"])
def test_what_is_sent_for_the_optimizer_is_received(layout: str) -> None:
    seen = planned(layout)
    exchanges = count_exchanges(seen.placement)
    ranks = range(seen.placement.topology.world)
    found = [m for rank in ranks for m in optimizer_messages(seen.placement, exchanges, rank)]
    assert sum(m.sent for m in found) == sum(m.received for m in found) > 0


@pytest.mark.parametrize(("option", "times"), [("null", 1), ("gradient", 1), ("update", 2)])
def test_two_ranks_exchange_half_of_every_matrix_each_way(option: str, times: int) -> None:
    seen = planned("fsdp=2", f"optimizer.second_moment={option}")
    exchanges = count_exchanges(seen.placement)
    own = [optimizer_messages(seen.placement, exchanges, rank) for rank in range(2)]
    on_muon = sum(
        math.prod(layout.shape)
        for name, layout in seen.placement.shardings.items()
        if seen.placement.rules[name].on_matrices
    )
    # half of a matrix goes to its owner and comes back: together all of it, in float32
    assert sum(m.sent for found in own for m in found) == 4 * on_muon * times
    assert {m.kind for found in own for m in found} == {"all_to_all"}


@pytest.mark.parametrize(("layout", "divided"), [("fsdp=2", ()), ("tp=2", ("o_proj", "down_proj"))])
def test_four_sums_are_added_for_each_row_that_is_divided(layout: str, divided: tuple) -> None:
    seen = planned(layout, "optimizer.constraint=row_magnitude")
    own = optimizer_messages(seen.placement, count_exchanges(seen.placement), 0)
    rows = sum(
        parameter.shape[0]
        for name, parameter in seen.model.named_parameters()
        if any(part in name for part in divided)
    )
    # float32; an all-reduce over two ranks sends as many bytes as it sums
    assert bytes_by_kind(own).get("all_reduce", 0) == 4 * 4 * rows


@pytest.mark.parametrize("layout", ["tp=2", "fsdp=2", "fsdp=2,tp=2"])
def test_steps_on_blocks_send_nothing_and_cost_what_the_blocks_do(layout: str) -> None:
    whole, seen = planned(layout), planned(layout, "optimizer.block_period=4")
    world = seen.placement.topology.world
    for rank in range(world):
        sent = [
            sum(
                message.sent
                for message in optimizer_messages(p.placement, count_exchanges(p.placement), rank)
            )
            for p in (whole, seen)
        ]
        assert sent[0] == pytest.approx(4 * sent[1], abs=16) and sent[0] > 0
    blocks = 0
    for name, sharding in seen.placement.shardings.items():
        if seen.placement.rules[name].on_matrices:
            shapes = (local_shape(sharding, rank) for rank in range(len(sharding.ranks)))
            blocks += sum(
                MuonUpdate(coefficients=resolve("jordan", 5)).flops(s, torch.float32, "cpu")
                for s in shapes
            )
    every = sum(newton_schulz_flops(whole.placement))
    assert sum(newton_schulz_flops(seen.placement)) == pytest.approx(
        every / 4 + 0.75 * blocks, rel=1e-6
    )


def test_one_process_sends_nothing() -> None:
    seen = planned("fsdp=1")
    flow = activation_flow(seen.shape, seen.model, seen.placement)
    assert shared_messages(seen.placement, seen.workload, flow) == []
    assert optimizer_messages(seen.placement, count_exchanges(seen.placement), 0) == []


def test_a_group_is_within_a_machine_by_its_extent() -> None:
    seen = planned("hsdp=2x3,tp=2")
    flow = activation_flow(seen.shape, seen.model, seen.placement)
    found = {(m.purpose, m.kind): m for m in shared_messages(seen.placement, seen.workload, flow)}
    assert found["tensor", "all_reduce"].within(2)
    assert found["parameters", "all_gather"].within(6)
    assert not found["parameters", "all_gather"].within(4)
    assert not found["gradients", "all_reduce"].within(8)
