"""The bytes that Muon adds to a training step under FSDP2, counted at torch's collectives."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.distributed as dist
from distributed_counter import Counter
from distributed_models import UPDATE
from distributed_traffic import BYTES
from distributed_world import run_on
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from muonscale import Muon, parameter_groups
from muonscale.optim.distributed.assignment import assign_owners, traffic
from muonscale.optim.distributed.rank_group import Member, cost_of
from muonscale.optim.matrices.sharding import Cut, Sharding
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec

WORLDS = (2, 3, 4)
STEPS = 3
VOCABULARY, LENGTH = 1024, 32


def small_llama() -> nn.Module:
    """Return a Hugging Face Llama of 4 layers, the same on every rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def sharded_llama() -> nn.Module:
    """Return it under FSDP2, a group of parameters for each layer."""
    model = small_llama()
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


def make(model: nn.Module, side: str) -> torch.optim.Optimizer:
    """Return torch's AdamW, or Muon with `side` as the dtype of its wire."""
    if side == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=1e-3)
    return Muon(parameter_groups(model, lr=1e-3), comm_dtype=side)


def train(side: str) -> list[dict[str, float]]:
    """Return the bytes that this rank sends in every step, by collective."""
    model = sharded_llama()
    optimizer = make(model, side)
    generator = torch.Generator().manual_seed(dist.get_rank())
    steps = []
    for _ in range(STEPS):
        tokens = torch.randint(VOCABULARY, (1, LENGTH), generator=generator)
        with Counter() as counter:
            model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        steps.append(dict(counter.sent))
    return steps


def by_the_plan(ranks: int, comm_bytes: int) -> list[int]:
    """Return what the plan says that every rank sends for Muon."""
    found = []
    for name, parameter, matrices in muon_parameters(small_llama()):
        shape = tuple(parameter.shape)
        sharding = Sharding(shape, matrices, (ranks,), (Cut(0),), tuple(range(ranks)))
        member = Member(name=name, sharding=sharding, update=replace(UPDATE, dtype="auto"))
        found.append(cost_of(member, "", torch.float32, "cpu"))
    moved = traffic(assign_owners(found, comm_bytes=comm_bytes))
    pairs = zip(moved.sent_in, moved.sent_out, strict=True)
    return [comm_bytes * (into + out) for into, out in pairs]


def muon_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, MatrixSpec]]:
    """Yield name, parameter and matrices of all that is on Muon."""
    for group in parameter_groups(model, lr=1e-3):
        if group["rule"] == "muon":
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                yield name, parameter, group["matrices"].get(name, PLAIN)


def line(ranks: int, side: str, adamw: list[dict[str, float]]) -> str:
    """Return one line of the table; `adamw`: what every rank sent in the last step of AdamW."""
    steps = run_on(ranks, train, side)
    last = [rank[-1] for rank in steps]
    base, ours = (sum(sum(rank.values()) for rank in sent) for sent in (adamw, last))
    exchanged = [round(rank["all_to_all"]) for rank in last]
    expected = by_the_plan(ranks, BYTES[side])
    others = sum(rank["all_reduce"] for rank in last) / ranks
    first = sum(sum(rank[0].values()) - sum(rank[-1].values()) for rank in steps) / ranks
    cells = [str(ranks), side, f"{base / ranks:,.0f}", f"{ours / ranks:,.0f}", f"{ours / base:.3f}"]
    cells += [" ".join(f"{sent:,}" for sent in by_rank) for by_rank in (exchanged, expected)]
    cells += ["equal" if exchanged == expected else "NOT EQUAL", f"{others:,.0f}", f"{first:,.0f}"]
    return f"| {' | '.join(cells)} |"


def section() -> list[str]:
    """Return the text of the section."""
    lines = []
    for ranks in WORLDS:
        adamw = [steps[-1] for steps in run_on(ranks, train, "AdamW")]
        lines += [line(ranks, wire, adamw) for wire in BYTES]
    names = ["W", "wire", "AdamW", "Muon", "Muon / AdamW", "in all-to-all, by rank"]
    names += ["the plan's `traffic`, by rank", "verdict", "in all-reduce", "first step only"]
    return [
        "Bytes that a rank sends in the third step of training (the mean, or by rank), counted at "
        "every operation of `torch.ops.c10d` in the forward and backward pass and the step: a "
        "Hugging Face Llama (4 layers, width 128, feed-forward 352, 2 of 4 heads for keys and values, "
        "vocabulary 1024, float32), `fully_shard` on every layer and on the whole, gloo. AdamW is "
        "`torch.optim.AdamW`. Counted as a ring sends: all-gather (W - 1) x shard; reduce-scatter "
        "(W - 1) x shard; all-reduce 2 (W - 1) / W x tensor; all-to-all what is for other ranks. "
        "FSDP2 gathers the layers twice, the outermost group (embedding, head) once.",
        "",
        f"| {' | '.join(names)} |",
        f"|{'---|' * len(names)}",
        *lines,
        "",
        "*in all-reduce*: the finite check and the agreement of ranks about which gradients there "
        "are. *first step only*: the comparison of plans.",
    ]
