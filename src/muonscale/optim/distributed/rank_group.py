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
from muonscale.optim.newton_schulz.flops import accepted_segments, ns_flops
from muonscale.optim.newton_schulz.orthogonalize import resolve_dtype
from muonscale.optim.newton_schulz.subgroup import Subgroup
from muonscale.optim.rules.muon import Polar, StackUpdate, part_update, stack_update
from muonscale.optim.rules.post_norm import LOCAL, resolve_post_norm


@dataclass(frozen=True, kw_only=True)
class Member:
    """A parameter of a domain, as long as the options of its group stay."""

    name: str
    layout: Sharding
    polar: Polar | None
    """None where updates are only carried: those of the AdamW rule."""


@dataclass(frozen=True, kw_only=True)
class StepTensors:
    """What one step exchanges, on this rank."""

    directions: Locals
    """Not of `owned` parameters, see `whole`."""
    updates: Locals
    """Written to; they may be the directions. Looked up when the first piece has arrived."""
    rows: Locals
    """Row states; written to."""
    whole: Mapping[tuple[str, int], Tensor]
    """Directions of the matrices whose state this rank owns, `[out, in]`, by name and number."""
    whole_rows: Mapping[tuple[str, int], Tensor]
    """Their row states; written to."""


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
        polars = _numbered(members)
        planned_members = [planned(m, polars[m.polar], dtype, device) for m in members]
        self.plan = assign_owners(planned_members, owners=owners, wire_bytes=wire.itemsize)
        self.ledger = TrafficLog()
        self.group = group
        self._compile = compile
        self._polars = {kind: polar for polar, kind in polars.items()}
        exchange = Exchange(group, self.plan.ranks.index(rank), self.ledger)
        layouts = [p.layout for p in self.plan.parameters]
        self._lane = Payload(self.plan, layouts, exchange, wire=wire, dtype=dtype, device=device)
        row_layouts = [row_state_sharding(layout) for layout in layouts]
        self._row_lane = Payload(
            self.plan, row_layouts, exchange, wire=dtype, dtype=dtype, device=device, state=True
        )
        self._with_rows = {m.name for m in members if has_rows(m.polar)}
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

    def updates(self, cargo: StepTensors, active: Collection[str]) -> Iterator[list[str]]:
        """Write the updates of `active` parameters, and yield the names of those that are complete.

        All ranks of the domain have to call it with the same names, and to exhaust it. The row
        states of a parameter are complete with its update.
        """
        missing = self._lane.pieces_to_come(active)
        if nothing_here := [name for name, count in missing.items() if not count]:
            yield nothing_here
        coming = self._send_in(0, cargo, active)
        leaving: deque[list[Pending]] = deque()
        for number in range(self.plan.rounds):
            following = self._send_in(number + 1, cargo, active)
            updates, rows = self._work(number, coming, cargo, active)
            leaving.append(self._send_out(number, updates, rows, active))
            coming = following
            if len(leaving) > 1:
                yield self._deliver(leaving.popleft(), cargo, missing)
        while leaving:
            yield self._deliver(leaving.popleft(), cargo, missing)

    def _send_in(self, number: int, cargo: StepTensors, active: Collection[str]) -> list[Pending]:
        if number == self.plan.rounds:
            return []
        with_rows = self._with_rows.intersection(active)
        coming = [self._lane.send_in(number, cargo.directions, active)]
        if with_rows:
            coming.append(self._row_lane.send_in(number, cargo.rows, with_rows))
        return coming

    def _work(
        self, number: int, coming: list[Pending], cargo: StepTensors, active: Collection[str]
    ) -> tuple[dict[BatchKey, MatrixBatch], dict[BatchKey, MatrixBatch]]:
        batches = self._lane.assemble(number, coming[0], cargo.whole, active)
        row_batches: dict[BatchKey, MatrixBatch] = {}
        if len(coming) > 1:
            with_rows = self._with_rows.intersection(active)
            row_batches = self._row_lane.assemble(number, coming[1], cargo.whole_rows, with_rows)
        updates: dict[BatchKey, MatrixBatch] = {}
        for key, batch in batches.items():
            kind, shape, split = key
            rows = row_batches.get(key)
            polar = self._polars[kind]
            if polar is None:
                updates[key] = batch
                continue
            update = self._update(shape, polar, split)
            U_NMK, V_NM1 = update(batch.values, None if rows is None else rows.values[..., :1])
            updates[key] = MatrixBatch(batch.tasks, U_NMK)
            if rows is not None and V_NM1 is not None:
                rows.values.copy_(V_NM1.expand_as(rows.values))
                for task, values in zip(rows.tasks, rows.values.unbind(), strict=True):
                    name = self.plan.parameters[task.parameter].name
                    if (name, task.matrix) in cargo.whole_rows:
                        cargo.whole_rows[name, task.matrix].copy_(values)
        return updates, row_batches

    def _update(
        self, shape: tuple[int, int], polar: Polar, split: SubgroupSplit | None
    ) -> StackUpdate:
        if split is None:
            return stack_update(shape, polar, LOCAL, self._compile)
        assert self._team_group is not None
        place = split.team.index(self._position)
        team = Subgroup(self._team_group, place, len(split.team), split.divided)
        return functools.partial(
            part_update, shape=shape, polar=polar, team=team, segments=split.segments
        )

    def _send_out(
        self,
        number: int,
        updates: dict[BatchKey, MatrixBatch],
        rows: dict[BatchKey, MatrixBatch],
        active: Collection[str],
    ) -> list[Pending]:
        leaving = [self._lane.send_out(number, updates, active)]
        if with_rows := self._with_rows.intersection(active):
            leaving.append(self._row_lane.send_out(number, rows, with_rows))
        return leaving

    def _deliver(
        self, leaving: list[Pending], cargo: StepTensors, missing: dict[str, int]
    ) -> list[str]:
        if len(leaving) > 1:
            self._row_lane.deliver(leaving[1], cargo.rows)
        complete = []
        for name in self._lane.deliver(leaving[0], cargo.updates):
            missing[name] -= 1
            if not missing[name]:
                complete.append(name)
        return complete


def has_rows(polar: Polar | None) -> bool:
    """Return whether one value per row is kept from step to step."""
    if polar is None:
        return False
    norm = resolve_post_norm(polar.post_norm)
    return norm is not None and norm.row_state


def _numbered(members: Iterable[Member]) -> dict[Polar | None, str]:
    """Give every combination of options a name that is the same on all ranks."""
    kinds: dict[Polar | None, str] = {}
    for member in sorted(members, key=lambda member: member.name):
        kinds.setdefault(member.polar, f"kind {len(kinds):04}")
    return kinds


def planned(member: Member, kind: str, state: torch.dtype, device: torch.device | str) -> ParamCost:
    """Return a parameter as the plan sees it; what is only carried costs its elements.

    Args:
        member: the parameter.
        kind: see `ParamCost`.
        state: dtype of its state.
        device: that will work on it.
    """
    polar = member.polar
    if polar is None:
        sizes = tuple(math.prod(shape) for shape in shapes_of(member.layout))
        return ParamCost(name=member.name, layout=member.layout, kind=kind, flops=sizes)
    dtype = resolve_dtype(polar.dtype, state, device)
    flops = [
        ns_flops(
            shape,
            polar.coefficients.steps,
            polar.form,
            coefficients=polar.coefficients,
            dtype=dtype,
            device=device,
        )
        for shape in shapes_of(member.layout)
    ]
    short = min((min(shape) for shape in shapes_of(member.layout)), default=1)
    return ParamCost(
        name=member.name,
        layout=member.layout,
        kind=kind,
        flops=tuple(flops),
        triples=polar.coefficients.triples,
        forms=accepted_segments(polar.coefficients, polar.form, dtype, short),
    )
