"""The routers of a mixture of experts in training: count loads, balance them, report them.

`RouterBalance` records the decisions of routers in the forward passes of training only: evaluation
and the recomputation of activation checkpointing are outside of `record`. A token therefore counts
once in every layer.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import RoutingSection
from muonscale.lab.models.moe.routers import (
    BIAS,
    SCORES,
    Routers,
    find_routers,
    holds_stacks,
    router_outputs,
    score_of,
)
from muonscale.lab.models.moe.routing import (
    BiasUpdateT,
    affinities,
    bias_step,
    expert_loads,
    router_entropy,
    routing_statistics,
    sequence_balance,
)
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.schedule import Span

AUTO_RATE = 1e-3
"""Bias rate of `auto`, as in Moonlight and DeepSeek-V3."""


@dataclass(frozen=True)
class RoutingPlan:
    """`routing.*`, resolved for a model and a run."""

    bias_rates: tuple[tuple[int, float], ...]
    """(end step, rate) in order; empty if biases are not updated."""
    bias_update: BiasUpdateT
    aux_loss: float | None
    """Coefficient of the auxiliary loss."""

    def rate_at(self, step: int) -> float:
        """Return the bias rate of a step, the first being step 0."""
        return next((rate for end, rate in self.bias_rates if step < end), 0.0)


def plan_routing(
    model: PreTrainedModel, section: RoutingSection, stages: Sequence[Span]
) -> RoutingPlan:
    """Resolve `routing.*` and the bias rates of the stages of a run for a model on any device.

    Raises:
        ConfigError: for a setting that the model's routers do not support.
    """
    routers, kind = find_routers(model), model.config.model_type
    rate = _bias_rate(section.bias_rate, "routing.bias_rate", routers, kind)
    if section.aux_loss is not None:
        _require_routers(routers, kind, f"routing.aux_loss={section.aux_loss:g}")
    rates: list[tuple[int, float]] = []
    for number, span in enumerate(stages):
        key = f"schedule.stages.{number}.bias_rate"
        own = _bias_rate(span.stage.bias_rate, key, routers, kind)
        stage_rate = (rate if own is None else own) or 0.0
        if rates and rates[-1][1] == stage_rate:
            rates.pop()
        rates.append((span.end, stage_rate))
    updated = any(rate for _, rate in rates)
    return RoutingPlan(tuple(rates) if updated else (), section.bias_update, section.aux_loss)


def _bias_rate(rate: float | str | None, key: str, routers: Routers, kind: str) -> float | None:
    if rate == "auto":
        return AUTO_RATE if routers.biased and not routers.unknown else None
    if rate is None or isinstance(rate, str):
        return None
    _require_routers(routers, kind, f"{key}={rate:g}")
    if not routers.biased:
        raise ConfigError(
            f"{key}={rate:g}: the routers of model_type {kind!r} have no bias to update; "
            "accepted: null, and auto for routing.bias_rate"
        )
    return rate


def _require_routers(routers: Routers, kind: str, setting: str) -> None:
    """Refuse a setting for a model that has no routers, or unsupported ones."""
    if routers.unknown:
        raise ConfigError(
            f"{setting}: {', '.join(routers.unknown)} of model_type {kind!r} is not supported; "
            f"accepted: null, or routers of: {', '.join(SCORES)}"
        )
    if not routers.known:
        raise ConfigError(f"{setting}: model_type {kind!r} has no routed experts; accepted: null")


class RouterBalance:
    """Records and balances the routers of a model in training. Without routers it does nothing.

    Args:
        model: the model on the ranks; hooks are added to its routers.
        plan: how to balance them.
    """

    def __init__(self, model: PreTrainedModel, plan: RoutingPlan) -> None:
        routers = find_routers(model)
        # A report on a part of the routers could be mistaken for a report on all of them.
        self._routers: list[Any] = [] if routers.unknown else list(routers.known.values())
        self._plan, self._unknown = plan, routers.unknown
        self._recording = False
        self._recorded: list[tuple[int, Tensor, Tensor]] = []
        self._experts = int(self._routers[0].num_experts) if self._routers else 0
        self.begin()
        for number, router in enumerate(self._routers):
            router.register_forward_hook(partial(self._add, number))

    def facts(self) -> dict[str, Any]:
        """Return the number of routers and the plan, for env.json."""
        counts = {"routers": len(self._routers), "not_understood": list(self._unknown)}
        return counts | vars(self._plan)

    def __str__(self) -> str:
        """Describe it in a line; empty for a model without routed experts."""
        if self._unknown:
            return f"neither balanced nor recorded: {', '.join(self._unknown)} is not supported"
        if not self._routers:
            return ""
        plan, parts = self._plan, [f"{len(self._routers)} routers of {self._experts} experts"]
        if plan.bias_rates:
            rates = ", ".join(f"{rate:g} to step {end}" for end, rate in plan.bias_rates)
            parts.append(f"bias rate {rates}")
        if plan.aux_loss is not None:
            parts.append(f"auxiliary loss x {plan.aux_loss:g}")
        return ", ".join(parts)

    def _add(self, number: int, router: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._recording:
            self._recorded.append((number, *router_outputs(outputs)))

    @contextmanager
    def record(self) -> Generator[None]:
        """Record the routers in this block: a forward pass without its backward pass."""
        self._recording = True
        self._recorded.clear()
        try:
            yield
        finally:
            self._recording = False

    def begin(self) -> None:
        """Reset the counts at the beginning of a step."""
        layers = len(self._routers)
        self._loads_ME = torch.zeros(layers, self._experts, dtype=torch.float64)
        self._entropy_M = torch.zeros(layers, dtype=torch.float64)
        self._aux: list[Tensor] = []

    def objective(self, loss: Tensor, sequences: int) -> Tensor:
        """Count the recorded decisions of a micro-batch, and return the loss to differentiate.

        Args:
            loss: next-token loss, 0-D, mean over the micro-batch.
            sequences: number of sequences in the micro-batch.

        Returns:
            The loss plus the auxiliary loss of all layers, if there is one.
        """
        recorded, self._recorded = self._recorded, []
        if not recorded:
            return loss
        coefficient = self._plan.aux_loss
        extra = torch.zeros((), device=loss.device)
        for number, logits_NE, chosen_NK in recorded:
            router = self._routers[number]
            score = score_of(router)
            assert score is not None
            with torch.set_grad_enabled(coefficient is not None):
                gates_NE = affinities(logits_NE, score)
            self._loads_ME = self._loads_ME.to(chosen_NK.device)
            self._entropy_M = self._entropy_M.to(chosen_NK.device)
            self._loads_ME[number] += expert_loads(chosen_NK, self._experts)
            self._entropy_M[number] += router_entropy(gates_NE.detach()).double().sum()
            if coefficient is not None:
                gates_BTE = gates_NE.unflatten(0, (sequences, -1))
                extra = extra + coefficient * sequence_balance(gates_BTE, router.top_k)
        if coefficient is None:
            return loss
        assert extra.requires_grad, "logits of a forward pass without gradients"
        self._aux.append(extra.detach().double())
        return loss + extra

    @torch.no_grad()
    def finish(self, step: int, processes: Processes) -> dict[str, Any]:
        """Update the biases by the loads of the step that was taken, and return its statistics.

        A collective: the update follows from the sums over all ranks and is the same on each.

        Args:
            step: number of the step, the first being step 0.
            processes: the processes of the run.

        Returns:
            `routing_statistics`, with `bias_rate` and `aux_loss` (times its coefficient, summed
            over layers) if they are in use. Empty for a model without known routers.
        """
        if not self._routers:
            return {}
        loads_ME, entropy_M, aux_loss = self._reduce(processes)
        metrics: dict[str, Any] = routing_statistics(loads_ME, entropy_M)
        if self._plan.bias_rates:
            rate = metrics["bias_rate"] = self._plan.rate_at(step)
            for router, loads_E in zip(self._routers, loads_ME, strict=True) if rate else ():
                bias = getattr(router, BIAS)
                bias += bias_step(loads_E, rate, self._plan.bias_update).to(bias.dtype)
        if self._plan.aux_loss is not None:
            metrics["aux_loss"] = aux_loss
        return metrics

    def _reduce(self, processes: Processes) -> tuple[Tensor, Tensor, float]:
        """Return loads, mean entropies and the mean auxiliary loss of all ranks: a collective."""
        aux = torch.stack(self._aux).mean() if self._aux else self._loads_ME.new_zeros(())
        here = torch.cat([self._loads_ME.flatten(), self._entropy_M, aux.view(1)])
        total = processes.sum_tensor(here.to(processes.device))
        shape = self._loads_ME.shape
        loads_ME, entropy_M, aux = total.split([shape.numel(), shape[0], 1])
        loads_ME = loads_ME.view(shape)
        tokens_M = loads_ME.sum(-1) / self._routers[0].top_k
        return loads_ME, entropy_M / tokens_M, float(aux) / processes.topology.data_ranks


def experts_implementation(model: PreTrainedModel) -> str | None:
    """Return how transformers computes experts, `grouped_mm` or `eager`; None without any."""
    if not any(map(holds_stacks, model.modules())):
        return None
    return model.config._experts_implementation or "eager"
