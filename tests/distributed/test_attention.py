"""Attention logits and QK-clip on many ranks are those of one process."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from muonscale.lab.config.load import load_config
from muonscale.lab.config.sections import TrainSection
from muonscale.lab.models.build import meta_model
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import parse_layout
from muonscale.lab.training.attention import monitor_attention
from muonscale.lab.training.router_balance import RouterBalance, plan_routing
from muonscale.lab.training.schedule import spans
from muonscale.lab.training.setup import build_optimizer
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.step import train_step
from muonscale.optim.diagnostics.qk_clip import Outputs, clip_grouped_, clip_latent_
from muonscale.optim.distributed.dtensor import gather_full
from muonscale.optim.muon import Muon
from tests.lab.models.logits import build

STEPS = 3
B, L = 12, 8

ROWS = [
    ("llama_bias", "fsdp=2", False),
    ("llama_grouped", "tp=2", True),
    ("gpt2", "fsdp=2", False),
    ("deepseek_v3", "fsdp=2", True),
    ("deepseek_v3", "tp=2", False),
    *(
        pytest.param(kind, layout, recomputed, marks=pytest.mark.slow)
        for kind, layout, recomputed in [
            ("llama_grouped", "fsdp=2", False),
            ("llama_grouped", "ddp=2", True),
            ("gpt2", "ddp=2", False),
            ("gemma3", "tp=2", False),
            ("gemma3", "fsdp=2", True),
            ("llama_grouped", "fsdp=3", False),
            ("llama_grouped", "tp=2,sp", False),
            ("llama_grouped", "fsdp=2,tp=2", True),
            ("llama_grouped", "hsdp=2x2", False),
            ("deepseek_v3_low_rank", "fsdp=2,tp=2", False),
            ("deepseek_v3", "fsdp=2,ep=2", False),
        ]
    ),
]
"""Models, arrangements, and whether layers are computed again in the backward pass."""


def batch(step: int) -> Tensor:
    """Return `[B, L + 1]` token ids of a step."""
    return torch.randint(0, 50, (B, L + 1), generator=torch.Generator().manual_seed(step))


def fresh(kind: str) -> Any:
    model = build(kind, dtype=torch.float32)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def followed(forward: Parallelized, kind: str, processes: Processes, micro: int) -> dict[str, Any]:
    clip = [] if kind == "gemma3" else ["optimizer.qk_clip=30"]
    words = [
        "train.steps=20",
        "train.tokens=null",
        f"data.sequence_length={L}",
        f"train.batch_tokens={B * L}",
        f"train.micro_batch_tokens={micro * L}",
        f"eval.batch_tokens={L}",
        "optimizer.eps=1e-4",
        "optimizer.lr=0.001",
        "telemetry.attention_every=2",
    ]
    config = load_config("demo", [*words, *clip])
    model = forward.model
    model.train()
    group = dist.group.WORLD if processes.topology.data == "ddp" else None
    optimizer = build_optimizer(model, config.optimizer, group if processes.many else None)
    routing = RouterBalance(
        model, plan_routing(model, config.routing, spans(config.schedule, config.timeline))
    )
    attention = monitor_attention(model, config)
    state = TrainState(forward, optimizer, routing, {}, attention=attention)
    records = []
    for step in range(STEPS):
        share = batch(step).chunk(processes.topology.data_ranks)[processes.data_rank]
        records.append(train_step(state, share.numpy(), config, processes))
    weights: dict[str, Any] = dict(model.named_parameters())
    return {
        "records": records,
        "weights": {n: gather_full(p.detach()).clone() for n, p in weights.items()},
    }


@functools.cache
def alone(kind: str) -> dict[str, Any]:
    model = fresh(kind)
    return followed(Parallelized(model, model), kind, Processes(), B)


def on_ranks(kind: str, layout: str, recomputed: bool) -> dict[str, Any]:
    topology = parse_layout(layout)
    source = fresh(kind)
    processes = Processes(topology, dist.get_rank(), dist.get_rank())
    train = TrainSection(steps=1, activation_checkpointing=recomputed)
    model = meta_model(source.config)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    first = source if dist.get_rank() == 0 else None
    forward = parallelize(model, first, train, processes, torch.float32)
    return followed(forward, kind, processes, max(1, B // topology.data_ranks // 2))


@pytest.mark.parametrize(("kind", "layout", "recomputed"), ROWS)
def test_logits_and_clips_are_those_of_one_process(
    world: Any, kind: str, layout: str, recomputed: bool
) -> None:
    expected = alone(kind)
    results = world(parse_layout(layout).world).run(on_ranks, kind, layout, recomputed)
    for found in results:
        for record, theirs in zip(found["records"], expected["records"], strict=True):
            assert ("attention" in record) == (record["step"] == 2)
            if "attention" in record:
                for key, values in theirs["attention"].items():
                    assert record["attention"][key] == pytest.approx(values, rel=1e-2), key
            if kind != "gemma3":
                assert record["qk_clip"] == pytest.approx(theirs["qk_clip"], rel=1e-2)
        if kind == "gemma3":  # nothing is clipped
            continue
        for name, weight in expected["weights"].items():
            torch.testing.assert_close(
                found["weights"][name],
                weight,
                rtol=1e-2,
                atol=2e-4,
                msg=lambda text, n=name: f"{n}: {text}",
            )
    if kind != "gemma3":
        clipped = [record["qk_clip"]["clipped"] for record in expected["records"]]
        heads = expected["records"][0]["qk_clip"]["heads"]
        assert 0 < clipped[0] < heads


PLACEMENTS = [[Shard(0)], [Shard(1)], [Replicate()]]
GAMMA = [1.0, 0.5, 0.25, 0.1, 0.9, 1.0]


def narrow(rows: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 7, generator=generator).bfloat16()


def clipped(place: Any) -> list[Tensor]:
    """Clip bf16 weights with masters, as `place` has distributed them; return all of it whole."""
    gamma = torch.tensor(GAMMA, dtype=torch.float64)
    query, key, latent, expansion = (
        place(narrow(rows, seed)) for seed, rows in enumerate((18, 9, 30, 24))
    )
    # Float32 copies that say more than their bf16 parameters do.
    masters = {p: p.to(torch.float32) * (1 + 2**-12) for p in (query, key, latent, expansion)}
    kept = {"alpha": 0.5, "masters": masters}
    clip_grouped_(Outputs((query,)), Outputs((key,)), gamma, key_heads=3, head_size=3, **kept)
    clip_latent_(Outputs((latent,)), Outputs((expansion,)), gamma, sizes=(2, 3, 2), **kept)
    every = [*masters, *masters.values()]
    return [gather_full(tensor).clone() for tensor in every]


def clipped_on_ranks(placements: Any) -> list[Tensor]:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def place(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)

    return clipped(place)


@pytest.mark.parametrize("placements", PLACEMENTS, ids=str)
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_masters_are_clipped_wherever_they_lie(world: Any, size: int, placements: Any) -> None:
    expected = clipped(lambda tensor: tensor)
    assert [t.dtype for t in expected] == [torch.bfloat16] * 4 + [torch.float32] * 4
    for found in world(size).run(clipped_on_ranks, placements):
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert not torch.equal(expected[0], narrow(18, 0))
    assert torch.equal(expected[4].bfloat16(), expected[0])


def step_after_a_clip(size: int) -> list[Tensor]:
    """Return a bf16 weight under FSDP, and its master, after step, clip, and a step of lr 0."""
    weight = nn.Parameter(narrow(8, 5))
    if size > 1:
        mesh = init_device_mesh("cpu", (size,))
        weight = nn.Parameter(distribute_tensor(weight.detach(), mesh, [Shard(0)]))
    optimizer = Muon([("w", weight)], lr=1e-2, weight_decay=0.0, master="float32")
    gradient = narrow(8, 6)
    weight.grad = gradient if size == 1 else distribute_tensor(gradient, mesh, [Shard(0)])
    optimizer.step()
    masters = {weight: optimizer.state[weight]["master"]}
    outputs = Outputs((weight,), first=4)
    gamma = torch.tensor([0.9993], dtype=torch.float64)
    clip_grouped_(Outputs((weight,)), outputs, gamma, key_heads=1, head_size=4, masters=masters)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    return [gather_full(t.detach()).clone() for t in (weight, optimizer.state[weight]["master"])]


def test_a_sharded_master_is_not_undone_by_the_next_step(world: Any) -> None:
    expected = step_after_a_clip(1)
    for found in world(2).run(step_after_a_clip, 2):
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-7)
