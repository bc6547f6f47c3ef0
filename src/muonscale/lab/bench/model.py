"""`muonscale bench`: how long an optimizer step takes for a model on this machine."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from muonscale.errors import ConfigError
from muonscale.lab.bench.buckets import Bucket, make_buckets, make_parameters, select_groups
from muonscale.lab.bench.contenders import (
    ADAMW,
    OURS,
    TORCH_MUON,
    WARMUP,
    Contender,
    make_adamw,
    make_torch_muon,
    run_rounds,
    spread,
)
from muonscale.lab.bench.memory import check_memory, free_bytes, step_needs
from muonscale.lab.bench.passes import passes_need, time_passes
from muonscale.lab.bench.rates import addmm_rate, direct_flops, weighted_rate
from muonscale.lab.console import bytes_text, dtype_text
from muonscale.lab.estimate.memory import step_bytes
from muonscale.lab.estimate.resolve import PlanRequest, ResolvedPlan, resolve
from muonscale.lab.training.param_groups import plan_transfer
from muonscale.lab.training.setup import build_optimizer, resolve_device
from muonscale.optim.muon import Muon
from muonscale.optim.parameters.report import grouping_report
from muonscale.optim.rules import MUON

Tell = Callable[[str], None]

LONGEST = 20.0
"""Where bfloat16 is emulated, torch's Muon is left out if its steps would take more seconds."""


@dataclass(frozen=True, kw_only=True)
class BenchRequest:
    """The arguments of `muonscale bench`."""

    target: str
    """As for `muonscale.lab.targets.inspect`."""
    overrides: Sequence[str] = ()
    rounds: int = 5
    threads: int | None = None
    layers: int | None = None
    """How many of the repeated layers are measured; None for the whole model."""
    passes: bool = True
    """Whether forward and backward passes are measured."""
    tokens: int | None = None
    """Tokens of the training step that the optimizer is a share of; None for train.batch_tokens."""


def bench(request: BenchRequest, tell: Tell = lambda text: None) -> dict[str, Any]:
    """Measure a model's optimizer step and return seconds, bytes and operations.

    Raises:
        MuonscaleError: for a target or an override that cannot be used.
        ConfigError: for a measurement that does not fit into memory, before anything is allocated.
    """
    measurement = Measurement(request, tell)
    threads = torch.get_num_threads()
    torch.set_num_threads(request.threads or measurement.planned.config.run.threads or threads)
    try:
        return measurement.run()
    finally:
        torch.set_num_threads(threads)


class Measurement:
    """A model on a device, ready to be measured."""

    def __init__(self, request: BenchRequest, tell: Tell = lambda text: None) -> None:
        for name, value in (("rounds", request.rounds), ("layers", request.layers)):
            if value is not None and value < 1:
                raise ConfigError(f"--{name} {value}: at least 1")

        def plan(device: str) -> ResolvedPlan:
            words = request.overrides
            return resolve(PlanRequest(target=request.target, overrides=words, device=device))

        planned = plan("cpu")
        config = planned.config
        self.request, self.tell = request, tell
        self.device = resolve_device(config.run.device)
        self.planned = planned if self.device.type == "cpu" else plan("h100")
        length, tokens = self.planned.workload.sequence_length, request.tokens
        if tokens is not None and (tokens < 1 or tokens % length):
            raise ConfigError(
                f"--tokens {tokens} is not a multiple of data.sequence_length={length}"
            )
        transfer = plan_transfer(config, self.planned.shape)
        optimizer = build_optimizer(self.planned.model, config.optimizer, transfer=transfer)
        self.groups = optimizer.param_groups
        report = grouping_report(self.groups, self.planned.model)
        self.shapes = {row.name: row.shape for row in report.rows}
        self.buckets = make_buckets(report.rows, request.layers)

    def run(self) -> dict[str, Any]:
        """Measure every bucket, the whole model if asked for, and the passes."""
        request, planned = self.request, self.planned
        extrapolated = request.layers is not None
        for bucket in [*self.buckets, *([] if extrapolated else [None])]:
            what = "the whole model" if bucket is None else f"parameters {bucket.title}"
            remedy = (
                "use fewer --layers, or a machine with more memory"
                if extrapolated
                else "measure some of the layers with --layers 1, and extrapolate the rest"
            )
            check_memory(self.bytes_needed(bucket), self.device, f"measuring {what}", remedy)
        rows = [self._measure_bucket(bucket) for bucket in self.buckets]
        whole = None
        if not extrapolated:
            self.tell("whole model: first steps")
            names = [name for bucket in self.buckets for name in bucket.names]
            whole = self._time("whole model", *self._contenders(names))
        passes = self._measure_passes()
        sums = {
            name: sum(row["sides"][name]["seconds"]["median"] * row["scale"] for row in rows)
            for name in (OURS, ADAMW)
        }
        dtypes = {dtype_text(matrix.products_dtype) for matrix in planned.placement.matrices}
        tokens = request.tokens or planned.workload.batch_tokens
        facts = {
            "model": request.target,
            "parameters": planned.placement.elements,
            "device": str(self.device),
            "threads": torch.get_num_threads(),
            "products": ", ".join(sorted(dtypes)) or None,
            "rounds": request.rounds,
            "layers": request.layers,
            "defaults": list(planned.defaults),
            "parts": rows,
            "sum_of_parts": sums,
            "whole": whole,
            "passes": passes,
            "tokens": tokens,
        }
        if "seconds" in passes:
            step = {n: c["seconds"]["median"] for n, c in whole.items()} if whole else sums
            rest = tokens / passes["micro_tokens"] * passes["seconds"]["median"]
            facts["share"] = {name: own / (own + rest) for name, own in step.items()}
        return facts

    def bytes_needed(self, bucket: Bucket | None) -> int:
        """Return the bytes that measuring a bucket needs; None is the whole model."""
        workspace = step_bytes(self.planned.placement, self.planned.device.kind, 0)
        if bucket is None:
            elements = sum(each.elements for each in self.buckets)
            on_matrices = sum(each.elements for each in self.buckets if each.on_matrices)
            return step_needs(elements, on_matrices, workspace, torch_muon=False)
        on_matrices = bucket.elements if bucket.on_matrices else 0
        workspace = min(workspace, 6 * 4 * bucket.elements)  # a few copies of the bucket at most
        return step_needs(
            bucket.elements, on_matrices, workspace, torch_muon=bucket.fits_torch_muon
        )

    def _measure_bucket(self, bucket: Bucket) -> dict[str, Any]:
        """Return the row of a bucket: ours, AdamW and, where possible, torch's Muon."""
        self.tell(f"{bucket.title}: first steps")
        ours, others = self._contenders(bucket.names)
        reason = self._no_torch_muon(bucket)
        if reason is None:
            parameters = [p for group in ours.optimizer.param_groups for p in group["params"]]
            others.append(Contender(TORCH_MUON, make_torch_muon(parameters), self.device))
        facts = self._time(bucket.title, ours, others)
        row: dict[str, Any] = {
            "title": bucket.title,
            "rule": bucket.rule,
            "parameters": bucket.count,
            "measured": len(bucket.names),
            "scale": bucket.scale,
            "matrices": sum(number for number, _, _ in bucket.matrices),
            "sides": facts,
            "no_torch_muon": reason,
        }
        if bucket.on_matrices:
            products = self.planned.placement.matrices[0].products_dtype
            matrix_rate = weighted_rate(bucket.matrices, products, self.device)
            rate = facts[OURS]["flops"] / facts[OURS]["seconds"]["median"]
            row |= {"newton_schulz_flops": round(facts[OURS]["flops"] * bucket.scale)}
            row |= {"flops_per_second": rate, "addmm_flops_per_second": matrix_rate}
        return row

    def _contenders(self, names: Sequence[str]) -> tuple[Contender, list[Contender]]:
        """Return ours and AdamW on new parameters of these names."""
        parameters = make_parameters({name: self.shapes[name] for name in names}, self.device)
        # The groups have all options but this one.
        nonfinite = self.planned.config.optimizer.nonfinite
        ours = Muon(select_groups(self.groups, parameters), nonfinite=nonfinite)
        adamw = make_adamw(list(parameters.values()))
        return Contender(OURS, ours, self.device), [Contender(ADAMW, adamw, self.device)]

    def _time(
        self, title: str, ours: Contender, others: Sequence[Contender]
    ) -> dict[str, dict[str, Any]]:
        rounds = self.request.rounds
        facts = run_rounds(
            ours, others, rounds, lambda n: self.tell(f"{title}: round {n + 1} of {rounds}")
        )
        gc.collect()
        return facts

    def _no_torch_muon(self, bucket: Bucket) -> str | None:
        """Return why torch's Muon does not step a bucket, or None if it does."""
        if bucket.rule != MUON.name:
            return f"not on {MUON.title}"
        if not bucket.fits_torch_muon:
            return "it takes 2-D parameters alone"
        flops = sum(n * direct_flops(out, in_) for n, out, in_ in bucket.matrices) / bucket.scale
        rate = addmm_rate(*bucket.matrices[0][1:], torch.bfloat16, self.device)
        if flops / rate > LONGEST / (WARMUP + 2):
            return (
                f"its bfloat16 products run at {rate / 1e9:.1f} GFLOP/s here, so that a step would "
                f"take about {flops / rate:.0f} s"
            )
        return None

    def _measure_passes(self) -> dict[str, Any]:
        """Return the seconds of a micro-batch, or why they were not measured."""
        if not self.request.passes:
            return {"not_measured": "--no-model"}
        planned = self.planned
        if (needed := passes_need(planned)) > (free := free_bytes(self.device)):
            return {
                "not_measured": f"it needs about {bytes_text(needed)}, and {bytes_text(free)} are "
                "free; set train.micro_batch_tokens or train.activation_checkpointing"
            }
        self.tell("forward and backward")
        micro = planned.workload.micro_tokens
        seconds = time_passes(
            planned.config, planned.shape, micro, self.request.rounds, self.device
        )
        return {"micro_tokens": micro, "seconds": spread(seconds)}
