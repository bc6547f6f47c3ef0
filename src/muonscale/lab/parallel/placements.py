"""Which ranks hold which part of every parameter, under an arrangement; pure, for a model on any device.

`muonscale.lab.parallel.apply` puts a model there with torch; `muonscale plan` asks what it would
cost. Along the tensor-parallel axis the plan of transformers' own configuration says which
matrices are cut, and how.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from torch import nn
from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.models.structure import decoder_layers, expert_modules
from muonscale.lab.parallel.topology import Topology
from muonscale.optim.matrices.sharding import Cut, Sharding
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec

StyleT = Literal["rows", "columns", "embedding", "head", "partial"]
"""How a module is shared along the tensor-parallel axis: `rows` of its matrix (outputs) or `columns`
(inputs); `embedding` and `head` by vocabulary; `partial` whole, with gradients that have to be
summed because every rank sees other attention heads."""

STYLES: dict[str, StyleT] = {
    "colwise": "rows",
    "rowwise": "columns",
    "replicated_with_grad_allreduce": "partial",
}
"""By transformers' words for them. Its others are for routed experts, which stay whole here."""

CUT_AXIS: dict[StyleT, int | None] = {
    "rows": 0,
    "columns": 1,
    "embedding": 0,
    "head": 0,
    "partial": None,
}


def tensor_styles(model: PreTrainedModel) -> dict[str, StyleT]:
    """Return the modules that are shared along the tensor-parallel axis, by name.

    Raises:
        ConfigError: if transformers has no such plan for the architecture.
    """
    plan = getattr(model.config, "base_model_tp_plan", None)
    if not plan:
        raise ConfigError(
            f"transformers has no tensor-parallel plan for model_type "
            f"{model.config.model_type!r}; use fsdp alone"
        )
    prefix = f"{model.base_model_prefix}."
    rules = {prefix + pattern: STYLES[style] for pattern, style in plan.items() if style in STYLES}
    styles: dict[str, StyleT] = {}
    for name, module in model.named_modules():
        generic = re.sub(r"\.\d+(?=\.|$)", ".*", name)
        if generic in rules and "experts" not in name.split("."):
            styles[name] = rules[generic]
        elif module is model.get_input_embeddings():
            styles[name] = "embedding"
        elif module is model.get_output_embeddings():
            styles[name] = "head"
    return styles


def check_model(model: PreTrainedModel, topology: Topology) -> None:
    """Refuse a model that cannot be put on the ranks of an arrangement.

    Raises:
        ConfigError: for heads, experts or a vocabulary that do not divide, or experts that are not
            there.
    """
    if topology.tensor > 1:
        tensor_styles(model)
        heads = {
            name: getattr(model.config, name, None)
            for name in ("num_attention_heads", "num_key_value_heads")
        }
        for name, number in heads.items():
            if number is not None and number % topology.tensor:
                raise ConfigError(
                    f"tensor parallelism {topology.tensor} does not divide {name}={number}"
                    "; give a divisor"
                )
    if topology.expert > 1:
        stacks = expert_modules(model)
        if not stacks:
            raise ConfigError(
                f"model_type {model.config.model_type!r} has no routed experts to deal out; "
                "set expert parallelism to 1"
            )
        for module in stacks.values():
            _check_experts(module, topology)


def _check_experts(module: nn.Module, topology: Topology) -> None:
    number = next(module.parameters(recurse=False)).shape[0]
    if number % topology.expert:
        raise ConfigError(
            f"expert parallelism {topology.expert} does not divide {number} experts; give a divisor"
        )
    for parameter in module.parameters(recurse=False):
        expert_axis(tuple(parameter.shape), topology)


def expert_axis(shape: tuple[int, ...], topology: Topology) -> int:
    """Return along which axis the ranks that share the same experts divide a stack of them.

    Whole experts where there are enough of them, else rows of each.

    Raises:
        ConfigError: where neither divides.
    """
    shards = topology.expert_shards
    if shape[0] // topology.expert % shards == 0:
        return 0
    if shape[1] % shards == 0:
        return 1
    raise ConfigError(
        f"{shards} ranks share each {shape[0] // topology.expert} of the experts {shape}, and divide "
        "neither their number nor their rows; take more expert parallelism"
    )


def layouts(
    model: PreTrainedModel,
    topology: Topology,
    matrices: Mapping[str, MatrixSpec],
    *,
    rank: int = 0,
) -> dict[str, Sharding]:
    """Return how every parameter lies.

    Args:
        model: on any device, not yet put on ranks.
        topology: the arrangement.
        matrices: stored in parameters, by name; one plain matrix where a name is missing.
        rank: of those that do not share a parameter along the tensor-parallel axis, whose layout.

    Raises:
        ConfigError: as `check_model`.
    """
    check_model(model, topology)
    styles = tensor_styles(model) if topology.tensor > 1 else {}
    stacks = {
        f"{name}.{child}"
        for name, module in expert_modules(model).items()
        for child, _ in module.named_parameters(recurse=False)
    }
    norms = set(sequence_norms(model)) if topology.sequence else set()
    found = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shape, held = tuple(parameter.shape), matrices.get(name, PLAIN)
        if topology.expert > 1 and name in stacks:
            found[name] = _stack_layout(shape, held, topology)
        elif owner in norms:
            found[name] = _shared_layout(shape, held, topology, None)
        elif owner in styles and styles[owner] != "partial":
            axis = CUT_AXIS[styles[owner]]
            if leaf == "bias" and axis == 1:
                axis = None
            found[name] = _shared_layout(shape, held, topology, axis)
        else:
            found[name] = _data_layout(shape, held, topology, rank)
    return found


def sequence_norms(model: PreTrainedModel) -> list[str]:
    """Return the norms that see a divided sequence: those beside attention and feed-forward."""
    names = {module: name for name, module in model.named_modules()}
    layers = decoder_layers(model)
    own = [child for layer in layers for child in layer.children()]
    own += [child for child in model.base_model.children() if child is not layers]
    return [names[m] for m in own if _is_norm(m)]


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not list(module.children())


def _data_layout(
    shape: tuple[int, ...], held: MatrixSpec, topology: Topology, rank: int
) -> Sharding:
    """Return the layout of a parameter that only data-parallel ranks share."""
    ranks = tuple(range(rank % topology.tensor, topology.world, topology.tensor))
    if len(ranks) == 1:
        return Sharding(shape, held, ranks=ranks)
    if topology.data == "ddp":
        return Sharding(shape, held, (len(ranks),), (None,), ranks, partitioned=True)
    mesh, cuts = _data_axes(topology, Cut(0))
    return Sharding(shape, held, mesh, cuts, ranks)


def _shared_layout(
    shape: tuple[int, ...], held: MatrixSpec, topology: Topology, axis: int | None
) -> Sharding:
    """Return the layout of a parameter that is on the tensor-parallel axis too."""
    inner = None if axis is None else Cut(axis)
    mesh, cuts = _data_axes(topology, Cut(0, topology.tensor if axis == 0 else 1))
    ranks = tuple(range(topology.world))
    if topology.data_ranks == 1:
        return Sharding(shape, held, (topology.tensor,), (inner,), ranks)
    return Sharding(shape, held, (*mesh, topology.tensor), (*cuts, inner), ranks)


def _data_axes(topology: Topology, cut: Cut) -> tuple[tuple[int, ...], tuple[Cut | None, ...]]:
    if topology.data == "hsdp":
        return (topology.replicas, topology.shards), (None, cut)
    return (topology.shards,), (cut,)


def _stack_layout(shape: tuple[int, ...], held: MatrixSpec, topology: Topology) -> Sharding:
    ranks = tuple(range(topology.world))
    if topology.data == "ddp":
        return Sharding(shape, held, (topology.expert,), (Cut(0),), ranks)
    axis = expert_axis(shape, topology)
    cut = Cut(axis, topology.expert if axis == 0 else 1)
    mesh = (topology.expert_shards, topology.expert)
    return Sharding(shape, held, mesh, (cut, Cut(0)), ranks)
