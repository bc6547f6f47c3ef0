"""The comparison that `muonscale verify` makes: right layouts pass, broken ones do not.

Ranks are those of a forked world; that the command starts processes of its own is tested elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muonscale.lab.config.load import Config, load_config
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import parse_layout
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.setup import Batches, set_up
from muonscale.lab.verify.check import layout_config, set_up_alone, use_float32
from muonscale.lab.verify.compare import LIMIT, LayoutComparison, compare
from muonscale.lab.verify.reordered_run import REORDERINGS, reordered_config, take_reordered_steps
from muonscale.lab.verify.trajectory import GatheredTensors, Trajectory, gather_tensors, take_steps
from muonscale.optim.distributed.context import DistributedContext
from muonscale.optim.distributed.dtensor import to_local
from muonscale.optim.muon import Muon
from tests.optim.conftest import causal_lm

STEPS = 3

Fault = Callable[[pytest.MonkeyPatch], None]


@pytest.fixture(scope="module")
def words(
    corpus_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[str, ...]]:
    """Return the overrides of the demo that train a model of a kind."""
    folder = tmp_path_factory.mktemp("models")

    def of(kind: str) -> tuple[str, ...]:
        path = folder / f"{kind}.json"
        fields = causal_lm(kind).config.to_diff_dict()
        path.write_text(
            json.dumps({k: v for k, v in fields.items() if not k.endswith("_token_id")})
        )
        zeros = ("attn_pdrop", "embd_pdrop", "resid_pdrop") if kind == "gpt2" else ()
        return (
            f"run.path={folder / 'run'}",
            "run.threads=1",
            f"model.config={path}",
            f"data.path={corpus_file}",
            f"data.cache={cache}",
            "data.vocab_size=300",
            "data.sequence_length=32",
            "train.steps=12",
            "train.batch_tokens=256",
            *(f"model.fields.{name}=0" for name in zeros),
        )

    return of


def configured(words: tuple[str, ...]) -> Config:
    return use_float32(load_config("demo", words))


@functools.cache
def in_one_process(words: tuple[str, ...]) -> tuple[Trajectory, list[Trajectory]]:
    config, device = configured(words), torch.device("cpu")
    one = take_steps(set_up_alone(config, device), STEPS)
    reordered = reordered_config(config)
    return one, [
        take_reordered_steps(set_up_alone(reordered, device), STEPS, kind) for kind in REORDERINGS
    ]


def on_ranks(words: tuple[str, ...], layout: str, fault: Fault | None) -> Trajectory:
    topology = parse_layout(layout)
    processes = Processes(topology, dist.get_rank(), dist.get_rank())
    config = layout_config(configured(words), topology)
    with pytest.MonkeyPatch.context() as patch:
        if fault is not None:
            fault(patch)
        run = set_up(config, RunFolder(config.run.path), RunConsole.silent(), processes)
        return take_steps(run, STEPS)


def verified(
    world: Any, words: tuple[str, ...], layout: str, fault: Fault | None
) -> LayoutComparison:
    one, reordered = in_one_process(words)
    other = world(parse_layout(layout).world).run(on_ranks, words, layout, fault)[0]
    return compare(one, reordered, other, torch.float32)


@pytest.mark.parametrize(
    ("kind", "layout"),
    [
        ("llama", "tp=2,sp"),
        ("gpt2", "ddp=2"),
        pytest.param("gemma3", "tp=2", marks=pytest.mark.slow),
        pytest.param("gpt2", "fsdp=2", marks=pytest.mark.slow),
        pytest.param("llama", "fsdp=2,tp=2", marks=pytest.mark.slow),
        pytest.param("mixtral", "fsdp=2,ep=2", marks=pytest.mark.slow),
        pytest.param("deepseek_v3", "hsdp=2x2", marks=pytest.mark.slow),
    ],
)
def test_a_right_layout_differs_by_rounding(world, words, kind: str, layout: str) -> None:
    found = verified(world, words(kind), layout, None)
    assert found.same, found.worst


def completing(patch: pytest.MonkeyPatch, around: Callable[[Parallelized, Any], None]) -> None:
    complete = Parallelized.complete_gradients
    patch.setattr(Parallelized, "complete_gradients", lambda f: around(f, complete))


def gradients_are_summed(patch: pytest.MonkeyPatch) -> None:
    def summed(forward: Parallelized, complete: Any) -> None:
        complete(forward)
        for parameter in forward.model.parameters():
            assert parameter.grad is not None
            to_local(parameter.grad).mul_(dist.get_world_size())

    completing(patch, summed)


def shards_are_orthogonalised(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DistributedContext, "rank_groups", lambda *_: [])


def heads_keep_their_gradients(patch: pytest.MonkeyPatch) -> None:
    def kept(forward: Parallelized, complete: Any) -> None:
        assert forward.partial
        complete(dataclasses.replace(forward, partial=()))

    completing(patch, kept)


def reading(patch: pytest.MonkeyPatch, **other: Any) -> None:
    at = Batches.at
    patch.setattr(Batches, "at", lambda b, step: at(dataclasses.replace(b, **other), step))


def all_ranks_read_what_the_first_reads(patch: pytest.MonkeyPatch) -> None:
    reading(patch, rank=0)


def ranks_read_in_other_orders(patch: pytest.MonkeyPatch) -> None:
    reading(patch, seed=dist.get_rank())


def a_replica_goes_its_own_way(patch: pytest.MonkeyPatch) -> None:
    step = Muon.step

    def apart(optimizer: Muon) -> None:
        step(optimizer)
        with torch.no_grad():
            optimizer.param_groups[-1]["params"][0].add_(1e-4 * dist.get_rank())

    patch.setattr(Muon, "step", apart)


@pytest.mark.parametrize(
    ("kind", "layout", "fault", "shown"),
    [
        ("llama", "fsdp=2", gradients_are_summed, "gradients"),
        pytest.param("gpt2", "ddp=2", gradients_are_summed, "gradients", marks=pytest.mark.slow),
        pytest.param(
            "llama", "fsdp=2", shards_are_orthogonalised, "weights", marks=pytest.mark.slow
        ),
        ("llama", "tp=2", shards_are_orthogonalised, "weights"),
        ("gemma3", "tp=2", heads_keep_their_gradients, "gradients"),
        ("gpt2", "fsdp=2", all_ranks_read_what_the_first_reads, "gradients"),
        ("llama", "tp=2", ranks_read_in_other_orders, "gradients"),
        ("llama", "ddp=2", a_replica_goes_its_own_way, "weights"),
    ],
)
def test_a_broken_layout_does_not(
    world, words, kind: str, layout: str, fault: Fault, shown: str
) -> None:
    found = verified(world, words(kind), layout, fault)
    assert not found.same
    worst = max(row.ratio for row in getattr(found, shown))
    assert worst > 10 * LIMIT
    if shown == "weights":
        assert all(row.within for row in found.gradients)


def differing() -> GatheredTensors:
    processes = Processes(parse_layout("ddp=2"), dist.get_rank(), dist.get_rank())
    tensors = {"alike": torch.ones(3), "apart": torch.ones(3) + dist.get_rank() / 8}
    return gather_tensors(tensors, processes)


def test_what_ranks_should_hold_in_common_is_compared(world) -> None:
    first, second = world(2).run(differing)
    assert first.rank_differences == {"alike": 0.0, "apart": 0.125} == second.rank_differences
    assert first.values["apart"].tolist() == [1.0] * 3 and not second.values
