"""Hugging Face models, put on many ranks by torch's own wrappers, against one process."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from transformers import (
    DeepseekV3ForCausalLM,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    MixtralForCausalLM,
)

from muonscale import Muon, parameter_groups
from tests.distributed.layouts import gathered
from tests.optim.conftest import causal_lm

IMPORTED = (DeepseekV3ForCausalLM, GPT2LMHeadModel, LlamaForCausalLM, MixtralForCausalLM)
"""Here, before the processes are forked, so that not each of them has to do it."""
STEPS = 3
RULES: dict[str, dict[str, Any]] = {"muon": {}, "normuon": {"post_norm": "normuon"}}


def many_tokens() -> Tensor:
    """Return `[12, 8]` ids."""
    return torch.randint(0, 50, (12, 8), generator=torch.Generator().manual_seed(1))


def few_tokens() -> Tensor:
    """Return `[12, 3]` ids, all rows the same: too few for every expert."""
    return torch.tensor([[7, 9, 4]]).repeat(12, 1)


BATCHES = {"many": many_tokens, "few": few_tokens}


def train(
    model: nn.Module, forward: Callable[..., Any], ids: Tensor, **options: Any
) -> dict[str, Tensor]:
    """Return the whole parameters of `model` after some steps on `ids`."""
    model.eval()  # no dropout
    # Gradients that are 0 but for rounding, such as a key's bias, must not become updates of AdamW.
    optimizer = Muon(parameter_groups(model, lr=0.02), ns_dtype="float32", eps=1e-4, **options)
    for _ in range(STEPS):
        optimizer.zero_grad()
        forward(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
    return gathered(dict(model.named_parameters()))


@functools.cache
def alone(kind: str, rule: str = "muon", batch: str = "many") -> dict[str, Tensor]:
    model = causal_lm(kind)
    return train(model, model, BATCHES[batch](), **RULES[rule])


def check(results: list[dict[str, Tensor]], expected: dict[str, Tensor]) -> None:
    for result in results:
        assert result.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(
                result[name], tensor, rtol=1e-4, atol=2e-5, msg=lambda text, n=name: f"{n}: {text}"
            )


def shard_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    base = model.get_submodule(model.base_model_prefix)  # type: ignore[attr-defined]
    layers = base.layers if hasattr(base, "layers") else base.h
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def share(ids: Tensor, mesh: DeviceMesh) -> Tensor:
    """Return what of a global batch is this rank's, whose number counts along the last axis first."""
    number = mesh.mesh.flatten().tolist().index(dist.get_rank())
    return ids.chunk(mesh.size())[number]


def fsdp(kind: str, rule: str, batch: str, shape: tuple[int, ...]) -> dict[str, Tensor]:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("outer", "inner")[: len(shape)])
    model = causal_lm(kind)
    shard_layers(model, mesh)
    return train(model, model, share(BATCHES[batch](), mesh), **RULES[rule])


FSDP_TABLE = [
    ("llama_tied", "muon", (2,)),
    ("gpt2", "normuon", (3,)),
    ("mixtral", "muon", (2,)),
    ("deepseek_v3", "normuon", (2,)),
    ("llama", "normuon", (2, 2)),
]
MORE_FSDP = [
    ("llama", "muon", (2,)),
    ("llama", "normuon", (3,)),
    ("gpt2", "muon", (2,)),
    ("mixtral", "normuon", (3,)),
    ("deepseek_v3", "muon", (3,)),
    ("gpt2", "muon", (2, 2)),
    ("mixtral", "muon", (2, 2)),
]


def fast_and_slow(fast: list[Any], more: list[Any]) -> list[Any]:
    """Return parameters, of which the second ones are marked as slow; their ids are `a-b-c`."""
    marked = [(each, ()) for each in fast] + [(each, pytest.mark.slow) for each in more]
    return [pytest.param(*each, marks=mark, id="-".join(map(str, each))) for each, mark in marked]


@pytest.mark.parametrize(("kind", "rule", "mesh"), fast_and_slow(FSDP_TABLE, MORE_FSDP))
def test_layers_under_fully_shard_train_as_on_one_process(world, kind, rule, mesh) -> None:
    results = world(torch.Size(mesh).numel()).run(fsdp, kind, rule, "many", mesh)
    check(results, alone(kind, rule))


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_experts_that_get_no_token_are_as_on_one_process_under_fully_shard(world, size) -> None:
    model = causal_lm("mixtral")
    ids = few_tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    used = model.get_parameter("model.layers.0.mlp.experts.gate_up_proj").grad.abs().sum((1, 2))
    assert int((used == 0).sum()) >= 1
    check(world(size).run(fsdp, "mixtral", "muon", "few", (size,)), alone("mixtral", batch="few"))


def ddp(kind: str, rule: str) -> dict[str, Tensor]:
    model = causal_lm(kind)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ids = share(many_tokens(), mesh)
    wrapped = DistributedDataParallel(model)
    return train(model, wrapped, ids, process_group=dist.group.WORLD, **RULES[rule])


@pytest.mark.parametrize(
    "kind",
    [
        "llama_tied",
        "mixtral",
        *(pytest.param(k, marks=pytest.mark.slow) for k in ("llama", "gpt2")),
    ],
)
def test_models_under_data_parallelism_train_as_on_one_process(world, kind) -> None:
    check(world(2).run(ddp, kind, "normuon"), alone(kind, "normuon"))


class Routed(nn.Module):
    """A matrix, then an expert for each token, chosen by its id; every expert is a module."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(8, 12)
        self.up = nn.Linear(12, 12, bias=False)
        self.experts = nn.ModuleList(nn.Linear(12, 12, bias=False) for _ in range(4))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.up(self.tokens(ids))
        used = sorted({int(i) % 4 for i in ids})
        parts = [self.experts[number](x[ids % 4 == number]) for number in used]
        return torch.cat(parts).square().sum()


def routed(per_rank: list[list[int]], wrap: str) -> dict[str, Tensor]:
    """Train on the ids of this rank; alone, on those of all."""
    torch.manual_seed(0)
    model = Routed()
    forward: nn.Module = model
    group = None
    ranks = len(per_rank)
    if wrap == "ddp":
        forward = DistributedDataParallel(model, find_unused_parameters=True)
        group = dist.group.WORLD
    elif wrap == "fsdp":
        mesh = init_device_mesh("cpu", (ranks,))
        for expert in model.experts:
            fully_shard(expert, mesh=mesh)
        fully_shard(model, mesh=mesh)
    if wrap == "alone":
        ids = torch.tensor([i for own in per_rank for i in own])
    else:
        ids = torch.tensor(per_rank[dist.get_rank()])
    optimizer = Muon(
        parameter_groups(model, lr=0.02), ns_dtype="float32", eps=1e-4, process_group=group
    )
    for _ in range(STEPS):
        optimizer.zero_grad()
        (forward(ids) / (ranks if wrap == "alone" else 1)).backward()
        optimizer.step()
    return gathered(dict(model.named_parameters()))


def start(name: str) -> Tensor:
    torch.manual_seed(0)
    return Routed().get_parameter(name).detach()


@pytest.mark.parametrize(
    ("wrap", "per_rank"),
    [
        ("fsdp", [[0, 1, 2, 4, 5, 6], [6, 2, 1, 0, 5]]),
        ("ddp", [[0, 1, 2, 4, 5, 6], [6, 2, 1, 0, 5]]),
        ("ddp", [[0, 1, 2, 4, 5, 6], [1, 5, 0]]),  # expert 2 has tokens on one rank only
    ],
)
def test_an_expert_module_without_a_token_stays_as_it_is(world, wrap, per_rank) -> None:
    expected = routed(per_rank, "alone")
    results = world(2).run(routed, per_rank, wrap)
    check(results, expected)
    for result in results:
        assert torch.equal(result["experts.3.weight"], start("experts.3.weight"))
        assert not torch.equal(result["experts.2.weight"], start("experts.2.weight"))


def parallelize_llama(model: Any, mesh: DeviceMesh) -> None:
    """Tensor parallelism with the sequence divided from the first layer to the head."""
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate()),
        "model.layers.0": PrepareModuleInput(
            input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),), use_local_output=True
        ),
        "model.norm": SequenceParallel(),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    for number in range(len(model.model.layers)):
        layer = f"model.layers.{number}"
        plan |= {
            f"{layer}.input_layernorm": SequenceParallel(),
            f"{layer}.self_attn": PrepareModuleInput(
                input_kwarg_layouts={"hidden_states": Shard(1)},
                desired_input_kwarg_layouts={"hidden_states": Replicate()},
                use_local_output=True,
            ),
            f"{layer}.self_attn.[qkv]_proj": ColwiseParallel(),
            f"{layer}.self_attn.o_proj": RowwiseParallel(output_layouts=Shard(1)),
            f"{layer}.post_attention_layernorm": SequenceParallel(),
            f"{layer}.mlp": PrepareModuleInput(
                input_layouts=(Shard(1),),
                desired_input_layouts=(Replicate(),),
                use_local_output=True,
            ),
            f"{layer}.mlp.gate_proj": ColwiseParallel(),
            f"{layer}.mlp.up_proj": ColwiseParallel(),
            f"{layer}.mlp.down_proj": RowwiseParallel(output_layouts=Shard(1)),
        }
    parallelize_module(model, mesh, plan)


def tensor_parallel(data: int, rule: str) -> tuple[dict[str, Tensor], int]:
    """Return the parameters, and how many gradients of the last step were still to be summed."""
    mesh = init_device_mesh("cpu", (data, 2), mesh_dim_names=("dp", "tp"))
    model = causal_lm("llama")
    parallelize_llama(model, mesh["tp"])
    if data > 1:
        shard_layers(model, mesh["dp"])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # the logits are a view
        parameters = train(model, model, share(many_tokens(), mesh["dp"]), **RULES[rule])
    gradients = [p.grad for p in model.parameters() if isinstance(p.grad, DTensor)]
    return parameters, sum(any(isinstance(p, Partial) for p in g.placements) for g in gradients)


@pytest.mark.parametrize(
    ("data", "rule"),
    fast_and_slow([(1, "normuon"), (2, "muon")], [(1, "muon"), (2, "normuon")]),
)
def test_tensor_and_sequence_parallel_layers_train_as_on_one_process(world, data, rule) -> None:
    results = world(2 * data).run(tensor_parallel, data, rule)
    check([parameters for parameters, _ in results], alone("llama", rule))
    if data == 1:  # FSDP sums them itself
        assert all(partial == 5 for _, partial in results)  # the norms
