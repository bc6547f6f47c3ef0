"""Factors of width and depth that a forward pass lacks, or should not have, by parameter.

A *fold* is such a factor. It is multiplied into a parameter instead of changing the forward pass
(see `muonscale.transfer.multipliers.fold_in`).
"""

from __future__ import annotations

import fnmatch
import math
from dataclasses import dataclass

from torch import nn

from muonscale.errors import ConfigError
from muonscale.optim.parameters.module_survey import WRAPPED
from muonscale.optim.parameters.roles import Role, RoleAssignment
from muonscale.transfer.constants import ForwardConstants
from muonscale.transfer.pair import Pair

QUERIES = ("q_norm", "q_b_proj", "q_proj")
"""Names of the modules that compute the queries of attention, the last one first."""
HEAD_SIZES = ("qk_head_dim", "head_dim", "head_size")
"""Attributes of attention modules with the size of a head's queries and keys."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """A factor to multiply into one parameter."""

    factor: float
    why: str
    offset: bool = False
    """Whether the parameter is the w of a gain 1 + w."""


Folds = dict[str, list[Fold]]
"""Folds by parameter name."""


def width_folds(pair: Pair) -> Folds:
    """Return the folds of a model that is m times as wide: embedding, tied head, attention scores.

    * If the forward pass multiplies embeddings by sqrt(width), embeddings take 1/sqrt(m).
    * A tied head has the scale of the embedding. The rest of its 1/m is folded into the gain and
      bias of the final norm, because logits are proportional to them.
    * Attention scores must be divided by the head size, but the forward pass divides by its square
      root (Yang et al., Tensor Programs V, arXiv 2203.03466, definition 4.1). The rest is folded
      into the queries.

    Raises:
        ConfigError: if there is no parameter to fold a factor into.
    """
    folds: Folds = {}
    embedding = _find_token_embedding(pair)
    if embedding is not None:
        m = embedding.parameter.shape[-1] / pair.base_of(embedding.name).parameter.shape[-1]
        shrunk = 1 / math.sqrt(m) if pair.constants.scaled_embedding else 1.0
        if shrunk != 1:
            _add(folds, embedding.name, shrunk, "multiplied by sqrt(width)")
        if m != 1 and _is_tied(pair.model, embedding):
            _fold_module(
                pair, folds, pair.constants.final_norm, 1 / m / shrunk, "logits of a tied head"
            )
    for name, module in pair.model.named_modules():
        if (size := _find_head_size(module)) is not None and hasattr(module, "scaling"):
            unwrapped = ".".join(part for part in name.split(".") if part not in WRAPPED)
            _fold_scores(pair, folds, unwrapped, module, size)
    return folds


def depth_folds(pair: Pair, layers: float) -> Folds:
    """Return the folds of residual branches in a model with `layers` times the layers: 1/layers.

    Raises:
        ConfigError: if no parameter matches the `branch_ends` of the constants.

    References:
        Dey et al., CompleteP, arXiv 2505.01618, table 1, alpha = 1.
    """
    folds: Folds = {}
    if layers == 1:
        return folds
    for name, assignment in pair.found.items():
        if ends_branch(name, pair.constants):
            offset = assignment.role == Role.NORM and name.endswith(".weight")
            offset = offset and pair.constants.offset_gains
            _add(folds, name, 1 / layers, "end of a residual branch", offset=offset)
    if not folds:
        raise ConfigError(
            "depth=complete_p: no parameter matches the ends of residual branches, "
            f"{list(pair.constants.branch_ends)}. Set ForwardConstants(branch_ends=...), or leave "
            "depth out"
        )
    return folds


def ends_branch(name: str, constants: ForwardConstants) -> bool:
    """Return whether a parameter is the last of a residual branch."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in constants.branch_ends)


def _add(folds: Folds, name: str, factor: float, why: str, *, offset: bool = False) -> None:
    folds.setdefault(name, []).append(Fold(factor=factor, why=why, offset=offset))


def _find_token_embedding(pair: Pair) -> RoleAssignment | None:
    """Return the token embedding: the input embedding of the model, or else the largest table."""
    tables = [a for a in pair.found.values() if a.role == Role.EMBEDDING]
    get = getattr(pair.model, "get_input_embeddings", None)
    if callable(get):
        weight = getattr(get(), "weight", None)
        tables = [a for a in tables if a.parameter is weight] or tables
    return max(tables, key=lambda a: a.parameter.shape[0], default=None)


def _is_tied(model: nn.Module, embedding: RoleAssignment) -> bool:
    get = getattr(model, "get_output_embeddings", None)
    if callable(get) and (head := get()) is not None:
        return getattr(head, "weight", None) is embedding.parameter
    return len(embedding.aliases) > 1


def _fold_module(pair: Pair, folds: Folds, name: str, factor: float, why: str) -> None:
    inside = [n for n in pair.found if n.rpartition(".")[0] == name]
    if not inside:
        raise ConfigError(
            f"{why} need a factor of {factor:g}, but {name!r} has no parameter to fold it into"
        )
    for parameter in inside:
        is_gain = pair.found[parameter].role == Role.NORM and parameter.endswith(".weight")
        _add(folds, parameter, factor, why, offset=is_gain and pair.constants.offset_gains)


def _find_head_size(module: nn.Module) -> int | None:
    sizes = (getattr(module, name, None) for name in HEAD_SIZES)
    return next((size for size in sizes if isinstance(size, int)), None)


def _fold_scores(pair: Pair, folds: Folds, name: str, module: nn.Module, size: int) -> None:
    counterpart = _find_base_module(pair, name)
    base_size = _find_head_size(counterpart)
    assert base_size is not None
    scaling, base_scaling = module.scaling, counterpart.scaling
    assert isinstance(scaling, int | float) and isinstance(base_scaling, int | float)
    factor = base_size / size * base_scaling / scaling
    if math.isclose(factor, 1.0, rel_tol=1e-12):
        return
    for query in QUERIES:
        if isinstance(getattr(module, query, None), nn.Module):
            _fold_module(pair, folds, f"{name}.{query}", factor, "scores of longer heads")
            return
    raise ConfigError(
        f"the head size of {name} is {size}, and {base_size} at the base width: its scores need a "
        f"factor of {factor:g}, but queries, keys and values share one parameter. Keep the head "
        "size, and give the wider model more heads"
    )


def _find_base_module(pair: Pair, name: str) -> nn.Module:
    """Return the module of the base that holds the counterparts of a module's parameters."""
    below = next(n for n in pair.found if n.startswith(f"{name}."))
    counterpart = pair.base_of(below).name
    return pair.base.get_submodule(counterpart[: len(counterpart) - len(below) + len(name)])
