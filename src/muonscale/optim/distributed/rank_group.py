"""One step of all parameters on the same ranks.

`RankGroup.updates` runs the rounds of a step. In each round the directions are collected on the
owners of their matrices, assembled into batches of one shape and updated; the updates are
distributed and delivered to all ranks that hold a piece. While a round is updated, the directions
of the next round and the updates of the last one are being sent.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.optim.distributed.assignment import (
    OwnerAssignment,
    ParamCost,
    SubgroupSplit,
    assign_owners,
    shapes_of,
)
from muonscale.optim.distributed.dtensor import group_of
from muonscale.optim.distributed.exchange import (
    BatchKey,
    Exchange,
    Locals,
    MatrixBatch,
    Payload,
    Pending,
    TrafficLog,
)
from muonscale.optim.matrices.batches import row_state_sharding
from muonscale.optim.matrices.sharding import Sharding
from muonscale.optim.newton_schulz.subgroup import Subgroup
from muonscale.optim.rules.base import BatchUpdate, MatrixUpdate, batch_update
from muonscale.optim.rules.post_norm import LOCAL


@dataclass(frozen=True, kw_only=True)
class Member:
    """A parameter of a rank group. It changes only if the options of its param group do."""

    name: str
    sharding: Sharding
    update: MatrixUpdate | None
    """None for an elementwise rule: the direction is the update, and is only exchanged."""


@dataclass(frozen=True, kw_only=True)
class StepTensors:
    """The tensors that one step exchanges, on this rank."""

    directions: Locals
    """Directions of parameters that are not `partitioned`; for the others see `whole`."""
    updates: Locals
    """Output; may share memory with the directions. Read when the first piece has arrived."""
    rows: Mapping[str, Locals]
    """Per-row state, and state per matrix element, by its name; updated in place."""
    whole: Mapping[tuple[str, int], Tensor]
    """Directions `[out, in]` of the matrices that this rank owns, by parameter name and matrix."""
    whole_rows: Mapping[str, Mapping[tuple[str, int], Tensor]]
    """Per-row state of the same matrices by its name; updated in place."""


class RankGroup:
    """Parameters on the same ranks: their assignment, process group and payloads."""

    def __init__(
        self,
        members: tuple[Member, ...],
        owners: Mapping[tuple[str, int], int],
        group: dist.ProcessGroup | None,
        rank: int,
        *,
        comm_dtype: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
        compile: bool | str = False,
    ) -> None:
        """Assign the matrices of `members` and make the routes.

        Args:
            members: parameters on the same ranks.
            owners: as for `assign_owners`.
            group: process group of these ranks; None if there is only one.
            rank: global rank of this process.
            comm_dtype: dtype of directions and updates in messages.
            dtype: dtype of the state.
            device: device of the parameters.
            compile: see `Muon`.
        """
        self.members = members
        self.assignment, self._update_of_kind = assign_members(
            members, owners, comm_dtype=comm_dtype, dtype=dtype, device=device
        )
        self.log = TrafficLog()
        self.group = group
        self._compile = compile
        self._group_rank = self.assignment.ranks.index(rank)
        exchange = Exchange(group, self._group_rank, self.log)
        shardings = [p.sharding for p in self.assignment.parameters]
        self._matrices = Payload(
            self.assignment,
            shardings,
            exchange,
            comm_dtype=comm_dtype,
            dtype=dtype,
            device=device,
        )
        self._rows = Payload(
            self.assignment,
            [row_state_sharding(sharding) for sharding in shardings],
            exchange,
            comm_dtype=dtype,
            dtype=dtype,
            device=device,
            state="row",
        )
        self._with_rows: dict[str, set[str]] = {}
        """Names of the parameters that have such a state, by the name of the state."""
        self._payloads: dict[str, Payload] = {}
        """The payload of each state."""
        for member in members:
            if member.update is None:
                continue
            for key in (*member.update.row_states, *member.update.element_states):
                self._with_rows.setdefault(key, set()).add(member.name)
            self._payloads |= dict.fromkeys(member.update.row_states, self._rows)
            if missing := set(member.update.element_states) - self._payloads.keys():
                elements = Payload(
                    self.assignment,
                    shardings,
                    exchange,
                    comm_dtype=dtype,
                    dtype=dtype,
                    device=device,
                    state="element",
                )
                self._payloads |= dict.fromkeys(missing, elements)
        self._subgroup: dist.ProcessGroup | None = None
        size = self.assignment.subgroup_size
        if size > 1:
            first = self._group_rank - self._group_rank % size
            self._subgroup = group_of(self.assignment.ranks[first : first + size])

    @property
    def names(self) -> frozenset[str]:
        """The names of its parameters."""
        return frozenset(member.name for member in self.members)

    def count_matrices(self, active: Collection[str]) -> int:
        """Return the number of matrices of the `active` parameters, over all ranks."""
        parameters = self.assignment.parameters
        return sum(parameters[task.parameter].name in active for task in self.assignment.tasks)

    def updates(
        self, tensors: StepTensors, active: Collection[str], mask: Tensor | None = None
    ) -> Iterator[list[str]]:
        """Write the updates of `active` parameters, and yield the names of those that are complete.

        All ranks of the group have to call it with the same names, and to exhaust it. The row state
        of a parameter is complete with its update. It stays as it is if `mask` (0-D bool) is false.
        """
        missing = self._matrices.count_deliveries(active)
        if without_pieces := [name for name, count in missing.items() if not count]:
            yield without_pieces
        collected = self._collect(0, tensors, active)
        distributed: deque[dict[str, Pending]] = deque()
        for number in range(self.assignment.rounds):
            following = self._collect(number + 1, tensors, active)
            updates, rows = self._update(number, collected, tensors, active, mask)
            distributed.append(self._distribute(number, updates, rows, active))
            collected = following
            if len(distributed) > 1:
                yield self._deliver(distributed.popleft(), tensors, missing)
        while distributed:
            yield self._deliver(distributed.popleft(), tensors, missing)

    def _active_rows(self, active: Collection[str]) -> Iterator[tuple[str, set[str]]]:
        """Yield each state of matrices, with the names of the `active` parameters that have it."""
        for key in sorted(self._with_rows):
            if names := self._with_rows[key].intersection(active):
                yield key, names

    def _collect(
        self, number: int, tensors: StepTensors, active: Collection[str]
    ) -> dict[str, Pending]:
        if number == self.assignment.rounds:
            return {}
        pending = {"": self._matrices.collect(number, tensors.directions, active)}
        for key, names in self._active_rows(active):
            pending[key] = self._payloads[key].collect(number, tensors.rows[key], names)
        return pending

    def _update(
        self,
        number: int,
        collected: dict[str, Pending],
        tensors: StepTensors,
        active: Collection[str],
        mask: Tensor | None,
    ) -> tuple[dict[BatchKey, MatrixBatch], dict[str, dict[BatchKey, MatrixBatch]]]:
        """Return the updates and the new per-row state of the matrices of this rank."""
        batches = self._matrices.assemble(number, collected[""], tensors.whole, active)
        rows = {
            name: self._payloads[name].assemble(
                number, collected[name], tensors.whole_rows[name], names
            )
            for name, names in self._active_rows(active)
        }
        updates: dict[BatchKey, MatrixBatch] = {}
        for key, batch in batches.items():
            kind, shape, split = key
            update = self._update_of_kind[kind]
            if update is None:
                updates[key] = batch
                continue
            own = {
                name: found[key].values[..., : 1 if self._payloads[name] is self._rows else None]
                for name, found in rows.items()
                if key in found
            }
            U_NMK, new = self.find_update(shape, update, split)(batch.values, own)
            updates[key] = MatrixBatch(batch.tasks, U_NMK)
            for name, V_NM1 in new.items():
                if mask is not None:
                    V_NM1 = torch.where(mask, V_NM1, own[name])
                batch, whole = rows[name][key], tensors.whole_rows[name]
                batch.values.copy_(V_NM1.expand_as(batch.values))
                for task, values in zip(batch.tasks, batch.values.unbind(), strict=True):
                    matrix = self.assignment.parameters[task.parameter].name, task.matrix
                    if matrix in whole:
                        whole[matrix].copy_(values)
        return updates, rows

    def find_update(
        self, shape: tuple[int, int], update: MatrixUpdate, split: SubgroupSplit | None = None
    ) -> BatchUpdate:
        """Return the update of matrices of `shape`, whole on this rank or shared by a subgroup."""
        if split is None:
            return batch_update(update, shape, LOCAL, self._compile)
        assert self._subgroup is not None
        place = split.group_ranks.index(self._group_rank)
        subgroup = Subgroup(self._subgroup, place, len(split.group_ranks), split.divided)
        return functools.partial(
            update.update_part, shape=shape, subgroup=subgroup, segments=split.segments
        )

    def _distribute(
        self,
        number: int,
        updates: dict[BatchKey, MatrixBatch],
        rows: dict[str, dict[BatchKey, MatrixBatch]],
        active: Collection[str],
    ) -> dict[str, Pending]:
        pending = {"": self._matrices.distribute(number, updates, active)}
        for key, names in self._active_rows(active):
            pending[key] = self._payloads[key].distribute(number, rows[key], names)
        return pending

    def _deliver(
        self, distributed: dict[str, Pending], tensors: StepTensors, missing: dict[str, int]
    ) -> list[str]:
        for key, pending in distributed.items():
            if key:
                self._payloads[key].deliver(pending, tensors.rows[key])
        complete = []
        for name in self._matrices.deliver(distributed[""], tensors.updates):
            missing[name] -= 1
            if not missing[name]:
                complete.append(name)
        return complete


def assign_members(
    members: Sequence[Member],
    owners: Mapping[tuple[str, int], int] | None = None,
    *,
    comm_dtype: torch.dtype,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[OwnerAssignment, dict[str, MatrixUpdate | None]]:
    """Assign the matrices of the parameters of a rank group; needs no process group.

    Args:
        members: parameters on the same ranks.
        owners: as for `assign_owners`.
        comm_dtype: dtype of directions and updates in messages.
        dtype: dtype of the state.
        device: device that computes the updates.

    Returns:
        The assignment, and the update of every kind in it (see `ParamCost`).
    """
    # Each set of options gets a kind, a name that is the same on all ranks.
    kinds: dict[MatrixUpdate | None, str] = {}
    for member in sorted(members, key=lambda member: member.name):
        kinds.setdefault(member.update, f"kind {len(kinds):04}")
    costs = [cost_of(m, kinds[m.update], dtype, device) for m in members]
    assignment = assign_owners(costs, owners=owners, comm_bytes=comm_dtype.itemsize)
    return assignment, {kind: update for update, kind in kinds.items()}


def cost_of(member: Member, kind: str, state: torch.dtype, device: torch.device | str) -> ParamCost:
    """Return the cost of a parameter. An elementwise update costs one FLOP per element.

    Args:
        member: the parameter.
        kind: see `ParamCost`.
        state: dtype of its state.
        device: device that computes the update.
    """
    update = member.update
    shapes = shapes_of(member.sharding)
    if update is None:
        sizes = tuple(math.prod(shape) for shape in shapes)
        return ParamCost(name=member.name, sharding=member.sharding, kind=kind, flops=sizes)
    short = min((min(shape) for shape in shapes), default=1)
    triples, forms = update.splits(short, state, device)
    return ParamCost(
        name=member.name,
        sharding=member.sharding,
        kind=kind,
        flops=tuple(update.flops(shape, state, device) for shape in shapes),
        triples=tuple(triples),
        forms=tuple(forms),
        polar_runs=tuple(map(update.polar_runs, shapes)),
    )
