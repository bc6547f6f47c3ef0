"""What a model consists of: its layers, its experts, its tables, and how many parameters it has."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from muonscale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters of a model."""

    total: int
    """All parameters; a tied embedding counts once."""
    without_embeddings: int
    """Without token and position embeddings and without the output head."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a causal language model.

    Raises:
        ConfigError: if it has none in a list.
    """
    lists = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} keeps its layers in no list: it cannot be sharded"
            "; use parallel.data=ddp"
        )
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that hold stacks of routed experts, `[experts, ...]` each, by name."""
    return {name: module for name, module in model.named_modules() if _holds_experts(module)}


def _holds_experts(module: nn.Module) -> bool:
    number = getattr(module, "num_experts", None)
    shapes = [p.shape for p in module.parameters(recurse=False)]
    return any(len(s) == 3 for s in shapes) and all(s[0] == number for s in shapes)


def count_parameters(model: PreTrainedModel) -> ParameterCount:
    """Count the parameters of a model, on any device, the meta device included."""
    outside = lookup_tables(model) | output_head(model)
    sizes = {id(p): p.numel() for p in model.parameters()}
    body = sum(size for key, size in sizes.items() if key not in outside)
    return ParameterCount(total=sum(sizes.values()), without_embeddings=body)


def lookup_tables(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters that token ids look up rows of."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(table.weight) for table in tables}


def output_head(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters of the head."""
    head = model.get_output_embeddings()
    return {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
