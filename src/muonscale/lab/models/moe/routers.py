"""The routers of transformers' mixtures of experts: which there are, and how they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from muonscale.lab.models.moe.routing import ScoreT

SCORES: dict[str, ScoreT] = {
    "DeepseekV2TopkRouter": "softmax",
    "DeepseekV3TopkRouter": "sigmoid",
    "DeepseekV32TopkRouter": "sigmoid",
    "Dots1TopkRouter": "sigmoid",
    "Glm4MoeTopkRouter": "sigmoid",
    "GptOssTopKRouter": "softmax",
    "GraniteMoeTopKRouter": "softmax",
    "MixtralTopKRouter": "softmax",
    "OlmoeTopKRouter": "softmax",
    "Qwen2MoeTopKRouter": "softmax",
    "Qwen3MoeTopKRouter": "softmax",
}
"""Routers of transformers that `router_outputs` reads, by class, and their scores."""

BIAS = "e_score_correction_bias"
"""Buffer of a router: added to its scores before it chooses, not to the weights of what it chose."""

IN_FLOAT32 = (
    "DeepseekV2TopkRouter",
    "DeepseekV3TopkRouter",
    "DeepseekV32TopkRouter",
    "Dots1TopkRouter",
    "Glm4MoeTopkRouter",
)
"""Those that transformers computes in float32, whatever comes in."""


@dataclass(frozen=True)
class Routers:
    """The routers of a model."""

    known: dict[str, nn.Module]
    """By name, those that `Routing` understands."""
    unknown: tuple[str, ...]
    """Classes of the others, or of the modules that hold experts and no router."""

    @property
    def biased(self) -> bool:
        """Whether the known ones have a bias to update."""
        return bool(self.known) and all(hasattr(router, BIAS) for router in self.known.values())


def find_routers(model: nn.Module) -> Routers:
    """Return the routers of a model, on any device, sharded or not."""
    modules = dict(model.named_modules())
    known = {name: module for name, module in modules.items() if score_of(module)}
    unknown = {type(m).__name__ for m in modules.values() if _is_router(m) and not score_of(m)}
    for module in modules.values():
        children = list(module.children())
        if any(map(holds_stacks, children)) and not any(map(_is_router, children)):
            unknown.add(type(module).__name__)
    return Routers(known, tuple(sorted(unknown)))


def score_of(module: nn.Module) -> ScoreT | None:
    """Return how a router turns logits into affinities; None for other modules, or an unknown one."""
    cls = type(module)
    return SCORES.get(cls.__name__) if cls.__module__.startswith("transformers.") else None


def router_outputs(outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return (logits `[N, E]`, chosen experts `[N, K]`) of what a known router has returned."""
    first, _, last = outputs
    # in older releases of transformers GraniteMoe's router has the chosen experts first
    return (first, last) if first.is_floating_point() else (last, first)


def _is_router(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Router")


def holds_stacks(module: nn.Module) -> bool:
    """Return whether a module is that of the stacked weights of routed experts."""
    stacks = any(p.ndim == 3 for p in module.parameters(recurse=False))
    return stacks and hasattr(module, "num_experts")


def keep_float32(model: nn.Module) -> None:
    """Keep autocast out of the routers of `IN_FLOAT32`, which would turn their products back.

    In bfloat16 affinities near 1/2 are 1/256 apart, several times a step of the router bias: tokens
    would tie, and move from expert to expert all at once.
    """
    for router in find_routers(model).known.values():
        if type(router).__name__ in IN_FLOAT32:
            router.forward = _without_autocast(router.forward)


def _without_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(hidden: torch.Tensor, *others: Any, **options: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden, *others, **options)

    return run
