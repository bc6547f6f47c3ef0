"""The gradient noise scale on many ranks is that of one process that reads the same parts."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.lab.config.load import load_config
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import parse_layout
from muonscale.lab.training.router_balance import RouterBalance, plan_routing
from muonscale.lab.training.schedule import spans
from muonscale.lab.training.setup import build_optimizer
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.step import train_step
from muonscale.optim.distributed.dtensor import gather_full
from tests.distributed.test_parallelize import put
from tests.optim.conftest import causal_lm

STEPS = 2
B, L = 12, 8

ROWS = [
    ("llama", "ddp=2", 2),
    ("llama", "fsdp=2", None),
    ("qwen3", "tp=2,sp", 6),
    *(
        pytest.param(kind, layout, micro, marks=pytest.mark.slow)
        for kind, layout, micro in [
            ("llama", "ddp=3", None),
            ("llama", "fsdp=3", 2),
            ("llama", "hsdp=2x2", 1),
            ("llama", "fsdp=2,tp=2", 3),
            ("deepseek_v3", "fsdp=2,ep=2", 3),
            ("deepseek_v3", "ddp=2,ep=2", 2),
        ]
    ),
]
"""Models, arrangements, and sequences of a rank's micro-batch; None for its whole share."""


def batch(step: int) -> Tensor:
    """Return `[B, L + 1]` token ids of a step."""
    return torch.randint(0, 50, (B, L + 1), generator=torch.Generator().manual_seed(step))


def followed(
    forward: Parallelized, processes: Processes, micro: int | None, shares: list[Tensor], every: str
) -> dict[str, Any]:
    words = [
        "train.steps=20",
        "train.tokens=null",
        f"data.sequence_length={L}",
        f"train.batch_tokens={B * L}",
        f"train.micro_batch_tokens={'null' if micro is None else micro * L}",
        f"eval.batch_tokens={L}",
        "optimizer.eps=1e-4",
        "optimizer.lr=0.001",
        "optimizer.max_grad_norm=null",
        f"telemetry.noise_scale_every={every}",
    ]
    config = load_config("demo", words)
    model = forward.model
    model.train()
    group = dist.group.WORLD if processes.topology.data == "ddp" else None
    optimizer = build_optimizer(model, config.optimizer, group if processes.many else None)
    routing = RouterBalance(
        model, plan_routing(model, config.routing, spans(config.schedule, config.timeline))
    )
    state = TrainState(forward, optimizer, routing, {})
    records, gradients = [], []
    for share in shares:
        records.append(train_step(state, share.numpy(), config, processes))
        found: dict[str, Any] = {n: p.grad for n, p in model.named_parameters()}
        gradients.append({n: gather_full(g).clone() for n, g in found.items()})
    return {
        "noise": [record.get("noise_scale") for record in records],
        "norms": [record["grad_norm"] for record in records],
        "gradients": gradients[0],
    }


@functools.cache
def alone(kind: str, ranks: int, part: int) -> dict[str, Any]:
    """Train on one process, whose micro-batches are the parts of all ranks together."""
    order = torch.arange(B).view(ranks, -1, part).transpose(0, 1).flatten()
    model = causal_lm(kind)
    shares = [batch(step)[order] for step in range(STEPS)]
    return followed(Parallelized(model, model), Processes(), ranks * part, shares, "1")


def on_ranks(kind: str, layout: str, micro: int | None, every: str) -> dict[str, Any]:
    forward, processes = put(kind, layout)
    ranks, place = processes.topology.data_ranks, processes.data_rank
    shares = [batch(step).chunk(ranks)[place] for step in range(STEPS)]
    return followed(forward, processes, micro, shares, every)


@pytest.mark.parametrize(("kind", "layout", "micro"), ROWS)
def test_it_is_that_of_one_process(world: Any, kind: str, layout: str, micro: int | None) -> None:
    topology = parse_layout(layout)
    part = micro or B // topology.data_ranks // 2
    expected = alone(kind, topology.data_ranks, part)
    group = world(topology.world)
    plain = group.run(on_ranks, kind, layout, micro, "null")[0]
    assert plain["noise"] == [None] * STEPS
    for found in group.run(on_ranks, kind, layout, micro, "1"):
        for mine, theirs in zip(found["noise"], expected["noise"], strict=True):
            assert mine["tokens_small"] == part * topology.data_ranks * L
            rounding = 1e-3 * theirs["trace"] / (B * L)
            near = pytest.approx(theirs["gradient_sq"], rel=1e-3, abs=rounding)
            assert mine["gradient_sq"] == near
            assert mine["trace"] == pytest.approx(theirs["trace"], rel=1e-3)
        for norms, others in zip(found["norms"], plain["norms"], strict=True):
            assert norms == pytest.approx(others, rel=1e-3)
        for name, gradient in plain["gradients"].items():
            mine = found["gradients"][name]
            torch.testing.assert_close(mine, gradient, rtol=1e-4, atol=1e-6, msg=name)
