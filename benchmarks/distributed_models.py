"""The models of benchmarks/distributed.py as shapes alone, and how the plan sees them.

A `Stored` is a parameter of Muon: its shape as it is stored, and which matrices are in it. What is
on AdamW counts with its elements, since AdamW under FSDP2 sends those too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from muonscale.optim.distributed.assignment import ParamCost
from muonscale.optim.distributed.rank_group import Member, cost_of
from muonscale.optim.matrices.sharding import Cut, Sharding
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.newton_schulz.coefficients import resolve
from muonscale.optim.rules.muon import MuonUpdate


@dataclass(frozen=True)
class Stored:
    """A parameter on Muon."""

    name: str
    shape: tuple[int, ...]
    matrices: MatrixSpec = PLAIN


@dataclass(frozen=True)
class Model:
    """The parameters of a model."""

    name: str
    stored: tuple[Stored, ...]
    """Those on Muon, in the order of the model."""
    others: int
    """Elements of those on AdamW."""

    @property
    def matrix_elements(self) -> int:
        """Elements of all matrices on Muon."""
        return sum(math.prod(stored.shape) for stored in self.stored)

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return self.matrix_elements + self.others


def llama(layers: int = 32, width: int = 4096, kv: int = 1024, ffn: int = 14336) -> Model:
    """Return Llama-8B: grouped-query attention, every projection a parameter."""
    shapes = {
        "q_proj": (width, width),
        "k_proj": (kv, width),
        "v_proj": (kv, width),
        "o_proj": (width, width),
        "gate_proj": (ffn, width),
        "up_proj": (ffn, width),
        "down_proj": (width, ffn),
    }
    stored = [Stored(f"{n:02}.{name}", s) for n in range(layers) for name, s in shapes.items()]
    vocabulary = 128256
    return Model("Llama-8B", tuple(stored), 2 * vocabulary * width + (2 * layers + 1) * width)


def moonlight() -> Model:
    """Return Moonlight-16B: latent attention, 64 routed experts as stacks, one dense layer."""
    layers, width = 27, 2048
    attention = {
        "q_proj": (3072, width),
        "kv_a_proj": (576, width),
        "kv_b_proj": (4096, 512),
        "o_proj": (width, width),
    }
    stored = []
    for n in range(layers):
        stored += [Stored(f"{n:02}.{name}", shape) for name, shape in attention.items()]
        stored += _feed_forward(f"{n:02}.dense", 11264, width) if n == 0 else _experts(n, width)
    vocabulary = 163840
    norms = layers * (2 * width + 512) + width + (layers - 1) * 64
    return Model("Moonlight-16B", tuple(stored), 2 * vocabulary * width + norms)


def _feed_forward(name: str, inner: int, width: int) -> list[Stored]:
    return [
        Stored(f"{name}.gate_proj", (inner, width)),
        Stored(f"{name}.up_proj", (inner, width)),
        Stored(f"{name}.down_proj", (width, inner)),
    ]


def _experts(layer: int, width: int, number: int = 64, inner: int = 1408) -> list[Stored]:
    name, fused = f"{layer:02}.experts", MatrixSpec(splits=(inner, inner))
    return [
        Stored(f"{layer:02}.router", (number, width)),
        Stored(f"{name}.gate_up_proj", (number, 2 * inner, width), fused),
        Stored(f"{name}.down_proj", (number, width, inner)),
        *_feed_forward(f"{layer:02}.shared", 2 * inner, width),
    ]


MODELS = (llama(), moonlight())


UPDATE = MuonUpdate(coefficients=resolve("jordan", 5), dtype=torch.bfloat16)


def planned(model: Model, ranks: int) -> list[ParamCost]:
    """Return the parameters under FSDP2 on `ranks` ranks: the first axis is cut.

    Operations are those of five Jordan steps with bfloat16 products on a GPU: no panels.
    """
    everyone = tuple(range(ranks))
    found = []
    for stored in model.stored:
        sharding = Sharding(stored.shape, stored.matrices, (ranks,), (Cut(0),), everyone)
        member = Member(name=stored.name, sharding=sharding, update=UPDATE)
        found.append(cost_of(member, "", torch.float32, "cuda"))
    return found
