"""What training does about attention logits: hear them, say how large they are, clip (QK-clip).

`AttentionWatch` hears the forward passes of training, and no others: evaluation and the
recomputation of activation checkpointing are outside of `listening`. In steps that are neither
sampled nor clipped the model is exactly what it is without it.
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
from muonscale.lab.models.attention import LogitStatistics, attention_modules, heard
from muonscale.lab.models.query_key import query_key_clips
from muonscale.lab.parallel.processes import Processes
from muonscale.optim.diagnostics.qk_clip import clip_factors
from muonscale.optim.muon import Muon


@dataclass(frozen=True)
class AttentionPlan:
    """What the configuration comes to for a model."""

    every: int | None
    """Steps between records; None for none."""
    tau: float | None
    """Threshold of QK-clip; None for none."""
    alpha: float

    @property
    def needed(self) -> bool:
        """Whether there is anything to hear."""
        return self.every is not None or self.tau is not None


def plan_attention(model: PreTrainedModel, config: Config) -> AttentionPlan:
    """Resolve `telemetry.attention_every` and `optimizer.qk_clip` for a model on any device.

    Raises:
        ConfigError: for a model whose attention cannot be heard, or clipped.
    """
    section = config.optimizer
    plan = AttentionPlan(config.telemetry.attention_every, section.qk_clip, section.qk_clip_alpha)
    if plan.needed:
        attention_modules(model)
    if plan.tau is not None:
        query_key_clips(model)
    return plan


def watch_attention(model: PreTrainedModel, config: Config) -> AttentionWatch | None:
    """Return what the configuration asks to be heard of a model on the ranks; None for nothing."""
    plan = plan_attention(model, config)
    return AttentionWatch(model, plan) if plan.needed else None


class AttentionWatch:
    """Hears the attention of a model while it trains, in the steps that are to be heard.

    Args:
        model: on the ranks.
        plan: when, and what for.
    """

    def __init__(self, model: PreTrainedModel, plan: AttentionPlan) -> None:
        self._model, self._plan = model, plan
        modules = attention_modules(model)
        self._names = list(modules)
        self._numbers = {module: number for number, module in enumerate(modules.values())}
        self._clips = query_key_clips(model) if plan.tau is not None else []
        self._due = self._on = False
        self._seen: dict[int, LogitStatistics] = {}
        self._watch = _Stopwatch()

    def facts(self) -> dict[str, Any]:
        """Return what is heard and done, for env.json."""
        return {"layers": self._names, **vars(self._plan)}

    def begin(self, step: int) -> None:
        """Forget what was heard: a step begins, the first being step 0."""
        every = self._plan.every
        self._due = every is not None and (step + 1) % every == 0
        self._on = self._due or self._plan.tau is not None
        self._seen = {}
        self._watch = _Stopwatch()

    @contextmanager
    def listening(self) -> Generator[None]:
        """Hear the model in this block, in steps that are heard: around a forward pass alone."""
        with heard(self._model, self._hear) if self._on else nullcontext():
            yield

    def _hear(self, module: nn.Module, statistics: Callable[[], LogitStatistics]) -> None:
        number = self._numbers[module]
        with self._watch.running():
            found = statistics()
            before = self._seen.get(number)
            self._seen[number] = found if before is None else before + found

    def finish(self, optimizer: Muon, processes: Processes) -> dict[str, Any]:
        """Clip by the logits of the step that was taken, and say how large they were: a collective.

        Args:
            optimizer: has made the step; float32 copies of weights are scaled with them.
            processes: this one and the others.

        Returns:
            In sampled steps `attention`: by layer `max_logit`, over heads, batch and ranks, and
            `share_above_100`. With QK-clip `qk_clip`: number of `heads`, how many were `clipped`,
            and the `smallest` gamma. `attention_ms`: time it took to hear. Nothing in other steps.
        """
        if not self._on:
            return {}
        layers, above_M, pairs_M = self._over_ranks(processes)
        figures: dict[str, Any] = {}
        if self._due:
            figures["attention"] = {
                "max_logit": [float(largest_H.max()) for largest_H in layers],
                "share_above_100": (above_M / pairs_M).tolist(),
            }
        if self._plan.tau is not None:
            figures["qk_clip"] = self._clip(layers, self._plan.tau, optimizer)
        return figures | {"attention_ms": 1000 * self._watch.seconds()}

    def _over_ranks(self, processes: Processes) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return the largest logit of every head by layer, and counts `[M]`, of all ranks."""
        if silent := [n for i, n in enumerate(self._names) if i not in self._seen]:
            raise ConfigError(
                f"the attention of {', '.join(silent)} was not heard: it does not go through "
                "transformers' attention interface; accepted: telemetry.attention_every=null and "
                "optimizer.qk_clip=null"
            )
        seen = [self._seen[number] for number in range(len(self._names))]
        here = [_of_all_heads(s.largest_H, self._model, processes) for s in seen]
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


def _of_all_heads(largest_H: Tensor, model: PreTrainedModel, processes: Processes) -> Tensor:
    """Return `[heads of all ranks]`, those of other tensor-parallel ranks -inf."""
    ways, heads = processes.topology.tensor, len(largest_H)
    if ways == 1 or model.config.num_attention_heads == heads:
        return largest_H
    first = processes.rank % ways * heads
    every = largest_H.new_full((heads * ways,), -torch.inf)
    every[first : first + heads] = largest_H
    return every


class _Stopwatch:
    """Adds up how long blocks take, on a GPU without waiting for it."""

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
        begun = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - begun

    def seconds(self) -> float:
        """Return the sum; waits for the last block."""
        if self._events:
            self._events[-1][1].synchronize()
        return self._seconds + sum(a.elapsed_time(b) for a, b in self._events) / 1000
