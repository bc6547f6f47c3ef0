"""Agreement of ranks before a step: on parameters, options, gradients, and that all are finite.

The ranks of each set compare digests of what must be the same in one small message of one length,
so that ranks that disagree do not wait for each other in a later one. Only if digests differ, they
tell each other what they have. A parameter is left out of the step if it has no gradient on any
rank. If it has one on only some ranks, the others use zeros if the parameter is sharded; for a
replicated parameter it is an error, because the replicas would diverge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from muonscale.errors import ConfigError, LayoutError, MuonscaleError, shown
from muonscale.optim.rules.nonfinite import FiniteCheck, answer


@dataclass(frozen=True)
class Presence:
    """The gradient of one parameter on this rank."""

    here: bool
    """Whether this rank has one."""
    moved: bool = False
    """Whether its placements differ from the parameter's. All ranks must then redistribute it."""


@dataclass(frozen=True, kw_only=True)
class RankReport:
    """What must be the same on all ranks of a set, as one of them has it."""

    error: MuonscaleError | None = None
    """Why this rank cannot take the step. Then no rank can."""
    parameters: Mapping[str, str]
    """Shape, dtype and sharding of each parameter by name."""
    options: Mapping[str, Mapping[str, object]]
    """Options of the group of each parameter by name. Parameters of a group have the same object."""

    def digest(self) -> bytes:
        """Return a digest, the same in every process."""
        texts = {
            number: repr(sorted(options.items()))
            for number, options in {id(o): o for o in self.options.values()}.items()
        }
        lines = [
            f"{name}|{self.parameters[name]}|{texts[id(self.options[name])]}"
            for name in sorted(self.parameters)
        ]
        return "\n".join([repr(self.error), *lines]).encode()


def agree_on_settings(
    report: RankReport, present: Sequence[Presence], group: dist.ProcessGroup, device: torch.device
) -> bool:
    """Return whether all ranks of a group have gradients of the same parameters.

    Args:
        report: what this rank has.
        present: gradients of the parameters on this rank, in the order of their names.
        group: process group of the ranks.
        device: as for `agree_on_presence`.

    Raises:
        MuonscaleError: the error of a rank that has one, on all ranks.
        LayoutError: if the ranks have different parameters.
        ConfigError: if the options of a parameter differ.
    """
    gradients = bytes(p.here + 2 * p.moved for p in present)
    digests = [_number(report.digest()), _number(gradients)]
    message = torch.tensor([digests, [-digest for digest in digests]], device=_place(group, device))
    dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    largest, negated = message.tolist()
    settings, gradients_agree = (a == -b for a, b in zip(largest, negated, strict=True))
    if not settings:
        reports: list[RankReport | None] = [None] * dist.get_world_size(group)
        dist.all_gather_object(reports, report, group=group)
        ranks = dist.get_process_group_ranks(group)
        raise _difference(
            {rank: r for rank, r in zip(ranks, reports, strict=True) if r is not None}
        )
    if report.error is not None:
        raise report.error
    return gradients_agree


def _number(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest())


def _place(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Return the device of a message that the host reads: the CPU if the group can send from it."""
    return torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device


def _difference(reports: Mapping[int, RankReport]) -> MuonscaleError:
    """Return the error that says what differs between ranks, the same on all of them."""
    for rank, report in reports.items():
        if report.error is not None:
            return type(report.error)(f"{report.error} (on rank {rank})")
    (first, one), *others = reports.items()
    for rank, other in others:
        for name in sorted(one.parameters.keys() ^ other.parameters.keys()):
            there, missing = (first, rank) if name in one.parameters else (rank, first)
            return LayoutError(
                f"{name} is in a group of the optimizer on rank {there} and in none on rank "
                f"{missing}. {_BUILD}"
            )
        for name, here in sorted(one.parameters.items()):
            if here != other.parameters[name]:
                return LayoutError(
                    f"{name} is {here} on rank {first} and {other.parameters[name]} on rank "
                    f"{rank}. {_BUILD}"
                )
        for name, key in _differing_options(one, other):
            return ConfigError(
                f"{key} of {name} is {shown(one.options[name][key])} on rank {first} and "
                f"{shown(other.options[name][key])} on rank {rank}. Give the optimizer the same "
                "options on all ranks, and step its scheduler on all of them"
            )
    return LayoutError(f"ranks {', '.join(map(str, reports))} do not agree. {_BUILD}")


def _differing_options(one: RankReport, other: RankReport) -> Iterator[tuple[str, str]]:
    """Yield (parameter, option) for each option that differs."""
    for name in sorted(one.options):
        for key, value in one.options[name].items():
            if repr(other.options[name].get(key)) != repr(value):
                yield name, key


_BUILD = "Build the model and the optimizer identically on all ranks"


def agree_on_presence(
    names: Sequence[str],
    present: Sequence[Presence],
    replicated: Sequence[bool],
    group: dist.ProcessGroup,
    device: torch.device,
) -> list[bool]:
    """Return which parameters take part in the step, the same on all ranks.

    Args:
        names: names of the parameters, the same on all ranks.
        present: gradients of the parameters on this rank.
        replicated: whether each parameter is replicated on all ranks.
        group: process group of the ranks.
        device: device of the gradients. The host waits for it unless the group has a CPU backend.

    Raises:
        LayoutError: if a gradient is missing on some ranks and zeros cannot replace it.
    """
    rows = [[p.here for p in present], [not p.here for p in present], [p.moved for p in present]]
    message = torch.tensor(rows, dtype=torch.int32, device=_place(group, device))
    dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    anywhere, missing, moved = message.tolist()
    for name, some, not_all, differs, replicas in zip(
        names, anywhere, missing, moved, replicated, strict=True
    ):
        if some and not_all and replicas:
            raise LayoutError(
                f"{name} is replicated, but has a gradient on some ranks and none on others, so the "
                "replicas would diverge. Reduce the gradients before the step; with "
                "DistributedDataParallel, set find_unused_parameters=True"
            )
        if some and not_all and differs:
            raise LayoutError(
                f"{name} has a gradient on some ranks and none on others, and the placements of the "
                "gradient differ from the parameter's. Set a gradient of zeros on the ranks that "
                "have none"
            )
    return [bool(some) for some in anywhere]


def agree_on_finite(
    check: FiniteCheck, names: Sequence[str], groups: Sequence[dist.ProcessGroup]
) -> FiniteCheck:
    """Return the combined check of all ranks of all groups.

    Args:
        check: check of this rank. It may lack some of `names`.
        names: names of all parameters that are on several ranks, the same on all ranks.
        groups: process groups from small to large. The last one contains the others.
    """
    places = {name: i for i, name in enumerate(names)}
    message = torch.zeros(len(names) + 1, dtype=torch.int32, device=check.on_device.device)
    if check.names == list(names):  # one copy instead of one for each parameter
        message[:-1] = check.on_device
    else:
        for name, at_fault in zip(check.names, check.on_device, strict=True):
            place = message[places.get(name, len(names))]
            torch.maximum(place, at_fault, out=place)
    for group in groups:
        dist.all_reduce(message, dist.ReduceOp.MAX, group=group)
    return answer([*names, "a parameter of one process alone"], message)


def check_same(digest: str, group: dist.ProcessGroup) -> None:
    """Raise LayoutError if two ranks of a group have different digests."""
    digests: list[str | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(digests, digest, group=group)
    if len(set(digests)) != 1:
        ranks = dist.get_process_group_ranks(group)
        other = next(rank for rank, d in zip(ranks, digests, strict=True) if d != digests[0])
        raise LayoutError(
            f"ranks {ranks[0]} and {other} have assigned matrices to other ranks: their groups have "
            f"parameters in another order, or got them in another order. {_BUILD}"
        )


def total(value: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Return the sum of a tensor over a group, or the tensor itself if the group is None."""
    if group is None:
        return value
    value = value.clone()
    dist.all_reduce(value, group=group)
    return value
