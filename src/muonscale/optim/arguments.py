"""The arguments of `Muon`: parameters and groups in their many spellings, and keywords."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import count
from typing import Any, cast

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from muonscale.errors import ConfigError, GroupingError, nearest, shown
from muonscale.optim.migrate.aliases import FOREIGN
from muonscale.optim.options import (
    GroupingOptions,
    check_at_least_0,
    check_given,
    defaults_of,
    option_names,
)
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.roles import assign_roles
from muonscale.optim.parameters.source import GroupSource, ParameterGroups
from muonscale.optim.parameters.unfreeze import groups_of
from muonscale.optim.parameters.validate import GROUP_KEYS, OF_SCHEDULERS
from muonscale.optim.rules import ADAMW, MUON
from muonscale.optim.rules.base import rule_of
from muonscale.optim.rules.step_inputs import Group

_OF_PARAMETERS = frozenset(["params", "param_names", "name", "matrices"])
"""What a group says of each of its parameters, and its name."""


def with_source(
    params: ParamsT | nn.Module, grouping: Mapping[str, Any]
) -> tuple[ParamsT, GroupSource | None]:
    """Return groups in place of a model, and the model that groups were made from if they say so.

    `grouping` is for `parameter_groups`, so that `params` must be a model where it differs from the
    defaults.
    """
    if isinstance(params, nn.Module):
        params = parameter_groups(params, **grouping)
    else:
        check_given(grouping, GroupingOptions)
        for name, default in defaults_of(GroupingOptions).items():
            if grouping[name] != default:
                raise ConfigError(
                    f"Muon was given {name}={grouping[name]!r} and no model: give it to "
                    f"parameter_groups(model, {name}={grouping[name]!r}), which makes the groups"
                )
    return params, params.source if isinstance(params, ParameterGroups) else None


def own_groups(params: ParamsT, adamw_lr: float | None = None) -> list[Group]:
    """Return the groups as dicts of our own, so that the caller's are not written to.

    Groups on AdamW that have no learning rate get `adamw_lr`, if there is one.
    """
    groups = _groups(params)
    if adamw_lr is not None:
        check_at_least_0("adamw_lr", adamw_lr)
        for group in groups:
            if "rule" in group and not rule_of(group).on_matrices:
                group.setdefault("lr", adamw_lr)
    return groups


def _groups(params: ParamsT) -> list[Group]:
    if isinstance(params, Tensor):
        raise GroupingError(
            f"params is one tensor of shape {tuple(params.shape)}: give a list of tensors, or of "
            "groups"
        )
    entries = list(params)
    if not entries:
        raise ConfigError(
            f"params is {entries}, so there is nothing to optimize: give at least one tensor or "
            "group"
        )
    if isinstance(entries[0], dict):
        groups = [dict(cast(Group, entry)) for entry in entries]
        _check_some_rule(groups)
        return groups
    return [{"params": entries}]


def _check_some_rule(groups: Sequence[Group]) -> None:
    """Refuse the groups by decay that trainers make: embeddings in them look like matrices."""
    if len(groups) > 1 and not any("rule" in group for group in groups):
        raise GroupingError(
            f"{len(groups)} groups were given and none has a `rule`, as where a trainer makes "
            "groups by weight decay: embeddings and heads would be taken for hidden matrices. Let "
            "parameter_groups(model, lr=...) make the groups (in Hugging Face's Trainer: "
            "optimizer_cls_and_kwargs=(MuonFactory, {\"lr\": ...})), or give them the rules 'muon' "
            "and 'adamw'"
        )


def by_role(
    group: Group, source: GroupSource | None, taken: Collection[str], adamw_lr: float | None
) -> list[Group]:
    """Return a group without a rule as groups by role, from what the model says of its parameters.

    Raises:
        GroupingError: if the model is not known, or does not have one of them.
    """
    model = source.model if source is not None else None
    if source is None or model is None:
        raise GroupingError(
            f"a group of {len(group['params'])} parameters has no `rule`, and the model that the "
            "optimizer was made from is not known: embeddings and heads would be taken for hidden "
            "matrices. Give the group a `rule`, let parameter_groups make it, or call "
            "optimizer.unfreeze(module, model=...)"
        )
    options = {k: v for k, v in group.items() if k not in _OF_PARAMETERS}
    groups: list[Group] = []
    for found in own_groups(groups_of(model, source, group["params"]), adamw_lr):
        stem = f"{group['name']}/{found['name']}" if "name" in group else found["name"]
        names = {*taken, *(other["name"] for other in groups)}
        numbered = (f"{stem}#{number}" for number in count(2))
        name = stem if stem not in names else next(n for n in numbered if n not in names)
        matrices = {**found["matrices"], **group.get("matrices", {})}
        groups.append({**found, **options, "name": name, "matrices": matrices})
    return groups


def as_in_model(group: Group, source: GroupSource | None) -> Group:
    """Return a group without names with the names and matrices that the model gives its parameters.

    A group with a parameter that the model does not have is returned as it is.
    """
    model = source.model if source is not None else None
    if model is None or "param_names" in group:
        return group
    found = {assigned.parameter: assigned for assigned in assign_roles(model)}
    if not all(parameter in found for parameter in group["params"]):
        return group
    own = [found[parameter] for parameter in group["params"]]
    matrices = {a.name: a.matrices for a in own if a.matrices is not None}
    return {
        **group,
        "param_names": [a.name for a in own],
        "matrices": {**matrices, **group.get("matrices", {})},
    }


def split_names(params: Any) -> tuple[list[Tensor], list[str] | None]:
    """Return tensors and, for (name, tensor) pairs as from `named_parameters`, their names."""
    if not isinstance(params, Iterable):
        raise GroupingError(
            f"the params of a group are {shown(params)}: give tensors, or (name, tensor) pairs"
        )
    entries: list[Any] = [params] if isinstance(params, Tensor) else list(params)
    if entries and all(isinstance(entry, tuple) for entry in entries):
        return [tensor for _, tensor in entries], [name for name, _ in entries]
    return entries, None


def check_keys(group: Group) -> None:
    """Raise ConfigError for a key that no option has: it would change nothing."""
    for key, value in group.items():
        if key not in OF_SCHEDULERS:
            refuse_unknown(key, value, GROUP_KEYS | option_names(), "a group has")


def refuse_unknown(key: str, value: object, accepted: Collection[str], where: str) -> None:
    """Raise ConfigError for a key that is not accepted, with what to write instead."""
    if key in accepted:
        return
    if key == "use_muon":
        rule = MUON if value else ADAMW
        hint = f'give rule="{rule.name}" in the group instead'
    elif sources := [name for name, other in FOREIGN.items() if key in other.arguments]:
        hint = (
            f"it is an argument of {', '.join(sources)}; "
            f'translate_arguments("{sources[0]}", ...) says what it is here'
        )
    else:
        hint = nearest(key, accepted)
    raise ConfigError(f"{where} {key}={value!r}, which is no option of Muon: {hint}")
