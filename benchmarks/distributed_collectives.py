"""The bytes that Muon adds to a training step under FSDP2, counted at torch's collectives.

A mode sees every operation of `torch.ops.c10d`, so also those that FSDP2 and DTensor call inside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from distributed_models import POLAR
from distributed_traffic import BYTES
from distributed_world import run_on
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from muonscale import Muon, parameter_groups
from muonscale.optim.domain import Member, planned
from muonscale.optim.layout import Cut, Layout
from muonscale.optim.matrices import PLAIN, Matrices
from muonscale.optim.plan import make_plan, traffic

WORLDS = (2, 3, 4)
STEPS = 3
VOCABULARY, LENGTH = 1024, 32


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)


def _nbytes(value: Any) -> int:
    return sum(tensor.nbytes for tensor in _tensors(value))


def _exchanged(args: tuple[Any, ...], ranks: int) -> float:
    """Bytes sent of an all-to-all: all but what stays here."""
    counts = args[4]  # the elements for every rank, or none where they are as many for each
    kept = counts[dist.get_rank()] if counts else args[1].numel() // ranks
    return _nbytes(args[1]) - kept * args[1].element_size()


SENT: dict[str, Callable[[tuple[Any, ...], int], float]] = {
    "_allgather_base_": lambda args, ranks: (ranks - 1) * _nbytes(args[1]),
    "allgather_": lambda args, ranks: (ranks - 1) * _nbytes(args[1]),
    "_reduce_scatter_base_": lambda args, ranks: (ranks - 1) * _nbytes(args[0]),
    "alltoall_base_": _exchanged,
    "allreduce_": lambda args, ranks: 2 * (ranks - 1) / ranks * _nbytes(args[0]),
}
"""Bytes that a rank sends, by operation: those of a ring, whatever the backend does."""


class Counter(TorchDispatchMode):
    """Bytes sent on this rank, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count an operation between ranks; let DTensors take themselves apart first."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        if getattr(func, "namespace", "") in ("c10d", "_c10d_functional"):
            name = func._schema.name.removeprefix("c10d::")
            # One that is not in the table is an error: nothing may be sent uncounted.
            self.sent[name] += SENT[name](args, dist.get_world_size())
        return func(*args, **(kwargs or {}))


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
    return Muon(parameter_groups(model, lr=1e-3), wire_dtype=side)


def train(side: str) -> list[dict[str, float]]:
    """Return the bytes that this rank sends in every step, by operation."""
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


def by_the_plan(ranks: int, wire_bytes: int) -> list[int]:
    """Return what the plan says that every rank sends for Muon."""
    found = []
    for name, parameter, matrices in muon_parameters(small_llama()):
        shape = tuple(parameter.shape)
        layout = Layout(shape, matrices, (ranks,), (Cut(0),), tuple(range(ranks)))
        member = Member(name=name, layout=layout, polar=replace(POLAR, dtype="auto"))
        found.append(planned(member, "muon", torch.float32, "cpu"))
    moved = traffic(make_plan(found, wire_bytes=wire_bytes))
    pairs = zip(moved.sent_in, moved.sent_out, strict=True)
    return [wire_bytes * (into + out) for into, out in pairs]


def muon_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor, Matrices]]:
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
    exchanged = [round(rank["alltoall_base_"]) for rank in last]
    expected = by_the_plan(ranks, BYTES[side])
    others = sum(rank["allreduce_"] for rank in last) / ranks
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
