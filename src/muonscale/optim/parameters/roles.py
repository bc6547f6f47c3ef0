"""What each parameter of a model is: its role, and the logical matrices it holds.

A *role* follows from the module that owns the parameter, from the module's place in the model,
from the code that uses the parameter and from which other modules own the very same parameter
(tied weights). It never depends on the parameter's own name. Where no base class says it, the name
of a class does: `Conv1D`, routers (`...Router`), and the classes that
`muonscale.optim.parameters.fused_table` lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from muonscale.errors import GroupingError, LayoutError
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.adapters import adapter_role, without_adapters
from muonscale.optim.parameters.convolutions import kernel_matrices
from muonscale.optim.parameters.fused_weights import (
    holds_blocks,
    holds_experts,
    is_known_bare,
    looks_fused,
    stored_matrices,
)
from muonscale.optim.parameters.module_survey import (
    CONVOLUTIONS,
    ParamSite,
    Survey,
    is_conv1d,
    is_linear,
    survey,
    table,
)
from muonscale.optim.parameters.parameter_use import UseKind, parameter_use


class Role(StrEnum):
    """What a parameter is to the model."""

    HIDDEN = "hidden"
    """A matrix between hidden activations."""
    EMBEDDING = "embedding"
    """Rows looked up by index or position; also an output matrix tied to one."""
    HEAD = "head"
    """The matrix of an output layer: to logits over a vocabulary or classes, to a value."""
    ROUTER = "router"
    """The matrix that chooses experts."""
    NORM = "norm"
    """A norm's gain, a bias, a scalar, a state space's decay: anything that is not a matrix."""
    CONVOLUTION = "convolution"
    """A convolution kernel, depthwise ones included."""
    UNKNOWN = "unknown"
    """A bare parameter with two axes or more of which nothing tells what it is."""


@dataclass(frozen=True, kw_only=True)
class RoleAssignment:
    """One parameter of a model, and what it was found to be."""

    name: str
    parameter: Tensor
    aliases: tuple[str, ...]
    """Every name under which the model holds this parameter, `name` first."""
    role: Role
    matrices: MatrixSpec | None
    """How its matrices are stored; None where it holds none."""
    why: str
    """What decided."""
    guessed: bool = False
    """Whether this is a guess: nothing that is known excludes another role or other matrices."""


_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_HOLD_MATRICES = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)


@dataclass(frozen=True)
class _Judgement:
    role: Role
    matrices: MatrixSpec | None
    why: str
    guessed: bool = False


def assign_roles(model: nn.Module) -> list[RoleAssignment]:
    """Return what every parameter of `model` is, in the order of `model.named_parameters()`.

    The first rule that applies decides:

    1. owned by an `nn.Embedding`, by a module that declares `num_embeddings` and `embedding_dim`,
       or by what `get_input_embeddings()` returns, unless that is a convolution: embedding, and so
       is a head whose weight is tied to it, wherever in the model the other module stands;
    2. fewer than two axes (or at most one longer than 1, outside a Linear), a norm module's
       parameter, a bias per expert, a state space's decay, the magnitude of `weight_norm`: norm;
    3. a convolution module's kernel: convolution;
    4. the weight of an output layer: head. An output layer is one that `get_output_embeddings()`
       of any module returns; the last layer of the forward path, or each of several that end it
       (see `muonscale.optim.parameters.forward_path`), unless its matrix is square; or a Linear
       with as many outputs as an embedding has rows, padding apart, if no other layer has that
       width;
    5. inside a module whose class is called `...Router`, or a Linear beside `experts` with as many
       outputs as there are experts: router;
    6. a bare `nn.Parameter` (of a module that is not known to hold matrices) is what its module's
       code does with it (see `muonscale.optim.parameters.parameter_use`): a matrix, hidden; a
       table, embedding; a kernel, convolution; a gain or an offset, norm. Where the code does not
       tell, a parameter of shape `[1, ..., N, d]`, or `[N, d]` in a module that also has an
       embedding with d columns, is a table of positions, and any other is unknown: a guess, which
       `RoleAssignment.guessed` says;
    7. everything else: hidden.

    A parameter of an adapter is what `muonscale.optim.parameters.adapters` says, before these
    rules, and a layer that an adapter wraps is judged as if it stood there alone.

    A Linear of one row or one column stays hidden: the polar factor of a vector is the vector
    divided by its length, so such a step is normalized momentum with the RMS of any other.

    Known to hold several matrices or a transposed one: see
    `muonscale.optim.parameters.fused_weights`. What is not known (a fused QKV of a class of your
    own) counts as one matrix. If its name or its shape says that it may be several, that is a
    guess too: say which by an override.

    Raises:
        GroupingError: for a parameter of a lazy module that has no shape yet.
        LayoutError: for a weight that should be a matrix and is flat (FSDP1, DeepSpeed ZeRO).
    """
    _refuse_unready(model)
    facts = survey(model)
    found = []
    for parameter, owners in facts.owners.items():
        _refuse_flat(parameter, owners)
        judged = _judge(parameter, owners, facts)
        names = tuple(dict.fromkeys(owner.name for owner in owners))
        found.append(
            RoleAssignment(
                name=names[0],
                parameter=parameter,
                aliases=names,
                role=judged.role,
                matrices=judged.matrices,
                why=judged.why,
                guessed=judged.guessed,
            )
        )
    return found


def _judge(parameter: Tensor, owners: list[ParamSite], facts: Survey) -> _Judgement:
    if found := adapter_role(parameter, owners[0]):
        role, matrices, why = found
        return _Judgement(Role(role), matrices, why)
    owner = without_adapters(owners[0])
    kind = type(owner.module).__name__
    if parameter in facts.inputs:
        tied = [other.name for other in owners if table(other.module) is None]
        tie = len(owners) > 1 and bool(tied)
        return _Judgement(Role.EMBEDDING, PLAIN, f"embedding, tied to {tied[0]}" if tie else kind)
    if not _is_matrix(parameter, owner):
        vector = parameter.ndim > 1 and not isinstance(owner.module, _NORMS)
        shape = "one axis longer than 1" if vector else f"{parameter.ndim}-D"
        return _Judgement(Role.NORM, None, f"{shape}, {kind}")
    if isinstance(owner.module, CONVOLUTIONS):
        return _Judgement(Role.CONVOLUTION, kernel_matrices(parameter, owner.module), kind)
    judged = _judge_bare(parameter, owner) if _is_bare(owner) else None
    if judged is None:
        matrices, holds = stored_matrices(parameter, owner)
        doubt = looks_fused(parameter, owner)
        why = f"{kind}{holds}, one matrix though {doubt}" if doubt else f"{kind}{holds}"
        judged = _Judgement(Role.HIDDEN, matrices, why, guessed=bool(doubt))
    if parameter in facts.heads and judged.role in (Role.HIDDEN, Role.UNKNOWN):
        return _Judgement(Role.HEAD, judged.matrices, facts.heads[parameter])
    if parameter is facts.unclear and judged.role == Role.HIDDEN:
        why = f"{judged.why}, the last one; whether it is the head could not be read from the code"
        return _Judgement(Role.HIDDEN, judged.matrices, why, guessed=True)
    if judged.role == Role.HIDDEN and (router := _router_reason(owner)):
        return _Judgement(Role.ROUTER, judged.matrices, router)
    return judged


def _is_matrix(parameter: Tensor, owner: ParamSite) -> bool:
    if parameter.ndim < 2 or isinstance(owner.module, _NORMS) or owner.part == "magnitude":
        return False
    if holds_experts(owner.module) and parameter.ndim == 2:
        return False  # [E, out]: one bias per expert
    longer_axes = sum(length > 1 for length in parameter.shape)
    return longer_axes > 1 or is_linear(owner.module)


def _is_bare(owner: ParamSite) -> bool:
    module = owner.module
    if owner.part:
        return True
    known = isinstance(module, _HOLD_MATRICES) or is_conv1d(module) or is_known_bare(owner)
    return not (known or holds_experts(module) or holds_blocks(module))


def _judge_bare(parameter: Tensor, owner: ParamSite) -> _Judgement:
    kind = type(owner.module).__name__
    if owner.part:
        why = f"part of a parametrization of {kind}"
        return _Judgement(Role.UNKNOWN, PLAIN, why, guessed=True)
    declared = getattr(owner.module, "out_features", 0), getattr(owner.module, "in_features", 0)
    if owner.attribute == "weight" and tuple(parameter.shape) == declared:
        return _Judgement(Role.HIDDEN, PLAIN, f"{kind} declares its features")
    if isinstance(owner.module, (nn.ParameterList, nn.ParameterDict)) and owner.ancestors:
        use = parameter_use(owner.ancestors[0], owner.place, parameter.ndim, listed=True)
    else:
        use = parameter_use(owner.module, owner.attribute, parameter.ndim)
    if use is None or use.kind == UseKind.ELEMENTWISE:
        if _is_table(parameter, owner):
            why = f"bare parameter of {kind}, a table of positions"
            return _Judgement(Role.EMBEDDING, PLAIN, why, guessed=use is None)
        if use is None:
            why = f"bare parameter of {kind}, of unknown use"
            return _Judgement(Role.UNKNOWN, PLAIN, why, guessed=True)
    role, matrices = {
        UseKind.MATRIX: (Role.HIDDEN, use.matrices),
        UseKind.TABLE: (Role.EMBEDDING, PLAIN),
        UseKind.KERNEL: (Role.CONVOLUTION, MatrixSpec(flattened=True)),
        UseKind.ELEMENTWISE: (Role.NORM, None),
    }[use.kind]
    return _Judgement(role, matrices, f"bare parameter of {kind}: {use.code}")


def _is_table(parameter: Tensor, owner: ParamSite) -> bool:
    """Return whether a shape is that of a table of positions: [1, ..., N, d], or as an embedding's."""
    if parameter.ndim > 2:
        return parameter.shape[0] == 1
    tables = [table(child) for child in owner.module.children()]
    return any(t is not None and t.shape[-1] == parameter.shape[-1] for t in tables)


def _router_reason(owner: ParamSite) -> str:
    for module in (owner.module, *owner.ancestors):
        if any(cls.__name__.endswith("Router") for cls in type(module).__mro__):
            return type(module).__name__
    if not isinstance(owner.module, nn.Linear):
        return ""
    for around in owner.ancestors[:2]:  # the gate may be a module of its own
        experts = getattr(around, "experts", None)
        if isinstance(experts, nn.Module):
            number = len(experts) if isinstance(experts, nn.ModuleList) else None
            number = number or getattr(experts, "num_experts", None)
            return f"Linear to {number} experts" if owner.module.out_features == number else ""
    return ""


def _refuse_unready(model: nn.Module) -> None:
    """Raise GroupingError for scripted modules, and for lazy ones that have seen no batch."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise GroupingError(
                f"{name or 'the model'} is scripted, and its layers no longer say what they are: make "
                "the groups of the module before torch.jit.script"
            )
        for attribute, parameter in module._parameters.items():
            if parameter is not None and is_lazy(parameter):
                raise GroupingError(
                    f"{name}.{attribute} of {type(module).__name__} has no shape yet: run one batch "
                    "through the model before the groups are made"
                )


def _refuse_flat(parameter: Tensor, owners: list[ParamSite]) -> None:
    flat = type(parameter).__name__ == "FlatParameter" or hasattr(parameter, "_is_flat_param")
    whole = getattr(parameter, "ds_shape", parameter.shape)  # DeepSpeed ZeRO-3 keeps it there
    flat = flat or tuple(whole) != tuple(parameter.shape)
    for owner in owners:
        module = owner.module
        holds_matrix = isinstance(module, (nn.Linear, nn.Embedding, nn.EmbeddingBag))
        holds_matrix = holds_matrix or is_conv1d(module)
        flat = flat or (holds_matrix and owner.attribute == "weight" and parameter.ndim < 2)
    if flat:
        raise LayoutError(
            f"{owners[0].name} has shape {tuple(parameter.shape)}: its matrix has been flattened, "
            "as FSDP1 and DeepSpeed ZeRO do, and a matrix cannot be orthogonalized from a piece of "
            "it. Shard with FSDP2 (torch.distributed.fsdp.fully_shard), or build the groups first."
        )
