"""The parameters on one set of ranks, and one Muon step on them together.

Momentum moves where its state lies; directions travel to the ranks that own their matrices, are
worked on there in batches of one shape, and the updates travel back to all that hold a piece.
While a round is worked on, the directions of the next and the updates of the last are under way.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.optim.distributed.assignment import (
    ParamCost,
    SubgroupSplit,
    assign_owners,
    shapes_of,
)
from muonscale.optim.distributed.dtensor import group_of
from muonscale.optim.distributed.exchange import Exchange, Pending, TrafficLog
from muonscale.optim.distributed.lane import BatchKey, Locals, MatrixBatch, Payload
from muonscale.optim.matrices.batches import row_state_sharding
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.newton_schulz.subgroup import Subgroup
from muonscale.optim.rules.base import BatchUpdate, MatrixUpdate, batch_update
from muonscale.optim.rules.post_norm import LOCAL


@dataclass(frozen=True, kw_only=True)
class Member:
    """A parameter of a domain, as long as the options of its group stay."""

    name: str
    layout: Sharding
    update: MatrixUpdate | None
    """None for an elementwise rule, whose updates only move."""


@dataclass(frozen=True, kw_only=True)
class StepTensors:
    """What one step exchanges, on this rank."""

    directions: Locals
    """Not of `owned` parameters, see `whole`."""
    updates: Locals
    """Written to; they may be the directions. Looked up when the first piece has arrived."""
    rows: Mapping[str, Locals]
    """Per-row state by its name; written to."""
    whole: Mapping[tuple[str, int], Tensor]
    """Directions of the matrices whose state this rank owns, `[out, in]`, by name and number."""
    whole_rows: Mapping[str, Mapping[tuple[str, int], Tensor]]
    """Their per-row state by its name; written to."""


class RankGroup:
    """Plan, process group and lanes of parameters on the same ranks."""

    def __init__(
        self,
        members: tuple[Member, ...],
        owners: Mapping[tuple[str, int], int],
        group: dist.ProcessGroup | None,
        rank: int,
        *,
        wire: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        compile: bool | str = False,
    ) -> None:
        self.members = members
        kinds = _numbered(members)
        costs = [cost_of(m, kinds[m.update], dtype, device) for m in members]
        self.plan = assign_owners(costs, owners=owners, wire_bytes=wire.itemsize)
        self.ledger = TrafficLog()
        self.group = group
        self._compile = compile
        self._kinds = {kind: update for update, kind in kinds.items()}
        exchange = Exchange(group, self.plan.ranks.index(rank), self.ledger)
        layouts = [p.layout for p in self.plan.parameters]
        self._matrices = Payload(
            self.plan, layouts, exchange, wire=wire, dtype=dtype, device=device
        )
        row_layouts = [row_state_sharding(layout) for layout in layouts]
        rows = Payload(
            self.plan, row_layouts, exchange, wire=dtype, dtype=dtype, device=device, state=True
        )
        self._with_rows: dict[str, set[str]] = {}
        """Parameters that have a per-row state, by the name of the state."""
        for member in members:
            for key in member.update.row_states if member.update is not None else ():
                self._with_rows.setdefault(key, set()).add(member.name)
        self._rows = dict.fromkeys(sorted(self._with_rows), rows)
        self._position = exchange.position
        self._team_group: dist.ProcessGroup | None = None
        if self.plan.team_size > 1:
            first = exchange.position - exchange.position % self.plan.team_size
            self._team_group = group_of(self.plan.ranks[first : first + self.plan.team_size])

    @property
    def names(self) -> frozenset[str]:
        """The names of its parameters."""
        return frozenset(member.name for member in self.members)

    def matrices(self, active: Collection[str]) -> int:
        """Return how many matrices all ranks together work on."""
        return sum(self.plan.parameters[task.parameter].name in active for task in self.plan.tasks)

    def updates(self, tensors: StepTensors, active: Collection[str]) -> Iterator[list[str]]:
        """Write the updates of `active` parameters, and yield the names of those that are complete.

        All ranks of the domain have to call it with the same names, and to exhaust it. The row
        states of a parameter are complete with its update.
        """
        missing = self._matrices.pieces_to_come(active)
        if nothing_here := [name for name, count in missing.items() if not count]:
            yield nothing_here
        coming = self._send_in(0, tensors, active)
        leaving: deque[dict[str, Pending]] = deque()
        for number in range(self.plan.rounds):
            following = self._send_in(number + 1, tensors, active)
            updates, rows = self._work(number, coming, tensors, active)
            leaving.append(self._send_out(number, updates, rows, active))
            coming = following
            if len(leaving) > 1:
                yield self._deliver(leaving.popleft(), tensors, missing)
        while leaving:
            yield self._deliver(leaving.popleft(), tensors, missing)

    def _rows_of(self, active: Collection[str]) -> Iterator[tuple[str, Payload, set[str]]]:
        """Yield name, payload and active parameters of every per-row state that one of them has."""
        for key, payload in self._rows.items():
            if names := self._with_rows[key].intersection(active):
                yield key, payload, names

    def _send_in(
        self, number: int, tensors: StepTensors, active: Collection[str]
    ) -> dict[str, Pending]:
        if number == self.plan.rounds:
            return {}
        coming = {"": self._matrices.send_in(number, tensors.directions, active)}
        for key, payload, names in self._rows_of(active):
            coming[key] = payload.send_in(number, tensors.rows[key], names)
        return coming

    def _work(
        self,
        number: int,
        coming: dict[str, Pending],
        tensors: StepTensors,
        active: Collection[str],
    ) -> tuple[dict[BatchKey, MatrixBatch], dict[str, dict[BatchKey, MatrixBatch]]]:
        """Return the updates and the new per-row state of the matrices that this rank works on."""
        batches = self._matrices.assemble(number, coming[""], tensors.whole, active)
        rows = {
            name: payload.assemble(number, coming[name], tensors.whole_rows[name], names)
            for name, payload, names in self._rows_of(active)
        }
        updates: dict[BatchKey, MatrixBatch] = {}
        for key, batch in batches.items():
            kind, shape, split = key
            update = self._kinds[kind]
            if update is None:
                updates[key] = batch
                continue
            own = {name: found[key].values[..., :1] for name, found in rows.items() if key in found}
            U_NMK, own = self._batch_update(shape, update, split)(batch.values, own)
            updates[key] = MatrixBatch(batch.tasks, U_NMK)
            for name, V_NM1 in own.items():
                self._keep_rows(rows[name][key], V_NM1, tensors.whole_rows[name])
        return updates, rows

    def _keep_rows(
        self, batch: MatrixBatch, V_NM1: Tensor, whole_rows: Mapping[tuple[str, int], Tensor]
    ) -> None:
        """Write new per-row state into the batch that is sent, and into what this rank owns."""
        batch.values.copy_(V_NM1.expand_as(batch.values))
        for task, values in zip(batch.tasks, batch.values.unbind(), strict=True):
            name = self.plan.parameters[task.parameter].name
            if (name, task.matrix) in whole_rows:
                whole_rows[name, task.matrix].copy_(values)

    def _batch_update(
        self, shape: tuple[int, int], update: MatrixUpdate, split: SubgroupSplit | None
    ) -> BatchUpdate:
        if split is None:
            return batch_update(update, shape, LOCAL, self._compile)
        assert self._team_group is not None
        place = split.team.index(self._position)
        subgroup = Subgroup(self._team_group, place, len(split.team), split.divided)
        return functools.partial(
            update.update_part, shape=shape, subgroup=subgroup, segments=split.segments
        )

    def _send_out(
        self,
        number: int,
        updates: dict[BatchKey, MatrixBatch],
        rows: dict[str, dict[BatchKey, MatrixBatch]],
        active: Collection[str],
    ) -> dict[str, Pending]:
        leaving = {"": self._matrices.send_out(number, updates, active)}
        for key, payload, names in self._rows_of(active):
            leaving[key] = payload.send_out(number, rows[key], names)
        return leaving

    def _deliver(
        self, leaving: dict[str, Pending], tensors: StepTensors, missing: dict[str, int]
    ) -> list[str]:
        for key, pending in leaving.items():
            if key:
                self._rows[key].deliver(pending, tensors.rows[key])
        complete = []
        for name in self._matrices.deliver(leaving[""], tensors.updates):
            missing[name] -= 1
            if not missing[name]:
                complete.append(name)
        return complete


def _numbered(members: Iterable[Member]) -> dict[MatrixUpdate | None, str]:
    """Give every combination of options a name that is the same on all ranks."""
    kinds: dict[MatrixUpdate | None, str] = {}
    for member in sorted(members, key=lambda member: member.name):
        kinds.setdefault(member.update, f"kind {len(kinds):04}")
    return kinds


def cost_of(member: Member, kind: str, state: torch.dtype, device: torch.device | str) -> ParamCost:
    """Return what a parameter costs its owners; an elementwise update costs its elements.

    Args:
        member: the parameter.
        kind: see `ParamCost`.
        state: dtype of its state.
        device: where the update is computed.
    """
    update = member.update
    shapes = shapes_of(member.layout)
    if update is None:
        sizes = tuple(math.prod(shape) for shape in shapes)
        return ParamCost(name=member.name, layout=member.layout, kind=kind, flops=sizes)
    short = min((min(shape) for shape in shapes), default=1)
    triples, forms = update.splits(short, state, device)
    return ParamCost(
        name=member.name,
        layout=member.layout,
        kind=kind,
        flops=tuple(update.flops(shape, state, device) for shape in shapes),
        triples=tuple(triples),
        forms=tuple(forms),
    )
