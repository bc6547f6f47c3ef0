"""What training does for the routers of a mixture of experts: count, keep in balance, report.

`Routing` hears what routers choose in the forward pass of training, and in no other: evaluation and
the recomputation of activation checkpointing are outside of `listening`. A token therefore counts
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
    ScoreT,
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
"""Bias rate of `auto` (Moonlight and DeepSeek-V3 alike)."""


@dataclass(frozen=True)
class RoutingPlan:
    """What `routing.*` comes to for a model and a number of steps."""

    bias_rates: tuple[tuple[int, float], ...]
    """(the step after its last, rate), in order; empty if biases stay as they are."""
    bias_update: BiasUpdateT
    aux_loss: float | None
    """Coefficient."""

    def rate_at(self, step: int) -> float:
        """Return the bias rate of a step, the first being step 0."""
        return next((rate for end, rate in self.bias_rates if step < end), 0.0)


def plan_routing(
    model: PreTrainedModel, section: RoutingSection, stages: Sequence[Span]
) -> RoutingPlan:
    """Resolve `routing.*` and the bias rates of the stages of a run for a model on any device.

    Raises:
        ConfigError: for what the model's routers do not have.
    """
    routers, kind = find_routers(model), model.config.model_type
    rate = _bias_rate(section.bias_rate, "routing.bias_rate", routers, kind)
    if section.aux_loss is not None:
        _require(routers, kind, f"routing.aux_loss={section.aux_loss:g}")
    rates: list[tuple[int, float]] = []
    for number, span in enumerate(stages):
        key = f"schedule.stages.{number}.bias_rate"
        own = _bias_rate(span.stage.bias_rate, key, routers, kind)
        found = (rate if own is None else own) or 0.0
        if rates and rates[-1][1] == found:
            rates.pop()
        rates.append((span.end, found))
    moving = any(rate for _, rate in rates)
    return RoutingPlan(tuple(rates) if moving else (), section.bias_update, section.aux_loss)


def _bias_rate(rate: float | str | None, key: str, routers: Routers, kind: str) -> float | None:
    if rate == "auto":
        return AUTO_RATE if routers.biased and not routers.unknown else None
    if rate is None or isinstance(rate, str):
        return None
    _require(routers, kind, f"{key}={rate:g}")
    if not routers.biased:
        raise ConfigError(
            f"{key}={rate:g}: the routers of model_type {kind!r} have no bias to update; "
            "accepted: null, and auto for routing.bias_rate"
        )
    return rate


def _require(routers: Routers, kind: str, what: str) -> None:
    """Refuse what was asked of routers that are not there, or not understood."""
    if routers.unknown:
        raise ConfigError(
            f"{what}: {', '.join(routers.unknown)} of model_type {kind!r} is not understood; "
            f"accepted: null, or routers of: {', '.join(SCORES)}"
        )
    if not routers.known:
        raise ConfigError(f"{what}: model_type {kind!r} has no routed experts; accepted: null")


class Routing:
    """Hears the routers of a model while it trains; without routers it does nothing.

    Args:
        model: on the ranks; hooks are added to its routers.
        plan: what to do for them.
    """

    def __init__(self, model: PreTrainedModel, plan: RoutingPlan) -> None:
        routers = find_routers(model)
        # Half a report would look like a whole one.
        self._routers: list[Any] = [] if routers.unknown else list(routers.known.values())
        self._scores = [_known_score(router) for router in self._routers]
        self._plan, self._unknown = plan, routers.unknown
        self._open = False
        self._heard: list[tuple[int, Tensor, Tensor]] = []
        self._experts = int(self._routers[0].num_experts) if self._routers else 0
        self._loads_ME, self._entropy_M, self._aux = _nothing(len(self._routers), self._experts)
        for number, router in enumerate(self._routers):
            router.register_forward_hook(partial(self._hear, number))

    def facts(self) -> dict[str, Any]:
        """Return what is heard and done, for env.json."""
        heard = {"routers": len(self._routers), "not_understood": list(self._unknown)}
        return heard | vars(self._plan)

    def __str__(self) -> str:
        """Say it in a line; empty for a model without routed experts."""
        if self._unknown:
            return f"neither balanced nor recorded: {', '.join(self._unknown)} is not understood"
        if not self._routers:
            return ""
        plan, said = self._plan, [f"{len(self._routers)} routers of {self._experts} experts"]
        if plan.bias_rates:
            said.append(
                "bias rate " + ", ".join(f"{rate:g} to step {end}" for end, rate in plan.bias_rates)
            )
        if plan.aux_loss is not None:
            said.append(f"auxiliary loss x {plan.aux_loss:g}")
        return ", ".join(said)

    def _hear(self, number: int, router: nn.Module, inputs: Any, outputs: Any) -> None:
        if self._open:
            logits_NE, chosen_NK = router_outputs(outputs)
            self._heard.append((number, logits_NE, chosen_NK))

    @contextmanager
    def listening(self) -> Generator[None]:
        """Hear the routers in this block: around a forward pass, and not its backward pass."""
        self._open = True
        self._heard.clear()
        try:
            yield
        finally:
            self._open = False

    def begin(self) -> None:
        """Forget what was counted: a step begins."""
        self._loads_ME, self._entropy_M, self._aux = _nothing(len(self._routers), self._experts)

    def objective(self, loss: Tensor, sequences: int) -> Tensor:
        """Count what was heard of a micro-batch, and return the loss whose gradient is to be taken.

        Args:
            loss: of the next tokens, 0-D, mean over the micro-batch.
            sequences: in it.

        Returns:
            The loss, with the auxiliary loss of all layers added if there is one.
        """
        heard, self._heard = self._heard, []
        if not heard:
            return loss
        extra = torch.zeros((), device=loss.device)
        for number, logits_NE, chosen_NK in heard:
            router = self._routers[number]
            with torch.set_grad_enabled(self._plan.aux_loss is not None):
                gates_NE = affinities(logits_NE, self._scores[number])
            self._count(number, gates_NE.detach(), chosen_NK)
            if self._plan.aux_loss is not None:
                gates_BTE = gates_NE.unflatten(0, (sequences, -1))
                extra = extra + self._plan.aux_loss * sequence_balance(gates_BTE, router.top_k)
        if self._plan.aux_loss is None:
            return loss
        assert extra.requires_grad, "logits of a forward pass without gradients"
        self._aux.append(extra.detach().double())
        return loss + extra

    def _count(self, number: int, gates_NE: Tensor, chosen_NK: Tensor) -> None:
        self._loads_ME = self._loads_ME.to(chosen_NK.device)
        self._entropy_M = self._entropy_M.to(chosen_NK.device)
        self._loads_ME[number] += expert_loads(chosen_NK, self._experts)
        self._entropy_M[number] += router_entropy(gates_NE).double().sum()

    def finish(self, step: int, processes: Processes) -> dict[str, Any]:
        """Update the biases by the loads of the step that was taken, and say how it was routed.

        The update is the same on all ranks, since it follows from the sums over them: a collective.

        Args:
            step: which it was, the first being step 0.
            processes: this one and the others.

        Returns:
            `routing_statistics`, with `bias_rate` and `aux_loss` (with its coefficient, summed over
            layers) where they are in use; nothing for a model without known routers.
        """
        if not self._routers:
            return {}
        loads_ME, entropy_M, aux = self._over_ranks(processes)
        figures: dict[str, Any] = routing_statistics(loads_ME, entropy_M)
        if self._plan.bias_rates:
            figures["bias_rate"] = self._plan.rate_at(step)
            self._update(loads_ME, figures["bias_rate"])
        if self._plan.aux_loss is not None:
            figures["aux_loss"] = aux
        return figures

    def _over_ranks(self, processes: Processes) -> tuple[Tensor, Tensor, float]:
        """Return loads, mean entropies and the mean auxiliary loss of all ranks: a collective."""
        aux = torch.stack(self._aux).mean() if self._aux else self._loads_ME.new_zeros(())
        here = torch.cat([self._loads_ME.flatten(), self._entropy_M, aux.view(1)])
        total = processes.sum_tensor(here.to(processes.device))
        shape = self._loads_ME.shape
        loads_ME, entropy_M, aux = total.split([shape.numel(), shape[0], 1])
        loads_ME = loads_ME.view(shape)
        tokens_M = loads_ME.sum(-1) / self._routers[0].top_k
        return loads_ME, entropy_M / tokens_M, float(aux) / processes.topology.data_ranks

    @torch.no_grad()
    def _update(self, loads_ME: Tensor, rate: float) -> None:
        if rate == 0:
            return
        for router, loads_E in zip(self._routers, loads_ME, strict=True):
            bias = getattr(router, BIAS)
            bias += bias_step(loads_E, rate, self._plan.bias_update).to(bias.dtype)


def _nothing(layers: int, experts: int) -> tuple[Tensor, Tensor, list[Tensor]]:
    loads_ME = torch.zeros(layers, experts, dtype=torch.float64)
    return loads_ME, torch.zeros(layers, dtype=torch.float64), []


def _known_score(router: nn.Module) -> ScoreT:
    score = score_of(router)
    assert score is not None
    return score


def experts_implementation(model: PreTrainedModel) -> str | None:
    """Return how transformers computes the routed experts, `grouped_mm` or `eager`; None without any."""
    if not any(map(holds_stacks, model.modules())):
        return None
    return model.config._experts_implementation or "eager"
