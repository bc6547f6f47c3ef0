"""Parameters that join an optimizer later: which they are, and the groups that they belong to."""

from __future__ import annotations

import fnmatch
import weakref
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from muonscale.errors import GroupingError, nearest, shown
from muonscale.optim.parameters.groups import groups_again
from muonscale.optim.parameters.module_survey import survey
from muonscale.optim.parameters.source import GroupSource

Group = dict[str, Any]
_STRUCTURE = frozenset(
    ["name", "role", "rule", "params", "param_names", "matrices", "why", "guessed", "lr"]
)


def find_source(
    known: GroupSource | None,
    candidate: object,
    model: nn.Module | None,
    groups: Iterable[Mapping[str, Any]],
) -> tuple[nn.Module, GroupSource]:
    """Return the model of an optimizer: the one given, else the one its groups were made from.

    Raises:
        GroupingError: if neither is there, and `candidate` is no model that has all that is in
            `groups`.
    """
    if model is None and known is not None and known.model is not None:
        return known.model, known
    if model is None and isinstance(candidate, nn.Module):
        own = set(candidate.parameters())
        model = candidate if all(p in own for group in groups for p in group["params"]) else None
    if model is None:
        raise GroupingError(
            f"the optimizer does not know the model that has {shown(candidate)}: it was not made from one, "
            "nor from what parameter_groups returned, or the model no longer exists. Give the model "
            "as model=..."
        )
    arguments = known.arguments if known is not None else {}
    return model, GroupSource(weakref.ref(model), arguments)


def select(model: nn.Module, what: nn.Module | str | Sequence[str]) -> list[Tensor]:
    """Return the parameters of `model` that belong to a module of it, or match a glob.

    Raises:
        GroupingError: for a module that is not part of the model, a glob without a match, and a
            parameter that can have no gradient.
    """
    named = {p: [site.name for site in sites] for p, sites in survey(model).owners.items()}
    if isinstance(what, nn.Module):
        chosen = list(what.parameters())
        if strange := next((n for n, p in what.named_parameters() if p not in named), ""):
            raise GroupingError(
                f"the model does not have {strange} of the {type(what).__name__} that was given: "
                "add the module to the model first, or give a module that is in it"
            )
    else:
        chosen = []
        for glob in [what] if isinstance(what, str) else what:
            matched = [
                p
                for p, names in named.items()
                if any(fnmatch.fnmatchcase(name, glob) for name in names)
            ]
            if not matched:
                every = [name for names in named.values() for name in names]
                raise GroupingError(f"{glob!r} matches no parameter: {nearest(glob, every)}")
            chosen += matched
    if strange := next((p for p in chosen if not p.is_floating_point()), None):
        raise GroupingError(f"{named[strange][0]} is {strange.dtype}: it can have no gradient")
    return list(dict.fromkeys(chosen))


def groups_of(model: nn.Module, source: GroupSource, parameters: Sequence[Tensor]) -> list[Group]:
    """Return the groups that `parameter_groups` makes of some trainable parameters of a model.

    Raises:
        GroupingError: for a parameter that the model does not have, or that is frozen.
    """
    wanted = set(parameters)
    groups = []
    for group in groups_again(model, source.arguments):
        pairs = zip(group["param_names"], group["params"], strict=True)
        if kept := [(name, p) for name, p in pairs if p in wanted]:
            names, tensors = map(list, zip(*kept, strict=True))
            guessed = [name for name in group["guessed"] if name in names]
            groups.append({**group, "param_names": names, "params": tensors, "guessed": guessed})
    found = {p for group in groups for p in group["params"]}
    for parameter in parameters:
        if parameter not in found:
            frozen = any(parameter is p for p in model.parameters())
            raise GroupingError(
                f"a parameter of shape {tuple(parameter.shape)} "
                + (
                    "is frozen: unfreeze(...) of the optimizer trains it"
                    if frozen
                    else "is none of the model's: give its group a `rule`, or add it to the model"
                )
            )
    return groups


def find_home(new: Mapping[str, Any], groups: Sequence[Group]) -> Group | None:
    """Return the group that parameters with the options of `new` belong to, or None.

    Of several groups of a role that an override has set apart, it is the one with the same options.
    """
    stem = new["name"].split("#")[0]
    homes = [
        group
        for group in groups
        if str(group.get("name", "")).split("#")[0] == stem and group["rule"] == new["rule"]
    ]
    if len(homes) < 2:
        return homes[0] if homes else None
    options = {key: value for key, value in new.items() if key not in _STRUCTURE}
    if "lr" in new:
        options["peak_lr"] = new["lr"]
    return next((g for g in homes if all(g.get(k) == v for k, v in options.items())), None)


def scheduled(peak_lr: float, groups: Sequence[Group], rule: str) -> Group:
    """Return the lr of a group that is added later, and what schedulers would have written into it.

    It has gone the way from its peak that a group of the same rule has gone from its own.
    """
    like = next((group for group in groups if group["rule"] == rule), groups[0])
    if not like["peak_lr"] > 0:
        return {"lr": peak_lr, "peak_lr": peak_lr}
    rates = ("lr", "initial_lr", "max_lr", "min_lr")
    new = {key: like[key] * peak_lr / like["peak_lr"] for key in rates if key in like}
    kept = {key: like[key] for key in ("base_momentum", "max_momentum", "swa_lr") if key in like}
    return {**new, **kept, "peak_lr": peak_lr}
