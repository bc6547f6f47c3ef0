"""Attention logits in training: record how large they are, and clip them (QK-clip).

`AttentionMonitor` records only the forward passes of training: evaluation and the recomputation of
activation checkpointing are outside of `record`. In steps that are neither recorded nor clipped the
model runs unchanged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.models.attention import LogitStatistics, attention_modules, hook_attention
from muonscale.lab.models.query_key import query_key_clips
from muonscale.lab.parallel.processes import Processes
from muonscale.optim.diagnostics.qk_clip import clip_factors
from muonscale.optim.muon import Muon


@dataclass(frozen=True)
class AttentionPlan:
    """When attention logits are recorded, and how they are clipped."""

    every: int | None
    """Steps between records; None for none."""
    tau: float | None
    """Threshold of QK-clip; None for none."""
    alpha: float

    @property
    def enabled(self) -> bool:
        """Whether logits are recorded in any step."""
        return self.every is not None or self.tau is not None


def plan_attention(model: PreTrainedModel, config: Config) -> AttentionPlan:
    """Resolve `telemetry.attention_every` and `optimizer.qk_clip` for a model on any device.

    Raises:
        ConfigError: for a model whose attention logits cannot be recorded, or clipped.
    """
    section = config.optimizer
    plan = AttentionPlan(config.telemetry.attention_every, section.qk_clip, section.qk_clip_alpha)
    if plan.enabled:
        attention_modules(model)
    if plan.tau is not None:
        query_key_clips(model)
    return plan


def monitor_attention(model: PreTrainedModel, config: Config) -> AttentionMonitor | None:
    """Return the monitor that the configuration asks for, or None."""
    plan = plan_attention(model, config)
    return AttentionMonitor(model, plan) if plan.enabled else None


class AttentionMonitor:
    """Records the attention logits of a model in training, in the steps that need them.

    Args:
        model: the model on the ranks.
        plan: when to record, and how to clip.
    """

    def __init__(self, model: PreTrainedModel, plan: AttentionPlan) -> None:
        self._model, self._plan = model, plan
        modules = attention_modules(model)
        self._names = list(modules)
        self._numbers = {module: number for number, module in enumerate(modules.values())}
        self._clips = query_key_clips(model) if plan.tau is not None else []
        self._due = self._on = False
        self._seen: dict[int, LogitStatistics] = {}
        self._stopwatch = _Stopwatch()

    def facts(self) -> dict[str, Any]:
        """Return the layers and the plan, for env.json."""
        return {"layers": self._names, **vars(self._plan)}

    def begin(self, step: int) -> None:
        """Reset the records at the beginning of a step, the first being step 0."""
        every = self._plan.every
        self._due = every is not None and (step + 1) % every == 0
        self._on = self._due or self._plan.tau is not None
        self._seen = {}
        self._stopwatch = _Stopwatch()

    @contextmanager
    def record(self) -> Generator[None]:
        """Record the logits of the forward pass in this block, in steps that need them."""

        def add(module: nn.Module, statistics: Callable[[], LogitStatistics]) -> None:
            number = self._numbers[module]
            with self._stopwatch.running():
                new, before = statistics(), self._seen.get(number)
                self._seen[number] = new if before is None else before + new

        with hook_attention(self._model, add) if self._on else nullcontext():
            yield

    def finish(self, optimizer: Muon, processes: Processes) -> dict[str, Any]:
        """Clip by the logits of the step that was taken, and return its metrics: a collective.

        Args:
            optimizer: its float32 copies of the weights are scaled with them.
            processes: the processes of the run.

        Returns:
            In recorded steps `attention`: by layer `max_logit`, over heads, batch and ranks, and
            `share_above_100`. With QK-clip `qk_clip`: number of `heads`, number of `clipped` heads,
            and the `smallest` gamma. `attention_ms`: time spent on recording. Empty in other steps.
        """
        if not self._on:
            return {}
        layers, above_M, pairs_M = self._reduce(processes)
        metrics: dict[str, Any] = {}
        if self._due:
            metrics["attention"] = {
                "max_logit": [float(largest_H.max()) for largest_H in layers],
                "share_above_100": (above_M / pairs_M).tolist(),
            }
        if self._plan.tau is not None:
            metrics["qk_clip"] = self._clip(layers, self._plan.tau, optimizer)
        return metrics | {"attention_ms": 1000 * self._stopwatch.seconds()}

    def _reduce(self, processes: Processes) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the largest logit of every head by layer, and counts `[M]`, over all ranks."""
        if missing := [n for i, n in enumerate(self._names) if i not in self._seen]:
            raise ConfigError(
                f"{', '.join(missing)} recorded no attention logits, since this model does not use "
                "transformers' attention interface; set telemetry.attention_every=null and "
                "optimizer.qk_clip=null"
            )
        seen = [self._seen[number] for number in range(len(self._names))]
        here = []
        ways = processes.topology.tensor
        for largest_H in (statistics.largest_H for statistics in seen):
            heads = len(largest_H)
            if ways > 1 and self._model.config.num_attention_heads != heads:
                # The heads of other tensor-parallel ranks are -inf here.
                first = processes.rank % ways * heads
                all_heads = largest_H.new_full((heads * ways,), -torch.inf)
                all_heads[first : first + heads] = largest_H
                largest_H = all_heads
            here.append(largest_H)
        counts = [torch.stack([s.above, s.pairs]) for s in seen]
        largest = processes.max_tensor(torch.cat(here).to(processes.device)).cpu()
        above_M, pairs_M = processes.sum_tensor(torch.stack(counts)).cpu().unbind(1)
        return list(largest.split([len(part) for part in here])), above_M, pairs_M

    def _clip(self, layers: list[Tensor], tau: float, optimizer: Muon) -> dict[str, Any]:
        masters = {p: s["master"] for p, s in optimizer.state.items() if "master" in s}
        factors = [clip_factors(largest_H, tau) for largest_H in layers]
        for clip, gamma_H in zip(self._clips, factors, strict=True):
            if bool((gamma_H < 1).any()):
                clip(gamma_H, self._plan.alpha, masters)
        every = torch.cat(factors)
        return {
            "heads": len(every),
            "clipped": int((every < 1).sum()),
            "smallest": float(every.min()),
        }


class _Stopwatch:
    """Adds up the duration of blocks. On a GPU it measures with events and does not synchronize."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self) -> Generator[None]:
        if torch.cuda.is_initialized():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            yield
            end.record()
            self._events.append((start, end))
            return
        start_seconds = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start_seconds

    def seconds(self) -> float:
        """Wait for the last block and return the sum."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1000
