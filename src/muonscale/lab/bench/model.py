"""`muonscale bench`: what a step of the optimizer takes for a model of the user's, on this machine."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from muonscale.errors import ConfigError
from muonscale.lab.bench.buckets import Part, drawn, groups_of, parts_of
from muonscale.lab.bench.contenders import (
    ADAMW,
    OURS,
    TORCH_MUON,
    WARMUP,
    Side,
    adamw,
    play,
    spread,
    torch_muon,
)
from muonscale.lab.bench.memory import check_room, free_bytes, step_needs
from muonscale.lab.bench.passes import passes_need, passes_seconds, share
from muonscale.lab.bench.rates import addmm_rate, direct_flops, weighted_rate
from muonscale.lab.estimate.memory import step_bytes
from muonscale.lab.estimate.resolve import PlanRequest, ResolvedPlan, resolve
from muonscale.lab.training.param_groups import plan_transfer
from muonscale.lab.training.setup import build_optimizer, resolve_device
from muonscale.optim.muon import Muon
from muonscale.optim.parameters.report import grouping_report
from muonscale.optim.rules import MUON

Tell = Callable[[str], None]

LONGEST = 20.0
"""Seconds of a step beyond which torch's Muon is left out, where bfloat16 is emulated."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What `muonscale bench` is asked."""

    target: str
    """As for `muonscale.lab.targets.inspect`."""
    overrides: Sequence[str] = ()
    rounds: int = 5
    threads: int | None = None
    layers: int | None = None
    """How many of the layers that repeat are measured; None for the whole model."""
    passes: bool = True
    """Whether forward and backward passes are measured."""
    tokens: int | None = None
    """Of a training step, to say the optimizer's share of; the configuration's when not given."""


@dataclass(frozen=True)
class Bench:
    """A model on a device, ready to be measured."""

    asked: Asked
    planned: ResolvedPlan
    groups: list[dict[str, Any]]
    shapes: dict[str, tuple[int, ...]]
    parts: list[Part]
    device: torch.device

    def bytes_needed(self, part: Part | None) -> int:
        """Return what measuring a part needs, or the whole model."""
        workspace = step_bytes(self.planned.placement, self.planned.device.kind, 0)
        if part is None:
            elements = sum(each.elements for each in self.parts)
            on_matrices = sum(each.elements for each in self.parts if each.on_matrices)
            return step_needs(elements, on_matrices, workspace, torch_muon=False)
        on_matrices = part.elements if part.on_matrices else 0
        most = min(workspace, 6 * 4 * part.elements)  # of a part no more than a few copies
        return step_needs(part.elements, on_matrices, most, torch_muon=part.plain)


def bench(asked: Asked, tell: Tell = lambda text: None) -> dict[str, Any]:
    """Measure a model's optimizer step and return what was found; seconds, bytes, operations.

    Raises:
        MuonscaleError: for a target or an override that cannot be used.
        ConfigError: for what does not fit into memory; nothing has been allocated then.
    """
    ready = _prepare(asked)
    with _threads(asked.threads or ready.planned.config.run.threads):
        _check_room(ready)
        rows = [_measure_part(ready, part, tell) for part in ready.parts]
        whole = None if asked.layers is not None else _measure_whole(ready, tell)
        passes = _passes(ready, tell)
        return _facts(ready, rows, whole, passes)


def _prepare(asked: Asked) -> Bench:
    for name, value in (("rounds", asked.rounds), ("layers", asked.layers)):
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: at least 1")
    config = resolve(
        PlanRequest(target=asked.target, overrides=asked.overrides, device="cpu")
    ).config
    device = resolve_device(config.run.device)
    kind = "cpu" if device.type == "cpu" else "h100"
    planned = resolve(PlanRequest(target=asked.target, overrides=asked.overrides, device=kind))
    length, tokens = planned.workload.sequence_length, asked.tokens
    if tokens is not None and (tokens < 1 or tokens % length):
        raise ConfigError(
            f"--tokens {tokens}: accepted are multiples of data.sequence_length={length}"
        )
    transfer = plan_transfer(config, planned.shape)
    groups = build_optimizer(planned.model, config.optimizer, transfer=transfer).param_groups
    report = grouping_report(groups, planned.model)
    shapes = {row.name: row.shape for row in report.rows}
    return Bench(asked, planned, groups, shapes, parts_of(report.rows, asked.layers), device)


@contextmanager
def _threads(number: int | None) -> Generator[None]:
    former = torch.get_num_threads()
    torch.set_num_threads(number or former)
    try:
        yield
    finally:
        torch.set_num_threads(former)


def _check_room(ready: Bench) -> None:
    for part in [*ready.parts, *([] if ready.asked.layers is not None else [None])]:
        what = "the whole model" if part is None else f"parameters {part.title}"
        remedy = (
            "measure some of the layers with --layers 1; the rest is extrapolated"
            if ready.asked.layers is None
            else "this machine cannot measure it: use fewer --layers, or a machine with more memory"
        )
        check_room(ready.bytes_needed(part), ready.device, f"measuring {what}", remedy)


def _measure_part(ready: Bench, part: Part, tell: Tell) -> dict[str, Any]:
    """Return the row of a part: ours, AdamW and, where it can, torch's Muon."""
    tell(f"{part.title}: first steps")
    ours, others = _sides(ready, part.names)
    products = ready.planned.placement.matrices[0].products_dtype if part.on_matrices else None
    reason = _no_torch_muon(part, ready.device)
    if reason is None:
        parameters = [p for group in ours.optimizer.param_groups for p in group["params"]]
        others.append(Side(TORCH_MUON, torch_muon(parameters), ready.device))
    found = _play(ready, part.title, ours, others, tell)
    row: dict[str, Any] = {
        "title": part.title,
        "rule": part.rule,
        "parameters": part.count,
        "measured": len(part.names),
        "scale": part.scale,
        "matrices": sum(number for number, _, _ in part.matrices),
        "sides": found,
        "no_torch_muon": reason,
    }
    if products is not None:
        matrix_rate = weighted_rate(part.matrices, products, ready.device)
        rate = found[OURS]["flops"] / found[OURS]["seconds"]["median"]
        row |= {"newton_schulz_flops": round(found[OURS]["flops"] * part.scale)}
        row |= {"flops_per_second": rate, "addmm_flops_per_second": matrix_rate}
    return row


def _sides(ready: Bench, names: Sequence[str]) -> tuple[Side, list[Side]]:
    """Return ours and AdamW on parameters of these names, which are drawn here."""
    parameters = drawn({name: ready.shapes[name] for name in names}, ready.device)
    options = _options(ready)
    ours = Muon(groups_of(ready.groups, parameters), **options)
    return (
        Side(OURS, ours, ready.device),
        [Side(ADAMW, adamw(list(parameters.values())), ready.device)],
    )


def _options(ready: Bench) -> dict[str, Any]:
    """Return what a group does not say: groups of an optimizer have its other options already."""
    return {"nonfinite": ready.planned.config.optimizer.nonfinite}


def _play(
    ready: Bench, title: str, ours: Side, others: Sequence[Side], tell: Tell
) -> dict[str, dict[str, Any]]:
    rounds = ready.asked.rounds
    found = play(ours, others, rounds, lambda n: tell(f"{title}: round {n + 1} of {rounds}"))
    gc.collect()
    return found


def _no_torch_muon(part: Part, device: torch.device) -> str | None:
    """Return why torch's Muon does not step a part, None where it does."""
    if part.rule != MUON.name:
        return f"not on {MUON.title}"
    if not part.plain:
        return "it takes 2-D parameters alone"
    flops = sum(n * direct_flops(out, in_) for n, out, in_ in part.matrices) / part.scale
    rate = addmm_rate(*part.matrices[0][1:], torch.bfloat16, device)
    if flops / rate > LONGEST / (WARMUP + 2):
        return (
            f"bfloat16 products, the only ones it has, run at {rate / 1e9:.1f} GFLOP/s here: a step "
            f"would take about {flops / rate:.0f} s"
        )
    return None


def _measure_whole(ready: Bench, tell: Tell) -> dict[str, Any]:
    tell("whole model: first steps")
    ours, others = _sides(ready, [name for part in ready.parts for name in part.names])
    return _play(ready, "whole model", ours, others, tell)


def _passes(ready: Bench, tell: Tell) -> dict[str, Any]:
    """Return the seconds of a micro-batch, or why they were not measured."""
    if not ready.asked.passes:
        return {"not_measured": "--no-model"}
    if (needed := passes_need(ready.planned)) > (free := free_bytes(ready.device)):
        return {
            "not_measured": f"it needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free; "
            "train.micro_batch_tokens and train.activation_checkpointing make it less"
        }
    planned, micro = ready.planned, ready.planned.workload.micro_tokens
    tell("forward and backward")
    seconds = passes_seconds(planned.config, planned.shape, micro, ready.asked.rounds, ready.device)
    return {"micro_tokens": micro, "seconds": spread(seconds)}


def _facts(
    ready: Bench, rows: list[dict[str, Any]], whole: dict[str, Any] | None, passes: dict[str, Any]
) -> dict[str, Any]:
    planned, asked = ready.planned, ready.asked
    sums = {
        name: sum(row["sides"][name]["seconds"]["median"] * row["scale"] for row in rows)
        for name in (OURS, ADAMW)
    }
    step = {name: side["seconds"]["median"] for name, side in whole.items()} if whole else sums
    tokens = asked.tokens or planned.workload.batch_tokens
    found = {
        "model": asked.target,
        "parameters": planned.placement.elements,
        "device": str(ready.device),
        "threads": torch.get_num_threads(),
        "products": _products(ready),
        "rounds": asked.rounds,
        "layers": asked.layers,
        "defaults": list(planned.defaults),
        "parts": rows,
        "sum_of_parts": sums,
        "whole": whole,
        "passes": passes,
        "tokens": tokens,
    }
    if "seconds" in passes:
        parts = tokens / passes["micro_tokens"]
        once = passes["seconds"]["median"]
        found["share"] = {name: share(seconds, once, parts) for name, seconds in step.items()}
    return found


def _products(ready: Bench) -> str | None:
    dtypes = {
        str(group.products_dtype).removeprefix("torch.")
        for group in ready.planned.placement.matrices
    }
    return ", ".join(sorted(dtypes)) or None


def measured_json(found: dict[str, Any]) -> str:
    """Return what was found as JSON."""
    return json.dumps(found, indent=2)
