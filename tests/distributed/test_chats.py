"""Rows with different numbers of targets on many ranks: gradients and losses of one process."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from muonscale.lab.config.load import Config, load_config
from muonscale.lab.data.loss_mask import BEGIN, NO_TARGET
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import parse_layout
from muonscale.lab.training.router_balance import RouterBalance, plan_routing
from muonscale.lab.training.schedule import spans
from muonscale.lab.training.setup import build_optimizer
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.step import accumulate, count_batch_targets, train_step
from muonscale.optim.distributed.dtensor import gather_full
from tests.distributed.test_parallelize import put
from tests.optim.conftest import causal_lm

STEPS = 3
B, L = 12, 10

ROWS = [
    ("llama", "fsdp=2"),
    ("llama", "ddp=2"),
    ("llama", "tp=2"),
    *(
        pytest.param(kind, layout, marks=pytest.mark.slow)
        for kind, layout in [
            ("llama", "tp=2,sp"),
            ("llama", "fsdp=3"),
            ("llama", "hsdp=2x2"),
            ("gemma3", "fsdp=2,tp=2"),
            ("llama_tied", "fsdp=2,tp=2,sp"),
            ("deepseek_v3", "fsdp=2"),
            ("deepseek_v3", "fsdp=2,ep=2"),
            ("mixtral", "ddp=2,ep=2"),
        ]
    ),
]


def batch(step: int) -> np.ndarray:
    """Return marked rows; the first ones have few targets and the last ones many."""
    rng = np.random.default_rng(step)
    rows = rng.integers(0, 50, (B, L + 1))
    for number, row in enumerate(rows):
        cut = 2 + number % 5
        row[[0, cut]] |= BEGIN | NO_TARGET
        row[rng.random(L + 1) > (number + 1) / B] |= NO_TARGET
        row[1] &= ~NO_TARGET
    return rows


def config_of(micro: int) -> Config:
    words = [
        "train.steps=20",
        "train.tokens=null",
        "data.path=chats.jsonl",
        "data.format=chat",
        "data.tokenizer=none",
        f"data.sequence_length={L}",
        f"train.batch_tokens={B * L}",
        f"train.micro_batch_tokens={micro * L}",
        f"eval.batch_tokens={L}",
        "optimizer.eps=1e-4",
        "routing.bias_rate=null",
    ]
    return load_config("demo", words)


def followed(forward: Parallelized, processes: Processes, micro: int) -> dict[str, Any]:
    """Return the gradients of the first pass, and losses and targets of three steps."""
    config, model = config_of(micro), forward.model
    model.train()
    group = dist.group.WORLD if processes.many and processes.topology.data == "ddp" else None
    routing = RouterBalance(
        model, plan_routing(model, config.routing, spans(config.schedule, config.timeline))
    )
    state = TrainState(forward, build_optimizer(model, config.optimizer, group), routing, {})
    ranks = processes.topology.data_ranks
    shares = [np.split(batch(step), ranks)[processes.data_rank] for step in range(STEPS)]
    targets = count_batch_targets(shares[0], config, processes)
    assert targets is not None
    accumulate(forward, routing, torch.from_numpy(shares[0]), micro, targets=targets / ranks)
    gradients: dict[str, Any] = {name: p.grad for name, p in model.named_parameters()}
    found: dict[str, Any] = {
        "gradients": {n: gather_full(g).clone() for n, g in gradients.items() if g is not None}
    }
    records = [train_step(state, share, config, processes) for share in shares]
    return found | {key: [r[key] for r in records] for key in ("loss", "targets")}


@functools.cache
def alone(kind: str) -> dict[str, Any]:
    model = causal_lm(kind)
    return followed(Parallelized(model, model), Processes(), B)  # type: ignore[arg-type]


def on_ranks(kind: str, layout: str) -> dict[str, Any]:
    forward, processes = put(kind, layout)
    return followed(forward, processes, max(1, B // processes.topology.data_ranks // 2))


@pytest.mark.parametrize(("kind", "layout"), ROWS)
def test_every_target_weighs_the_same_on_all_ranks(world: Any, kind: str, layout: str) -> None:
    expected = alone(kind)
    for found in world(parse_layout(layout).world).run(on_ranks, kind, layout):
        assert found["targets"] == expected["targets"]
        assert found["loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert found["gradients"].keys() == expected["gradients"].keys()
        for name, gradient in expected["gradients"].items():
            torch.testing.assert_close(
                found["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name
            )
