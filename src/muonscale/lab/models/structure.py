"""The structure of a model: layers, experts, lookup tables, and number of parameters."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from muonscale.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParameterCount:
    """Numbers of parameters of a model."""

    total: int
    """Number of all parameters; a tied embedding counts once."""
    without_embeddings: int
    """Number without token and position embeddings and without the output head."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Return the layers of a causal language model.

    Raises:
        ConfigError: if they are not in a list.
    """
    lists = [m for m in model.base_model.children() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ConfigError(
            f"{type(model).__name__} has no list of layers and cannot be sharded; use "
            "parallel.data=ddp"
        )
    return max(lists, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def expert_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules whose parameters are stacks `[experts, ...]` of experts, by name."""
    stacks = {}
    for name, module in model.named_modules():
        number = getattr(module, "num_experts", None)
        shapes = [p.shape for p in module.parameters(recurse=False)]
        if any(len(s) == 3 for s in shapes) and all(s[0] == number for s in shapes):
            stacks[name] = module
    return stacks


def parameters_of(model: nn.Module, modules: Iterable[str]) -> frozenset[str]:
    """Return the names of the parameters of some modules, which are given by name."""
    return frozenset(
        f"{name}.{leaf}"
        for name in modules
        for leaf, _ in model.get_submodule(name).named_parameters()
    )


def count_parameters(model: PreTrainedModel) -> ParameterCount:
    """Count the parameters of a model on any device, including the meta device."""
    outside = lookup_tables(model) | output_head(model)
    sizes = {id(p): p.numel() for p in model.parameters()}
    body = sum(size for key, size in sizes.items() if key not in outside)
    return ParameterCount(total=sum(sizes.values()), without_embeddings=body)


def lookup_tables(model: PreTrainedModel) -> set[int]:
    """Return the ids of the embedding parameters."""
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return {id(table.weight) for table in tables}


def output_head(model: PreTrainedModel) -> set[int]:
    """Return the ids of the parameters of the output head."""
    head = model.get_output_embeddings()
    return {id(p) for p in head.parameters()} if isinstance(head, nn.Module) else set()
