"""A model on the ranks of every arrangement: where its parameters are, and its raw gradients."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from muonscale.lab.config.sections import TrainSection
from muonscale.lab.models.build import meta_model
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.placements import parameter_shardings
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import parse_layout
from muonscale.optim.distributed.dtensor import is_sharded, sharding_of
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.matrices.spec import PLAIN
from tests.distributed.trained import ARRANGEMENTS, MORE_ARRANGEMENTS
from tests.optim.conftest import causal_lm


def ids() -> Tensor:
    """Return `[12, 9]` token ids, all different rows."""
    return torch.randint(0, 50, (12, 9), generator=torch.Generator().manual_seed(1))


def gradients(forward: Parallelized, batch: Tensor, micro: int) -> tuple[float, dict[str, Tensor]]:
    """Return the mean loss of a rank's share of a batch, and the whole raw gradients."""
    forward.model.eval()  # no dropout
    total = 0.0
    parts = batch.split(micro)
    for number, part in enumerate(parts):
        with forward.micro_batch(last=number == len(parts) - 1):
            logits = forward.logits(part[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten())
            (loss * len(part) / len(batch)).backward()
        total += loss.item() * len(part) / len(batch)
    forward.complete_gradients()
    found: dict[str, Any] = {n: p.grad for n, p in forward.model.named_parameters()}
    return total, {n: g.full_tensor() if is_sharded(g) else g.clone() for n, g in found.items()}


@functools.cache
def alone(kind: str) -> tuple[float, dict[str, Tensor]]:
    model = causal_lm(kind)
    return gradients(Parallelized(model, model), ids(), 12)


def put(kind: str, layout: str, **section: Any) -> tuple[Parallelized, Processes]:
    topology = parse_layout(layout)
    source = causal_lm(kind)
    processes = Processes(topology, dist.get_rank(), dist.get_rank())
    train = TrainSection(steps=1, **section)
    first = source if dist.get_rank() == 0 else None
    precision = torch.float32
    return parallelize(meta_model(source.config), first, train, processes, precision), processes


def on_ranks(kind: str, layout: str, micro: int, **section: Any) -> Any:
    forward, processes = put(kind, layout, **section)
    expected = parameter_shardings(
        meta_model(causal_lm(kind).config), processes.topology, {}, rank=processes.rank
    )
    ranks = range(processes.topology.world) if processes.topology.data == "ddp" else None
    found: dict[str, Sharding | None] = {}
    for name, parameter in forward.model.named_parameters():
        found[name] = sharding_of(name, parameter, PLAIN, ranks)
    wrong = {
        name: (found[name], expected[name])
        for name, p in forward.model.named_parameters()
        if (found[name] or Sharding(tuple(p.shape), ranks=(processes.rank,))) != expected[name]
    }
    share = ids().chunk(processes.topology.data_ranks)[processes.data_rank]
    return wrong, processes.data_rank, *gradients(forward, share, micro)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        *ARRANGEMENTS,
        *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE_ARRANGEMENTS),
    ],
)
def test_parameters_lie_as_said_and_raw_gradients_are_those_of_one_process(
    world, kind: str, layout: str
) -> None:
    topology = parse_layout(layout)
    micro = max(2, len(ids()) // topology.data_ranks // 2)  # two passes, of 2 and 1 rows out of 3
    results = world(topology.world).run(on_ranks, kind, layout, micro)
    loss, expected = alone(kind)
    assert [wrong for wrong, *_ in results] == [{}] * topology.world
    losses = {data_rank: mean for _, data_rank, mean, _ in results}
    assert sum(losses.values()) / len(losses) == pytest.approx(loss, rel=1e-5)
    for _, _, _, found in results:
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            scale = float(gradient.abs().max())
            torch.testing.assert_close(
                found[name],
                gradient,
                rtol=1e-3,
                atol=1e-4 * scale + 1e-7,
                msg=lambda text, n=name: f"{n}: {text}",
            )
