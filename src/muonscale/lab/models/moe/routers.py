"""The supported routers of transformers' mixtures of experts, and their scores."""

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
"""Scores of the supported routers, by class."""

BIAS = "e_score_correction_bias"
"""Buffer of a router that is added to its scores for the choice of experts, not for their
weights."""

IN_FLOAT32 = (
    "DeepseekV2TopkRouter",
    "DeepseekV3TopkRouter",
    "DeepseekV32TopkRouter",
    "Dots1TopkRouter",
    "Glm4MoeTopkRouter",
)
"""Routers that transformers computes in float32 for inputs of any dtype."""


@dataclass(frozen=True)
class Routers:
    """The routers of a model."""

    known: dict[str, nn.Module]
    """Supported routers, by name."""
    unknown: tuple[str, ...]
    """Classes of the other routers, and of modules that have experts but no router."""

    @property
    def biased(self) -> bool:
        """Whether the supported routers have a bias to update."""
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
    """Return the score of a router; None for an unsupported router or another module."""
    cls = type(module)
    return SCORES.get(cls.__name__) if cls.__module__.startswith("transformers.") else None


def router_outputs(outputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return logits `[N, E]` and chosen experts `[N, K]` from the outputs of a supported router."""
    first, _, last = outputs
    # in older releases of transformers GraniteMoe's router returns the chosen experts first
    return (first, last) if first.is_floating_point() else (last, first)


def _is_router(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Router")


def holds_stacks(module: nn.Module) -> bool:
    """Return whether a module has the stacked weights of routed experts."""
    stacks = any(p.ndim == 3 for p in module.parameters(recurse=False))
    return stacks and hasattr(module, "num_experts")


def keep_float32(model: nn.Module) -> None:
    """Disable autocast in the routers of `IN_FLOAT32`, which it would compute in bfloat16.

    Bfloat16 affinities near 1/2 differ by 1/256, several times a step of the router bias: many
    tokens would tie and change their expert at once.
    """
    for router in find_routers(model).known.values():
        if type(router).__name__ in IN_FLOAT32:
            router.forward = _disable_autocast(router.forward)


def _disable_autocast(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(hidden: torch.Tensor, *others: Any, **options: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return forward(hidden, *others, **options)

    return run
