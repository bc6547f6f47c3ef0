"""What each parameter of a model is: its role, and the logical matrices it holds.

A *role* follows from the module that owns the parameter, from the module's place in the model and
from which other modules own the very same parameter (tied weights); never from a substring of a
parameter's name. Two things are read from a class's name, because no common base class exists and
the class cannot be imported without transformers: `Conv1D`, and routers (`...Router`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from muonscale.errors import LayoutError
from muonscale.optim.matrices import PLAIN, Matrices


class Role(StrEnum):
    """What a parameter is to the model."""

    HIDDEN = "hidden"
    """A matrix between hidden activations."""
    EMBEDDING = "embedding"
    """Rows looked up by index; also an output matrix tied to one."""
    HEAD = "head"
    """The matrix that maps to logits over the vocabulary."""
    ROUTER = "router"
    """The matrix that chooses experts."""
    NORM = "norm"
    """A norm's gain, a bias, a scalar: anything that is not a matrix."""
    CONVOLUTION = "convolution"
    """A convolution kernel, depthwise ones included."""


@dataclass(frozen=True, kw_only=True)
class Assignment:
    """One parameter of a model, and what it was found to be."""

    name: str
    parameter: Tensor
    aliases: tuple[str, ...]
    """Every name under which the model holds this parameter, `name` first."""
    role: Role
    matrices: Matrices | None
    """How its matrices are stored; None where it holds none."""
    why: str
    """What decided."""


@dataclass(frozen=True)
class _Owner:
    name: str
    attribute: str
    module: nn.Module
    ancestors: tuple[nn.Module, ...]
    """Modules around `module`, innermost first."""


@dataclass(frozen=True)
class _Model:
    """What has to be known about the whole model before one parameter can be judged."""

    owners: dict[Tensor, list[_Owner]]
    outputs: set[Tensor]
    inputs: set[Tensor]
    heads_by_shape: set[Tensor]


_Found = tuple[Role, Matrices | None, str]
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def assign_roles(model: nn.Module) -> list[Assignment]:
    """Return what every parameter of `model` is, in the order of `model.named_parameters()`.

    The first rule that applies decides:

    1. owned by an `nn.Embedding` or by what `get_input_embeddings()` returns: embedding, and so is
       a head whose weight is tied to it;
    2. owned by what `get_output_embeddings()` returns: head;
    3. fewer than two axes (or at most one longer than 1, outside a Linear), a norm module's
       parameter, a bias per expert: norm;
    4. a convolution module's kernel: convolution;
    5. inside a module whose class is called `...Router`, or a Linear beside `experts` with as many
       outputs as there are experts: router;
    6. in a model without output embeddings, a Linear with as many outputs as the largest embedding
       has rows: head. Where that number is also a width inside the model (some Linear takes so
       many inputs, or the embedding has so many columns), only the last such Linear;
    7. everything else: hidden.

    Known to hold several matrices or a transposed one: stacks `[..., out, in]`, transformers'
    `Conv1D` (and the q, k, v in GPT-2's), experts' gate and up, `nn.MultiheadAttention`'s q, k, v.
    A parameter that is neither (a learned position table held as a bare `nn.Parameter`, a fused
    QKV of another class) counts as one hidden matrix: say otherwise by an override.

    Raises:
        LayoutError: for a weight that should be a matrix and is flat (FSDP1, DeepSpeed ZeRO).
    """
    facts = _survey(model)
    found = []
    for parameter, owners in facts.owners.items():
        role, matrices, why = _judge(parameter, owners, facts)
        names = tuple(dict.fromkeys(owner.name for owner in owners))
        found.append(
            Assignment(
                name=names[0],
                parameter=parameter,
                aliases=names,
                role=role,
                matrices=matrices,
                why=why,
            )
        )
    return found


def _judge(parameter: Tensor, owners: list[_Owner], facts: _Model) -> _Found:
    _refuse_flat(parameter, owners)
    owner = owners[0]
    kind = type(owner.module).__name__
    if parameter in facts.inputs:
        tied = [other.name for other in owners if not isinstance(other.module, _EMBEDDINGS)]
        return Role.EMBEDDING, PLAIN, f"embedding, tied to {tied[0]}" if tied else kind
    if parameter in facts.outputs:
        return Role.HEAD, PLAIN, "get_output_embeddings()"
    if not _is_matrix(parameter, owner):
        return Role.NORM, None, f"{parameter.ndim}-D, {kind}"
    if isinstance(owner.module, _CONVOLUTIONS):
        return Role.CONVOLUTION, Matrices(flattened=True), kind
    if router := _router_reason(owner):
        return Role.ROUTER, PLAIN, router
    if parameter in facts.heads_by_shape:
        return Role.HEAD, PLAIN, "outputs = rows of the embedding"
    matrices, holds = _stored_matrices(parameter, owner)
    return Role.HIDDEN, matrices, f"{kind}{holds}"


def _is_matrix(parameter: Tensor, owner: _Owner) -> bool:
    if parameter.ndim < 2 or isinstance(owner.module, _NORMS):
        return False
    if _holds_experts(owner.module) and parameter.ndim == 2:
        return False  # [E, out]: one bias per expert
    longer_axes = sum(length > 1 for length in parameter.shape)
    return longer_axes > 1 or isinstance(owner.module, nn.Linear) or _is_conv1d(owner.module)


def _router_reason(owner: _Owner) -> str:
    for module in (owner.module, *owner.ancestors):
        if any(cls.__name__.endswith("Router") for cls in type(module).__mro__):
            return type(module).__name__
    if not isinstance(owner.module, nn.Linear) or not owner.ancestors:
        return ""
    experts = getattr(owner.ancestors[0], "experts", None)
    if not isinstance(experts, nn.Module):
        return ""
    number = len(experts) if isinstance(experts, nn.ModuleList) else _number_of_experts(experts)
    return f"Linear to {number} experts" if owner.module.out_features == number else ""


def _number_of_experts(experts: nn.Module) -> int | None:
    number = getattr(experts, "num_experts", None)
    return number if isinstance(number, int) else None


def _stored_matrices(parameter: Tensor, owner: _Owner) -> tuple[Matrices, str]:
    """Return how a hidden parameter's matrices are stored, and a few words about it."""
    module = owner.module
    if _is_conv1d(module):
        block = getattr(owner.ancestors[0], "split_size", None) if owner.ancestors else None
        out = parameter.shape[1]
        if isinstance(block, int) and 0 < block < out and out % block == 0:
            count = out // block
            return Matrices(transposed=True, splits=(block,) * count), f" of {count} matrices"
        return Matrices(transposed=True), ""
    if _holds_experts(module) and parameter.ndim == 3:
        return _expert_matrices(parameter, owner), " stack"
    if isinstance(module, nn.MultiheadAttention) and owner.attribute == "in_proj_weight":
        return Matrices(splits=(module.embed_dim,) * 3), " of q, k, v"
    return PLAIN, " stack" if parameter.ndim > 2 else ""


def _expert_matrices(parameter: Tensor, owner: _Owner) -> Matrices:
    """Read the flags of transformers' experts interface: transposed, gate and up, interleaved."""
    transposed = bool(getattr(owner.module, "is_transposed", False))
    if owner.attribute != "gate_up_proj" or not getattr(owner.module, "has_gate", True):
        return Matrices(transposed=transposed)
    half = parameter.shape[2 if transposed else 1] // 2
    interleaved = not getattr(owner.module, "is_concatenated", True)
    return Matrices(transposed=transposed, splits=(half, half), interleaved=interleaved)


def _holds_experts(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") and hasattr(module, "is_concatenated")


def _is_conv1d(module: nn.Module) -> bool:
    is_named = any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)
    return is_named and hasattr(module, "nf")


def _refuse_flat(parameter: Tensor, owners: list[_Owner]) -> None:
    flat = type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_is_flat_param")
    for owner in owners:
        holds_matrix = isinstance(owner.module, (nn.Linear, *_EMBEDDINGS)) or _is_conv1d(
            owner.module
        )
        flat = flat or (holds_matrix and owner.attribute == "weight" and parameter.ndim < 2)
    if flat:
        raise LayoutError(
            f"{owners[0].name} has shape {tuple(parameter.shape)}: its matrix has been flattened, "
            "as FSDP1 and DeepSpeed ZeRO do, and a matrix cannot be orthogonalised from a piece of "
            "it. Shard with FSDP2 (torch.distributed.fsdp.fully_shard), or build the groups first."
        )


def _survey(model: nn.Module) -> _Model:
    owners: dict[Tensor, list[_Owner]] = {}
    for owner in _walk(model, "", ()):
        parameter = owner.module._parameters[owner.attribute]
        assert parameter is not None
        owners.setdefault(parameter, []).append(owner)
    inputs = _declared(model, "get_input_embeddings")
    for module in model.modules():
        if isinstance(module, _EMBEDDINGS):
            inputs.add(module.weight)
    outputs = _declared(model, "get_output_embeddings")
    heads = set() if outputs else _heads_by_shape(model, inputs)
    return _Model(owners=owners, outputs=outputs, inputs=inputs, heads_by_shape=heads)


def _walk(module: nn.Module, prefix: str, ancestors: tuple[nn.Module, ...]) -> Iterator[_Owner]:
    """Yield every (module, parameter) pair, tied ones at each of their places."""
    for attribute, parameter in module._parameters.items():
        if parameter is not None:
            yield _Owner(f"{prefix}{attribute}", attribute, module, ancestors)
    for child_name, child in module._modules.items():
        if child is not None:
            # A compiled module and its original are the same parameters under the same names.
            part = "" if child_name == "_orig_mod" else f"{child_name}."
            yield from _walk(child, f"{prefix}{part}", (module, *ancestors))


def _declared(model: nn.Module, getter: str) -> set[Tensor]:
    """Return the weights that `getter` names on any module of the model (wrappers are seen through)."""
    weights = set()
    for module in model.modules():
        get = getattr(module, getter, None)
        if not callable(get):
            continue
        try:
            declared = get()
        except NotImplementedError:
            continue
        weight = getattr(declared, "weight", None)
        if isinstance(weight, Tensor):
            weights.add(weight)
    return weights


def _heads_by_shape(model: nn.Module, inputs: set[Tensor]) -> set[Tensor]:
    embeddings = [m for m in model.modules() if isinstance(m, _EMBEDDINGS)]
    if not embeddings:
        return set()
    largest = max(embeddings, key=lambda embedding: embedding.num_embeddings)
    rows = largest.num_embeddings
    linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight not in inputs]
    heads = [linear.weight for linear in linears if linear.out_features == rows]
    is_width = largest.embedding_dim == rows or any(m.in_features == rows for m in linears)
    return set(heads[-1:] if is_width else heads)
