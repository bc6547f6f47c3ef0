"""The layout, micro-batch and checkpointing that a configuration should have on some devices.

`layouts` lists the arrangements of the devices. In each of them the largest micro-batch that fits
is taken, without and with activation checkpointing. `suggest` estimates their steps; the fastest is
the first, and of equally fast ones that with the lowest peak.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, parse_override
from muonscale.lab.console import bytes_text, seconds_text
from muonscale.lab.devices import Device, find_device
from muonscale.lab.estimate.activations import Activations, activation_bytes
from muonscale.lab.estimate.estimate import estimate_plan, peak_memory
from muonscale.lab.estimate.flops import step_flops
from muonscale.lab.estimate.resolve import PlanRequest, ResolvedPlan, check_world, resolve
from muonscale.lab.estimate.workload import make_workload
from muonscale.lab.models.structure import expert_modules
from muonscale.lab.parallel.topology import Topology
from muonscale.lab.targets import is_model, resolve_target

ROOM = 0.8
"""Share of a device's memory that the peak may have. The estimate does not count the allocator's
fragmentation and the workspaces of libraries; assumption."""

CHOSEN = ("micro_batch_tokens", "activation_checkpointing", "compile")
"""Keys of `train.*` that are chosen, besides the section `parallel`."""

SAME = 1e-3
"""Steps whose times differ by less than this share are equally fast."""

BEHIND = {
    "passes": "repeats the forward pass",
    "exposed": "waits for parameters and gradients",
    "activations": "waits for activations of other devices",
    "newton_schulz": "shares Newton-Schulz less evenly",
    "exchange": "waits for Muon's exchange",
    "elementwise": "updates more elements on a device",
}
"""Why a step is slower, by the part of its time that grows most."""


@dataclass(frozen=True)
class Candidate:
    """A layout with a micro-batch."""

    planned: ResolvedPlan
    peak: int
    """Bytes of the device with the most."""
    activations: Activations

    @property
    def topology(self) -> Topology:
        """The layout."""
        return self.planned.placement.topology

    @property
    def name(self) -> str:
        """Layout, micro-batch and checkpointing as text."""
        workload = self.planned.workload
        recomputed = ", activation checkpointing" * workload.checkpointing
        return f"{self.topology}, micro-batches of {workload.micro_tokens:,} tokens{recomputed}"


def suggest(request: PlanRequest) -> dict[str, Any]:
    """Return the best choices for a recipe as plain values, the fastest first.

    Returns:
        `choices`, a row for each with the reason of its place; `left_out`, layouts that do not fit
        or that are refused, with the reason; `config`, the sections of the recipe with the first
        choice.

    Raises:
        ConfigError: for a model without data, an option or a key that is to be chosen, and if
            nothing fits.
    """
    _check(request)
    device = find_device(request.device, inter=request.bandwidth)
    kept: list[Candidate] = []
    left_out: list[tuple[str, str]] = []
    nearest: list[Candidate] = []
    for topology in layouts(request, device):
        try:
            fitting, smallest = _candidates(request, topology, device)
        except ConfigError as error:
            left_out.append((str(topology), str(error)))
            continue
        kept += fitting
        nearest.append(smallest)
        if not fitting:
            left_out.append((smallest.name, f"needs {bytes_text(smallest.peak)}"))
    room = f"{100 * ROOM:.3g} % of {bytes_text(device.memory)}, the memory of a device"
    if not nearest:
        raise ConfigError("; ".join(f"{name}: {why}" for name, why in left_out))
    if not kept:
        best = min(nearest, key=lambda each: each.peak)
        raise ConfigError(
            f"nothing fits into {room}; the nearest is {best.name}, which needs "
            f"{bytes_text(best.peak)}: use more devices, shorter sequences or a smaller model"
        )
    facts = [(each, estimate_plan(each.planned, each.activations)) for each in kept]
    fastest = min(fact["time"]["step"] for _, fact in facts)

    def place(item: tuple[Candidate, dict[str, Any]]) -> tuple[int, int]:
        return round((item[1]["time"]["step"] / fastest - 1) / SAME), item[0].peak

    facts.sort(key=place)
    first = facts[0]
    return {
        "device": device.name,
        "devices": first[0].topology.world,
        "machines": first[1]["layout"]["machines"],
        "mfu": request.mfu,
        "room": room,
        "choices": [_row(each, fact, *first) for each, fact in facts],
        "left_out": [{"layout": name, "reason": why} for name, why in left_out],
        "config": _sections(request, first[0]),
    }


def layouts(request: PlanRequest, device: Device) -> Iterator[Topology]:
    """Yield the layouts of the devices: every kind of parallelism, tensor parallelism and a
    replica's shards within a machine."""
    world = 1 if request.devices is None else request.devices
    check_world(world, f"--devices {world}")
    local = min(world, device.ranks_per_machine)
    yield Topology(data="fsdp", shards=world)
    if world == 1:
        return
    yield Topology(data="ddp", replicas=world)
    if world > local and world % local == 0:
        yield Topology(data="hsdp", replicas=world // local, shards=local)
    powers = [2**n for n in range(1, world.bit_length()) if world % 2**n == 0]
    for size in powers:
        if size <= local:
            yield Topology(data="fsdp", shards=world // size, tensor=size, sequence=True)
    if _has_experts(request):
        for size in powers:
            yield Topology(data="fsdp", shards=world, expert=size)


def _has_experts(request: PlanRequest) -> bool:
    from muonscale.lab.models.build import meta_model

    return bool(expert_modules(meta_model(resolve_target(request.target, request.overrides)[1])))


def _check(request: PlanRequest) -> None:
    """Refuse what leaves nothing to choose, or has no batch to divide."""
    if is_model(request.target):
        raise ConfigError(
            f"{request.target} is a model without data, batch and length; --suggest takes a recipe "
            "or a YAML file, such as one from `muonscale recipes NAME`"
        )
    if request.layout is not None or request.micro_batch is not None:
        given = "--micro-batch" if request.layout is None else "--layout"
        raise ConfigError(f"{given} is what --suggest chooses; leave out one of them")
    for text in request.overrides:
        section, _, key = parse_override(text)[0].partition(".")
        if section == "parallel" or (section == "train" and key in CHOSEN):
            raise ConfigError(f"{text}: --suggest chooses this key; leave out one of them")


def _candidates(
    request: PlanRequest, topology: Topology, device: Device
) -> tuple[list[Candidate], Candidate]:
    """Return the largest micro-batches of a layout that fit, without and with checkpointing, and
    the candidate with the lowest peak.

    Checkpointing is left out where it allows no larger micro-batch.
    """
    whole = [*request.overrides, "train.micro_batch_tokens=null"]
    planned = resolve(replace(request, layout=str(topology), overrides=whole))
    flops = step_flops(planned.shape, planned.model, planned.placement, planned.workload)
    share = planned.workload.rank_tokens // planned.workload.sequence_length
    best: dict[bool, Candidate] = {}
    lowest: Candidate | None = None
    for size in _divisors(share):
        activations, fits = None, False
        for checkpointing in (False, True)[: 1 + planned.model.supports_gradient_checkpointing]:
            config = _with(planned.config, size, checkpointing)
            trial = replace(
                planned, config=config, workload=make_workload(config, topology, device)
            )
            if activations is None:
                activations = activation_bytes(trial.shape, topology, trial.workload)
            peak = peak_memory(trial, activations, flops).peak
            candidate = Candidate(trial, peak, activations)
            lowest = candidate if lowest is None or peak < lowest.peak else lowest
            if peak <= ROOM * device.memory:
                best[checkpointing], fits = candidate, True
        if not fits:
            break
    assert lowest is not None
    sizes = {key: each.planned.workload.micro_tokens for key, each in best.items()}
    if False in best and sizes.get(True) == sizes[False]:
        del best[True]
    return list(best.values()), lowest


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _with(config: Config, sequences: int, checkpointing: bool) -> Config:
    train = config.train.model_copy(
        update={
            "micro_batch_tokens": sequences * config.data.sequence_length,
            "activation_checkpointing": checkpointing,
        }
    )
    return config.model_copy(update={"train": train})


def _row(
    each: Candidate, fact: dict[str, Any], best: Candidate, fastest: dict[str, Any]
) -> dict[str, Any]:
    """Return a choice and why it is behind the first."""
    time, workload = fact["time"], each.planned.workload
    longer = time["step"] / fastest["time"]["step"] - 1
    more = each.peak - best.peak
    if each is best:
        reason = "the fastest that fits"
    elif longer < SAME:
        reason = f"as fast, needs {bytes_text(more)} more" if more else "as fast"
    else:
        parts = fastest["time"]["parts"]
        part = max(BEHIND, key=lambda name: time["parts"][name] - parts[name])
        wait = seconds_text(time["parts"][part] - parts[part])
        reason = f"{longer:.1%} slower: {BEHIND[part]}, {wait} more"
    return {
        "layout": str(each.topology),
        "micro_batch_tokens": workload.micro_tokens,
        "micro_batches": workload.micro_batches,
        "activation_checkpointing": workload.checkpointing,
        "peak": each.peak,
        "step": time["step"],
        "tokens_per_second": time["tokens_per_second"],
        "hours": time["hours"],
        "reason": reason,
    }


def _sections(request: PlanRequest, best: Candidate) -> dict[str, Any]:
    """Return the sections of the recipe with the first choice, without keys at their defaults."""
    topology, train = best.topology, best.planned.config.train
    config, _ = resolve_target(request.target, request.overrides)
    tree = config.model_dump(mode="json", exclude_unset=True)
    tree["train"] |= {
        "micro_batch_tokens": train.micro_batch_tokens,
        "activation_checkpointing": train.activation_checkpointing,
        "compile": best.planned.device.kind == "cuda",
    }
    parallel: dict[str, Any] = {"data": topology.data}
    if topology.data == "hsdp":
        parallel["replicas"] = topology.replicas
    if topology.tensor > 1:
        parallel |= {"tensor": topology.tensor, "sequence": topology.sequence}
    if topology.expert > 1:
        parallel["expert"] = topology.expert
    tree["parallel"] = parallel
    return tree
