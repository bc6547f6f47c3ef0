"""From roles to parameter groups: which rule, learning rate and decay every parameter gets.

One group per role, and one more for each set of parameters that an override sets apart. The
routing report (`muonscale.optim.report`) says what was decided, and by what.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import nn

from muonscale.errors import ConfigError, LayoutError, RoutingError, nearest
from muonscale.optim.matrices import PLAIN, Matrices, amend, matrix_shapes
from muonscale.optim.report import routing_report as routing_report
from muonscale.optim.roles import Assignment, Role, assign_roles

RuleT = Literal["muon", "adamw"]
RULES: tuple[RuleT, ...] = ("muon", "adamw")
Overrides = Mapping[str, Mapping[str, Any]]
"""From a role's name or a glob over parameter names to options."""

MUON_ROLES = frozenset({Role.HIDDEN, Role.ROUTER})
"""Roles on Muon by default (Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982)."""
GROUP_OPTIONS = frozenset(
    [
        "lr",
        "weight_decay",
        "decay",
        "cautious_decay",
        "momentum",
        "nesterov",
        "ns_coefficients",
        "ns_steps",
        "ns_form",
        "ns_dtype",
        "post_norm",
        "post_norm_eps",
        "normuon_beta2",
        "scale",
        "rms",
        "betas",
        "eps",
        "master",
        "rounding_seed",
        "wire_dtype",
    ]
)
"""Options that `Muon` reads from a group."""
_ROUTING_OPTIONS = frozenset({"rule", "role", "matrices"})


@dataclass
class _Routed:
    assignment: Assignment
    rule: str
    options: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""


def parameter_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.1,
    overrides: Overrides | None = None,
    rule: RuleT = "muon",
) -> list[dict[str, Any]]:
    """Return the parameter groups of `model` for `Muon`: one per role.

    Hidden matrices and routers are on Muon, all else on AdamW, every group with the same `lr` and
    `weight_decay` (Liu et al., arXiv 2502.16982). Parameters that need no gradient are left out.
    Works on the meta device.

    Args:
        model: any module; Hugging Face causal language models are known in detail.
        lr: learning rate of every group.
        weight_decay: decoupled decay of every group, per unit of `lr`.
        overrides: from a role ("head") or an anchored glob over parameter names
            ("model.layers.*.mlp.*", where `*` also matches dots) to options: `rule`, `role`,
            `matrices` (a `Matrices`, or a mapping of its fields to change what was found, such as
            `{"heads": 8}`), `lr`, `weight_decay`, and every option of `Muon` that a group can
            have. Roles come first, then globs in the order given; the last one wins.
        rule: "adamw" puts everything on AdamW, for comparisons.

    Returns:
        Dicts with `name` (the role; with the pattern that set it apart, as in "hidden/*.mlp.*"),
        `role`, `rule`, `params`, `param_names`, `lr`, `weight_decay`, `matrices` (parameter name
        to `Matrices`, for what holds any), `why` (parameter name to what decided), other options.

    Raises:
        RoutingError: for a pattern that matches nothing, a Muon rule on something that is no
            matrix, or no parameter on Muon at all.
        ConfigError: for an unknown option, rule or field of `Matrices`.
        LayoutError: for flattened weights, or matrices that do not fit their parameter.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
        >>> [(g["name"], g["rule"], g["param_names"]) for g in parameter_groups(model, lr=1e-3)]
        ... # doctest: +NORMALIZE_WHITESPACE
        [('hidden', 'muon', ['1.weight']), ('embedding', 'adamw', ['0.weight']),
         ('head', 'adamw', ['2.weight']), ('norm', 'adamw', ['1.bias', '2.bias'])]
    """
    _check_rule(rule, "rule")
    found = assign_roles(model)
    routed = [_default(a, rule) for a in found if a.parameter.requires_grad]
    if not routed:
        raise RoutingError(
            f"none of the {len(found)} parameters of the model needs a gradient: set requires_grad of those to train"
        )
    frozen = [a for a in found if not a.parameter.requires_grad]
    _apply_overrides(routed, overrides or {}, rule, frozen)
    for item in routed:
        _check_item(item)
    if rule == "muon" and all(item.rule != "muon" for item in routed):
        raise RoutingError(
            f"none of the {len(routed)} trainable parameters is on Muon: none is a hidden matrix or "
            'a router. Name some in overrides, or ask for rule="adamw".'
        )
    return _grouped(routed, {"lr": lr, "weight_decay": weight_decay})


def _default(assignment: Assignment, rule: RuleT) -> _Routed:
    return _Routed(assignment, _rule_of(assignment.role, rule))


def _rule_of(role: Role, rule: RuleT) -> RuleT:
    return rule if role in MUON_ROLES else "adamw"


def _apply_overrides(
    routed: list[_Routed], overrides: Overrides, rule: RuleT, frozen: list[Assignment]
) -> None:
    roles = {key: options for key, options in overrides.items() if key in set(Role)}
    globs = {key: options for key, options in overrides.items() if key not in roles}
    for pattern, options in {**roles, **globs}.items():
        _check_options(pattern, options)
        if pattern in roles:
            chosen = [item for item in routed if item.assignment.role == pattern]
        else:
            chosen = [item for item in routed if _matches(pattern, item.assignment)]
        if not chosen:
            raise RoutingError(_nothing_matched(pattern, routed, frozen))
        for item in chosen:
            _override(item, pattern, options, rule)
            if pattern not in roles:
                item.pattern = pattern


def _override(item: _Routed, pattern: str, options: Mapping[str, Any], rule: RuleT) -> None:
    a = item.assignment
    changes: dict[str, Any] = {"why": f"{a.why}; override {pattern!r}"}
    if "role" in options:
        role = Role(options["role"])
        item.rule = _rule_of(role, rule)
        # A matrix called norm holds none any more; a convolution called hidden keeps its layout.
        changes |= {"role": role, "matrices": None if role == Role.NORM else a.matrices}
    if "matrices" in options:
        changes["matrices"] = _amended(a.matrices or PLAIN, options["matrices"], pattern)
    item.assignment = replace(a, **changes)
    item.rule = options.get("rule", item.rule)
    item.options |= {k: v for k, v in options.items() if k in GROUP_OPTIONS}


def _amended(found: Matrices, given: object, pattern: str) -> Matrices:
    """Return what an override says of the matrices: all of it, or fields that change `found`."""
    if isinstance(given, Matrices):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"override {pattern!r}: matrices is {given!r}: a Matrices or a mapping of its fields is "
            'accepted, such as {"heads": 8}'
        )
    try:
        return amend(found, given)
    except ConfigError as error:
        raise ConfigError(f"override {pattern!r}: {error}") from None


def _matches(pattern: str, assignment: Assignment) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in assignment.aliases)


def _nothing_matched(pattern: str, routed: list[_Routed], frozen: list[Assignment]) -> str:
    if asleep := [a.name for a in frozen if a.role == pattern or _matches(pattern, a)]:
        return (
            f"override {pattern!r} matches {asleep[0]} and no trainable parameter: what it matches "
            "is frozen (requires_grad is False)"
        )
    names = [item.assignment.name for item in routed]
    roles = {str(item.assignment.role) for item in routed}
    hint = nearest(pattern, {*names, *roles})
    if hint.startswith("accepted"):
        hint = f"the roles here are {', '.join(sorted(roles))}; a parameter is called {names[0]}"
    return f"override {pattern!r} matches no trainable parameter: {hint}"


def _check_options(pattern: str, options: Mapping[str, Any]) -> None:
    for option in options:
        if option not in GROUP_OPTIONS | _ROUTING_OPTIONS:
            hint = nearest(option, GROUP_OPTIONS | _ROUTING_OPTIONS)
            raise ConfigError(f"override {pattern!r} has no option {option!r}: {hint}")
    if "role" in options and options["role"] not in set(Role):
        raise ConfigError(f"override {pattern!r}: {nearest(str(options['role']), set(Role))}")
    if "rule" in options:
        _check_rule(options["rule"], f"override {pattern!r}")


def _check_rule(rule: object, where: str) -> None:
    if rule not in RULES:
        raise ConfigError(f"{where}: no rule is called {rule!r}: {nearest(rule, RULES)}")


def _check_item(item: _Routed) -> None:
    a = item.assignment
    if item.rule != "muon":
        return
    if a.matrices is None:
        raise RoutingError(
            f"{a.name} has shape {tuple(a.parameter.shape)} and is no matrix ({a.why}): "
            'Muon orthogonalises matrices, use rule "adamw" for it'
        )
    try:
        matrix_shapes(a.parameter.shape, a.matrices)
    except LayoutError as error:
        raise LayoutError(f"{a.name}: {error}") from None


def _grouped(routed: list[_Routed], common: dict[str, Any]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for item in sorted(routed, key=lambda item: list(Role).index(item.assignment.role)):
        a = item.assignment
        name = f"{a.role}/{item.pattern}" if item.pattern else str(a.role)
        key = (name, item.rule, repr(sorted(item.options.items(), key=lambda pair: pair[0])))
        if key not in groups:
            taken = sum(group["name"].split("#")[0] == name for group in groups.values())
            groups[key] = {
                "name": f"{name}#{taken + 1}" if taken else name,
                "role": str(a.role),
                "rule": item.rule,
                "params": [],
                "param_names": [],
                **common,
                **item.options,
                "matrices": {},
                "why": {},
            }
        group = groups[key]
        group["params"].append(a.parameter)
        group["param_names"].append(a.name)
        group["why"][a.name] = a.why
        if a.matrices is not None:
            group["matrices"][a.name] = a.matrices
    return list(groups.values())
