"""The sharding of every parameter under a topology, for a model on any device.

`muonscale.lab.parallel.apply` shards a model accordingly; `muonscale plan` estimates its cost.
Along the tensor-parallel axis the sharding follows the plan in transformers' configuration.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.models.structure import decoder_layers, expert_modules, parameters_of
from muonscale.lab.parallel.topology import Topology
from muonscale.optim.matrices.sharding import Cut, Sharding
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec

StyleT = Literal["rows", "columns", "embedding", "head", "partial"]
"""Sharding of a module along the tensor-parallel axis: by `rows` of its matrix (outputs) or
`columns` (inputs); `embedding` and `head` by vocabulary; `partial` replicated, with gradients that
are summed because every rank computes other attention heads."""

STYLES: dict[str, StyleT] = {
    "colwise": "rows",
    "rowwise": "columns",
    "replicated_with_grad_allreduce": "partial",
}
"""Styles by their names in transformers. Its others are for routed experts, replicated here."""

CUT_AXIS: dict[StyleT, int | None] = {
    "rows": 0,
    "columns": 1,
    "embedding": 0,
    "head": 0,
    "partial": None,
}


def tensor_styles(model: PreTrainedModel) -> dict[str, StyleT]:
    """Return the style of each module that is sharded along the tensor-parallel axis, by name.

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
    """Check that a model can be sharded under a topology.

    Raises:
        ConfigError: for heads or experts that cannot be divided, or a model without experts.
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
                )
        _check_widths(model, topology.tensor)
    if topology.expert > 1:
        stacks = expert_modules(model)
        if not stacks:
            raise ConfigError(
                f"model_type {model.config.model_type!r} has no routed experts; set expert "
                "parallelism to 1"
            )
        for module in stacks.values():
            for parameter in module.parameters(recurse=False):
                if parameter.shape[0] % topology.expert:
                    raise ConfigError(
                        f"expert parallelism {topology.expert} does not divide "
                        f"{parameter.shape[0]} experts"
                    )
                expert_axis(tuple(parameter.shape), topology)


def _check_widths(model: PreTrainedModel, tensor: int) -> None:
    """Raise ConfigError if the ranks do not divide activations that stay sharded between matrices.

    A vocabulary that they do not divide is all right: its activations are gathered.
    """
    for name, style in tensor_styles(model).items():
        axis = {"rows": 0, "columns": 1}.get(style)
        if axis is None:
            continue
        width = model.get_parameter(f"{name}.weight").shape[axis]
        if width % tensor:
            fields = model.config.get_text_config().to_dict().items()
            same = [field for field, value in fields if value == width and "size" in field]
            raise ConfigError(
                f"tensor parallelism {tensor} does not divide {' or '.join(same) or 'the'} {width} "
                f"{style} of {name}; choose multiples of {tensor}, or less tensor parallelism"
            )


def expert_axis(shape: tuple[int, ...], topology: Topology) -> int:
    """Return the axis along which the ranks with the same experts shard a stack of them.

    It is axis 0 if the experts can be divided, and otherwise axis 1, their rows.

    Raises:
        ConfigError: if neither can be divided.
    """
    shards = topology.expert_shards
    if shape[0] // topology.expert % shards == 0:
        return 0
    if shape[1] % shards == 0:
        return 1
    raise ConfigError(
        f"{shards} ranks share {shape[0] // topology.expert} of the experts {shape}, and cannot "
        "divide their number or their rows; increase expert parallelism"
    )


def parameter_shardings(
    model: PreTrainedModel,
    topology: Topology,
    matrices: Mapping[str, MatrixSpec],
    *,
    rank: int = 0,
) -> dict[str, Sharding]:
    """Return the sharding of every parameter by name.

    Args:
        model: model on any device, not yet sharded.
        topology: the arrangement of the ranks.
        matrices: matrices of parameters by name; the default is one plain matrix.
        rank: tensor-parallel rank whose sharding is returned for parameters that differ by it.

    Raises:
        ConfigError: as `check_model`.
    """
    check_model(model, topology)
    styles = tensor_styles(model) if topology.tensor > 1 else {}
    stacks = parameters_of(model, expert_modules(model))
    norms = set(sequence_norms(model)) if topology.sequence else set()
    shardings = {}
    for name, parameter in model.named_parameters():
        owner, _, leaf = name.rpartition(".")
        shape, spec = tuple(parameter.shape), matrices.get(name, PLAIN)
        if topology.expert > 1 and name in stacks:
            shardings[name] = _shard_experts(shape, spec, topology)
        elif owner in norms:
            shardings[name] = _shard_tensor_parallel(shape, spec, topology, None)
        elif owner in styles and styles[owner] != "partial":
            axis = CUT_AXIS[styles[owner]]
            if leaf == "bias" and axis == 1:
                axis = None
            shardings[name] = _shard_tensor_parallel(shape, spec, topology, axis)
        else:
            shardings[name] = _shard_data_parallel(shape, spec, topology, rank)
    return shardings


def sequence_norms(model: PreTrainedModel) -> list[str]:
    """Return the norms that get a sharded sequence: those beside attention and feed-forward."""
    names = {module: name for name, module in model.named_modules()}
    layers = decoder_layers(model)
    own = [child for layer in layers for child in layer.children()]
    own += [child for child in model.base_model.children() if child is not layers]
    return [names[m] for m in own if "norm" in type(m).__name__.lower() and not list(m.children())]


def _shard_data_parallel(
    shape: tuple[int, ...], spec: MatrixSpec, topology: Topology, rank: int
) -> Sharding:
    """Return the sharding of a parameter over data-parallel ranks only."""
    ranks = tuple(range(rank % topology.tensor, topology.world, topology.tensor))
    if len(ranks) == 1:
        return Sharding(shape, spec, ranks=ranks)
    if topology.data == "ddp":
        return Sharding(shape, spec, (len(ranks),), (None,), ranks, partitioned=True)
    mesh, cuts = _data_axes(topology, Cut(0))
    return Sharding(shape, spec, mesh, cuts, ranks)


def _shard_tensor_parallel(
    shape: tuple[int, ...], spec: MatrixSpec, topology: Topology, axis: int | None
) -> Sharding:
    """Return the sharding of a parameter over data-parallel and tensor-parallel ranks."""
    inner = None if axis is None else Cut(axis)
    mesh, cuts = _data_axes(topology, Cut(0, topology.tensor if axis == 0 else 1))
    ranks = tuple(range(topology.world))
    if topology.data_ranks == 1:
        return Sharding(shape, spec, (topology.tensor,), (inner,), ranks)
    return Sharding(shape, spec, (*mesh, topology.tensor), (*cuts, inner), ranks)


def _data_axes(topology: Topology, cut: Cut) -> tuple[tuple[int, ...], tuple[Cut | None, ...]]:
    if topology.data == "hsdp":
        return (topology.replicas, topology.shards), (None, cut)
    return (topology.shards,), (cut,)


def _shard_experts(shape: tuple[int, ...], spec: MatrixSpec, topology: Topology) -> Sharding:
    """Return the sharding of a stack of routed experts."""
    ranks = tuple(range(topology.world))
    if topology.data == "ddp":
        return Sharding(shape, spec, (topology.expert,), (Cut(0),), ranks)
    axis = expert_axis(shape, topology)
    cut = Cut(axis, topology.expert if axis == 0 else 1)
    mesh = (topology.expert_shards, topology.expert)
    return Sharding(shape, spec, mesh, (cut, Cut(0)), ranks)
