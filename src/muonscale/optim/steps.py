"""One optimizer step on the parameters of each rule: from options and state to the pure functions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.optim.adamw import adamw_step_
from muonscale.optim.decay import decay_rate
from muonscale.optim.muon_rule import Updates, apply_updates_, momentum_step_, polar_updates
from muonscale.optim.stacks import Stacks
from muonscale.optim.state import ROW_STATE
from muonscale.optim.weights import Weights, rounding_key
from muonscale.optim.work import Group, Item, batches, by_group


@dataclass(frozen=True)
class MuonTally:
    """What the Muon rule did in one step."""

    matrices: int
    """Logical matrices orthogonalised."""
    update_rms: Tensor | None
    """0-D, on the device; None if nothing was on Muon."""


def adamw_items_(items: list[Item], mask: Tensor | None) -> None:
    """Write one AdamW step into the parameters and the state of `items`."""
    for group, part in by_group(items):
        adamw_step_(
            _weights(group, part),
            [i.gradient for i in part],
            [i.state["exp_avg"] for i in part],
            [i.state["exp_avg_sq"] for i in part],
            [int(i.state["step"]) for i in part],
            lr=float(group["lr"]),
            rate=decay_rate(group),
            cautious=group["cautious_decay"],
            betas=group["betas"],
            eps=group["eps"],
            mask=mask,
        )


def muon_items_(items: list[Item], mask: Tensor | None, compile: bool | str) -> MuonTally:
    """Write one Muon step into the parameters and the state of `items`."""
    matrices = 0
    squares: list[Tensor] = []
    for polar, batch in batches(items):
        directions: list[Tensor] = []
        for group, part in by_group(batch):
            directions += momentum_step_(
                [i.state["momentum_buffer"] for i in part],
                [i.gradient for i in part],
                momentum=group["momentum"],
                nesterov=group["nesterov"],
                mask=mask,
            )
        stacks = Stacks([tuple(i.parameter.shape) for i in batch], [i.layout for i in batch])
        rows = [i.state[ROW_STATE] for i in batch] if ROW_STATE in batch[0].state else None
        updates = polar_updates(directions, stacks, polar, V=rows, mask=mask, compile=compile)
        matrices += updates.matrices
        squares += updates.squares
        _apply(batch, updates, mask)
    return MuonTally(matrices, _rms(squares, sum(item.parameter.numel() for item in items)))


def _apply(batch: list[Item], updates: Updates, mask: Tensor | None) -> None:
    left = iter(updates.tensors)
    for group, part in by_group(batch):
        apply_updates_(
            _weights(group, part),
            [next(left) for _ in part],
            lr=float(group["lr"]),
            rate=decay_rate(group),
            cautious=group["cautious_decay"],
            mask=mask,
        )


def _weights(group: Group, part: list[Item]) -> Weights:
    stored = [item.parameter for item in part]
    if group["master"] == "float32":
        return Weights(stored=stored, masters=[item.state.get("master") for item in part])
    if group["master"] == "stochastic":
        return Weights(stored=stored, keys=[_key(item) for item in part])
    return Weights(stored=stored)


def _key(item: Item) -> int | None:
    if "rounding_step" not in item.state:
        return None
    return rounding_key(item.group["rounding_seed"], item.name, int(item.state["rounding_step"]))


def _rms(squares: list[Tensor], elements: int) -> Tensor | None:
    if not squares:
        return None
    total = torch.stack([square.to(squares[0].device) for square in squares]).sum()
    return (total / max(1, elements)).sqrt()
