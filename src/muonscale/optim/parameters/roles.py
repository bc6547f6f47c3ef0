"""What each parameter of a model is: its role, and the logical matrices it holds.

A *role* follows from the module that owns the parameter, from the module's place in the model and
from which other modules own the very same parameter (tied weights); never from a substring of a
parameter's name. What no common base class tells is read from a class's name: `Conv1D`, routers
(`...Router`), and the fused projections and tables that `muonscale.optim.parameters.fused_weights` lists.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn

from muonscale.errors import LayoutError
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec
from muonscale.optim.parameters.adapters import adapter_role, copies_of, without_adapters
from muonscale.optim.parameters.fused_weights import (
    ELEMENTWISE,
    holds_blocks,
    holds_experts,
    stored_matrices,
)
from muonscale.optim.parameters.module_survey import ParamSite, Survey, is_conv1d, survey, table


class Role(StrEnum):
    """What a parameter is to the model."""

    HIDDEN = "hidden"
    """A matrix between hidden activations."""
    EMBEDDING = "embedding"
    """Rows looked up by index or position; also an output matrix tied to one."""
    HEAD = "head"
    """The matrix that maps to logits over the vocabulary."""
    ROUTER = "router"
    """The matrix that chooses experts."""
    NORM = "norm"
    """A norm's gain, a bias, a scalar, a state space's decay: anything that is not a matrix."""
    CONVOLUTION = "convolution"
    """A convolution kernel, depthwise ones included."""


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


_Found = tuple[Role, MatrixSpec | None, str]
_NORMS = (
    nn.LayerNorm,
    nn.RMSNorm,
    nn.GroupNorm,
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
)
_CONVOLUTIONS = (nn.modules.conv._ConvNd,)
_HOLD_MATRICES = (nn.Linear, nn.Bilinear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)

GUESSED = "taken for a matrix"
"""In `RoleAssignment.why` where a bare parameter could be something else."""


def assign_roles(model: nn.Module) -> list[RoleAssignment]:
    """Return what every parameter of `model` is, in the order of `model.named_parameters()`.

    The first rule that applies decides:

    1. owned by an `nn.Embedding`, by a module that declares `num_embeddings` and `embedding_dim`,
       or by what `get_input_embeddings()` returns: embedding, and so is a head whose weight is
       tied to it, wherever in the model the other module stands;
    2. owned by what `get_output_embeddings()` returns: head;
    3. fewer than two axes (or at most one longer than 1, outside a Linear), a norm module's
       parameter, a bias per expert, a state space's decay: norm;
    4. a convolution module's kernel: convolution;
    5. inside a module whose class is called `...Router`, or a Linear beside `experts` with as many
       outputs as there are experts: router;
    6. in a model without output embeddings, a Linear with as many outputs as the largest embedding
       has rows: head. If that number is also a width inside the model (the inputs of some Linear, or
       the columns of the embedding), only the last such Linear;
    7. a bare `nn.Parameter` (of a module that is known to hold no matrices, and not its `weight`)
       of shape `[1, ..., N, d]`, or `[N, d]` in a module that also has an embedding with d
       columns: a table of positions, embedding;
    8. everything else: hidden. LoRA's A and B are Linears and so a matrix each. Where a bare
       parameter was taken for a matrix, `why` says so.

    A Linear of one row or one column stays hidden: the polar factor of a vector is the vector
    divided by its length, so such a step is normalized momentum with the RMS of any other.

    Known to hold several matrices or a transposed one: see `muonscale.optim.parameters.fused_weights`. What is not
    known (a fused QKV of a class of your own) counts as one matrix: say otherwise by an override.

    Raises:
        LayoutError: for a weight that should be a matrix and is flat (FSDP1, DeepSpeed ZeRO).
    """
    facts = survey(model)
    found = []
    for parameter, owners in facts.owners.items():
        role, matrices, why = _judge(parameter, owners, facts)
        names = tuple(dict.fromkeys(owner.name for owner in owners))
        found.append(
            RoleAssignment(
                name=names[0],
                parameter=parameter,
                aliases=names,
                role=role,
                matrices=matrices,
                why=why,
            )
        )
    return found


def _judge(parameter: Tensor, owners: list[ParamSite], facts: Survey) -> _Found:
    _refuse_flat(parameter, owners)
    if found := adapter_role(parameter, owners[0]):
        return Role(found[0]), *found[1:]
    owner = without_adapters(owners[0])
    kind = type(owner.module).__name__
    same = {parameter, *copies_of(owners[0])}
    if same & facts.inputs:
        tied = [other.name for other in owners if table(other.module) is None]
        return Role.EMBEDDING, PLAIN, f"embedding, tied to {tied[0]}" if tied else kind
    if same & facts.outputs:
        return Role.HEAD, PLAIN, "get_output_embeddings()"
    if not _is_matrix(parameter, owner):
        return Role.NORM, None, f"{parameter.ndim}-D, {kind}"
    if isinstance(owner.module, _CONVOLUTIONS):
        return Role.CONVOLUTION, MatrixSpec(flattened=True), kind
    if router := _router_reason(owner):
        return Role.ROUTER, PLAIN, router
    if same & facts.heads_by_shape:
        return Role.HEAD, PLAIN, "outputs = rows of the embedding"
    if not _is_bare(owner):
        matrices, holds = stored_matrices(parameter, owner)
        return Role.HIDDEN, matrices, f"{kind}{holds}"
    if _is_table(parameter, owner):
        return Role.EMBEDDING, PLAIN, f"bare parameter of {kind}, a table of positions"
    return Role.HIDDEN, PLAIN, f"bare parameter of {kind}, {GUESSED}"


def _is_matrix(parameter: Tensor, owner: ParamSite) -> bool:
    if parameter.ndim < 2 or isinstance(owner.module, _NORMS):
        return False
    if holds_experts(owner.module) and parameter.ndim == 2:
        return False  # [E, out]: one bias per expert
    if (type(owner.module).__name__, owner.attribute) in ELEMENTWISE:
        return False
    longer_axes = sum(length > 1 for length in parameter.shape)
    return longer_axes > 1 or isinstance(owner.module, nn.Linear) or is_conv1d(owner.module)


def _is_bare(owner: ParamSite) -> bool:
    module = owner.module
    known = isinstance(module, _HOLD_MATRICES) or holds_experts(module) or holds_blocks(module)
    return not known and owner.attribute != "weight"


def _is_table(parameter: Tensor, owner: ParamSite) -> bool:
    if parameter.ndim > 2:
        return parameter.shape[0] == 1
    tables = [table(child) for child in owner.module.children()]
    return any(t is not None and t.shape[-1] == parameter.shape[-1] for t in tables)


def _router_reason(owner: ParamSite) -> str:
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
