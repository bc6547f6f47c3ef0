"""The arguments of `Muon`: parameters and groups in their many spellings, and keywords."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, cast

from torch import Tensor, nn
from torch.optim.optimizer import ParamsT

from muonscale.errors import ConfigError, GroupingError, nearest
from muonscale.optim.migrate.aliases import FOREIGN
from muonscale.optim.options import check_at_least_0, option_names
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.validate import GROUP_KEYS, OF_SCHEDULERS
from muonscale.optim.rules import ADAMW, MUON
from muonscale.optim.rules.base import rule_of
from muonscale.optim.rules.step_inputs import Group


def own_groups(params: ParamsT | nn.Module, adamw_lr: float | None = None) -> list[Group]:
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


def _groups(params: ParamsT | nn.Module) -> list[Group]:
    if isinstance(params, nn.Module):
        return parameter_groups(params)
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


def split_names(params: Any) -> tuple[list[Tensor], list[str] | None]:
    """Return tensors and, for (name, tensor) pairs as from `named_parameters`, their names."""
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
