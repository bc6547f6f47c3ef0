"""From roles to parameter groups: which rule, learning rate and decay every parameter gets.

One group per role, and one more for each set of parameters that an override sets apart. The
grouping report (`muonscale.optim.parameters.report`) says what was decided, and by what.
"""

from __future__ import annotations

import fnmatch
import inspect
import sys
import warnings
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from muonscale.errors import ConfigError, GroupingError, LayoutError, nearest, shown
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, amend, matrix_shapes
from muonscale.optim.options import (
    ConvolutionsT,
    GroupingOptions,
    HeadsT,
    check_at_least_0,
    check_given,
    check_options_given,
    names_of,
    option_names,
)
from muonscale.optim.parameters.attention_heads import (
    NOT_DIVIDED,
    HeadsNotFound,
    attention_projections,
)
from muonscale.optim.parameters.convolutions import holds_vectors
from muonscale.optim.parameters.roles import Role, RoleAssignment, assign_roles
from muonscale.optim.parameters.source import GroupSource, ParameterGroups
from muonscale.optim.rules import ADAMW, MUON
from muonscale.optim.rules.base import RULES, find_rule

Overrides = Mapping[str, Mapping[str, Any]]
"""From a role's name or a glob over parameter names to options."""

MATRIX_ROLES = frozenset({Role.HIDDEN, Role.ROUTER})
"""Roles on a rule for matrices by default (Liu et al., Muon is Scalable for LLM Training, arXiv
2502.16982).
"""
_GROUPING_OPTIONS = frozenset({"rule", "role", "matrices", *names_of(GroupingOptions)})


@dataclass
class _GroupCandidate:
    assignment: RoleAssignment
    rule: str
    on_adamw_lr: bool
    """Whether the parameter takes `adamw_lr`, if that is given."""
    heads: HeadsT
    options: dict[str, Any] = field(default_factory=dict)
    pattern: str = ""
    guessed: bool = False
    heads_pattern: str = ""
    """The override that asked for `heads`; empty for the argument."""


def parameter_groups(
    model: nn.Module,
    lr: float | None = None,
    weight_decay: float | None = None,
    *,
    adamw_lr: float | None = None,
    overrides: Overrides | None = None,
    rule: str = MUON.name,
    strict: bool = False,
    heads: HeadsT = "whole",
    convolutions: ConvolutionsT = "adamw",
) -> ParameterGroups:
    """Return the parameter groups of `model` for `Muon`: one per role.

    Hidden matrices and routers are on Muon, all else on AdamW (Liu et al., arXiv 2502.16982).
    Parameters that need no gradient are left out. Works on the meta device. Only what is given here
    is written into the groups; everything else is left to `Muon`, so that
    `Muon(parameter_groups(model), **preset("keller"))` has every option of the preset.

    Args:
        model: any module; Hugging Face causal language models are known in detail.
        lr: learning rate of every group.
        weight_decay: decoupled decay of every group, per unit of `lr`.
        adamw_lr: learning rate of what is not hidden matrices or routers (embeddings, head, norms,
            biases), and of what an override puts on AdamW. With `rule="adamw"` too, so that both
            rules can be compared with two learning rates each.
        overrides: from a role ("head") or an anchored glob over parameter names
            (`"model.layers.*.mlp.*"`, where `*` also matches dots) to options: `rule`, `role`,
            `matrices` (a `MatrixSpec`, or a mapping of its fields to change what was found, such as
            `{"heads": 8}` or `{"heads": "auto"}`), `heads`, `convolutions`, `lr`, `weight_decay`,
            and every option of `Muon` that a group can have. Roles come first, then globs in the
            order given; the last one wins.
        rule: "adamw" puts everything on AdamW, for comparisons.
        heads: "auto" makes the block of each attention head a matrix of its own (q, k, v, the
            output projection by columns, and the up-projections of multi-head latent attention).
            Their number and size come from the attention module. Where it does not say them, a
            projection stays whole, `why` gives the reason, and that is a guess.
        convolutions: "muon" treats kernels as hidden matrices: `[out, in/groups, k...]` is one
            matrix `(out/groups, in/groups*k)` for each group, and the `[in, out/groups, k...]` of a
            transposed convolution one `(out/groups*k, in/groups)`. Vectors (depthwise kernels) stay
            on AdamW.
        strict: refuse guesses. Without it, a warning names the first one. A guess is a parameter of
            which nothing that is known excludes another role or other matrices; a bare parameter of
            unknown use is on AdamW then. An override of its role, rule or matrices ends the guess.

    Returns:
        A list, which knows the model for `Muon.unfreeze`, of dicts with `name` (the role; with the
        pattern that set it apart, as in `"hidden/*.mlp.*"`), `role`, `rule`, `params`,
        `param_names`, `matrices` (parameter name to `MatrixSpec`, for what holds any), `why`
        (parameter name to what decided), `guessed` (names of guesses), and the options that were
        given.

    Raises:
        GroupingError: if `model` is not a module, a pattern matches nothing, a Muon rule is on a
            parameter that is not a matrix, or a glob asks for heads that are not found; with
            `strict`, for a guess or if no parameter is on Muon.
        ConfigError: for an unknown option, rule or field of `MatrixSpec`, or a number out of range.
        LayoutError: for flattened weights, or matrices that do not fit their parameter.

    Examples:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Embedding(50, 8), nn.Linear(8, 8), nn.Linear(8, 50))
        >>> [(g["name"], g["rule"], g["param_names"]) for g in parameter_groups(model, lr=1e-3)]
        ... # doctest: +NORMALIZE_WHITESPACE
        [('hidden', 'muon', ['1.weight']), ('embedding', 'adamw', ['0.weight']),
         ('head', 'adamw', ['2.weight']), ('norm', 'adamw', ['1.bias', '2.bias'])]
    """
    _check_model(model)
    find_rule(rule)
    given = {"lr": lr, "weight_decay": weight_decay, "adamw_lr": adamw_lr}
    check_options_given({option: value for option, value in given.items() if value is not None})
    if adamw_lr is not None:
        check_at_least_0("adamw_lr", adamw_lr)
    check_given({"heads": heads, "convolutions": convolutions}, GroupingOptions)
    arguments: dict[str, Any] = {**given, "overrides": overrides, "rule": rule}
    arguments |= {"strict": strict, "heads": heads, "convolutions": convolutions}
    groups, doubts = _make_groups(model, arguments)
    for doubt in doubts:
        warnings.warn(doubt, stacklevel=_outside())
    return ParameterGroups(groups, GroupSource(weakref.ref(model), arguments))


def groups_again(model: nn.Module, arguments: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the groups of a model of which other parameters are trainable than before.

    `arguments` are those that `parameter_groups` has accepted; others have its defaults. An
    override whose parameters have all been frozen changes nothing, and guesses have been announced.
    """
    signature = inspect.signature(parameter_groups).parameters
    defaults = {name: row.default for name, row in signature.items() if name != "model"}
    return _make_groups(model, {**defaults, **arguments}, again=True)[0]


def _make_groups(
    model: nn.Module, arguments: Mapping[str, Any], *, again: bool = False
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the groups, and what a user should know about them."""
    rule, heads, convolutions = (arguments[key] for key in ("rule", "heads", "convolutions"))
    found = assign_roles(model)
    candidates = [
        _default(a, rule, heads, convolutions) for a in found if a.parameter.requires_grad
    ]
    if not candidates:
        raise GroupingError(
            f"none of the {len(found)} parameters of the model needs a gradient: set requires_grad of "
            "those to train"
        )
    frozen = [a for a in found if not a.parameter.requires_grad]
    _apply_overrides(candidates, _mapping(arguments["overrides"]), rule, frozen, again=again)
    doubts = _divide_by_heads(candidates, model) if RULES[rule].on_matrices else []
    for item in candidates:
        _check_item(item)
    doubts += _doubts(candidates, rule)
    if doubts and arguments["strict"]:
        raise GroupingError(doubts[0])
    common = {key: arguments[key] for key in ("lr", "weight_decay", "adamw_lr")}
    common = {option: value for option, value in common.items() if value is not None}
    return _grouped(candidates, common), doubts


def _outside() -> int:
    """Return the stacklevel, for a warning of the caller, of the first frame outside this package."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("muonscale."):
        level, frame = level + 1, frame.f_back
    return level


def _doubts(candidates: list[_GroupCandidate], rule: str) -> list[str]:
    """Return what a user should know about groups that may not be what was meant."""
    doubts = []
    if guesses := [item for item in candidates if item.guessed]:
        a, first = guesses[0].assignment, guesses[0]
        options = '"rule": "adamw"' if a.role == Role.UNKNOWN else '"matrices": {"splits": [...]}'
        if NOT_DIVIDED in a.why:
            options = '"heads": "whole"'
        elif "head could not" in a.why:
            options = '"role": "head"'
        number = (
            "1 parameter is a guess"
            if len(guesses) == 1
            else f"{len(guesses)} parameters are guesses"
        )
        doubts.append(
            f"{number} of {len(candidates)}: {a.name} {tuple(a.parameter.shape)}, on "
            f"{RULES[first.rule].title} ({a.why}){', and others' if len(guesses) > 1 else ''}. Say what "
            f'they are in overrides, such as {{"{a.name}": {{{options}}}}}; '
            "print(grouping_report(...)) lists them"
        )
    if RULES[rule].on_matrices and not any(RULES[item.rule].on_matrices for item in candidates):
        doubts.append(
            f"none of the {len(candidates)} trainable parameters is on {RULES[rule].title}: none is a "
            f'hidden matrix or a router. Name some in overrides, or ask for rule="{ADAMW.name}".'
        )
    return doubts


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        what = "generator of parameters" if isinstance(model, Iterator) else type(model).__name__
        raise GroupingError(
            f"model is a {what}: give the module itself, since its layers say what its parameters "
            "are for; groups of your own go to Muon, with a rule each"
        )


def _mapping(overrides: object) -> Overrides:
    """Return the overrides, checked to be a mapping of mappings."""
    if overrides is None:
        return {}
    if not isinstance(overrides, Mapping):
        raise ConfigError(
            f"overrides is {shown(overrides)}: give a mapping from a role or a glob to options, such "
            'as {"head": {"lr": 1e-3}}'
        )
    for pattern, options in overrides.items():
        if not isinstance(options, Mapping):
            hint = (
                f'; did you mean {{"rule": "{options}"}}?'
                if isinstance(options, str) and options in RULES
                else ""
            )
            raise ConfigError(
                f"override {pattern!r} is {shown(options)}: give a mapping of options{hint}"
            )
    return overrides


def _default(
    assignment: RoleAssignment, rule: str, heads: HeadsT, convolutions: ConvolutionsT
) -> _GroupCandidate:
    role = assignment.role
    item = _GroupCandidate(
        assignment,
        _rule_of(role, rule),
        on_adamw_lr=role not in MATRIX_ROLES,
        heads=heads,
        guessed=assignment.guessed,
    )
    if role == Role.CONVOLUTION:
        _set_convolution(item, convolutions, rule)
    return item


def _set_convolution(item: _GroupCandidate, convolutions: ConvolutionsT, rule: str) -> None:
    """Put a convolution on the rule of the hidden matrices or on AdamW."""
    a = item.assignment
    item.rule, item.on_adamw_lr = ADAMW.name, True
    if not RULES[convolutions].on_matrices:
        return
    if a.matrices is None or holds_vectors(a.parameter, a.matrices):
        item.assignment = replace(a, why=f"{a.why}; its kernels are vectors, so on {ADAMW.title}")
        return
    item.rule, item.on_adamw_lr = rule, False


def _rule_of(role: Role, rule: str) -> str:
    return rule if role in MATRIX_ROLES else ADAMW.name


def _apply_overrides(
    candidates: list[_GroupCandidate],
    overrides: Overrides,
    rule: str,
    frozen: list[RoleAssignment],
    *,
    again: bool,
) -> None:
    roles = {key: options for key, options in overrides.items() if key in set(Role)}
    globs = {key: options for key, options in overrides.items() if key not in roles}
    for pattern, options in {**roles, **globs}.items():
        _check_options(pattern, options)
        chosen = [item for item in candidates if _matches(pattern, item.assignment)]
        if not chosen and again:
            continue
        if not chosen:
            raise GroupingError(_nothing_matched(pattern, candidates, frozen))
        of_kernels = [item for item in chosen if item.assignment.role == Role.CONVOLUTION]
        if "convolutions" in options and not of_kernels:
            raise GroupingError(
                f"override {pattern!r} has convolutions={options['convolutions']!r} and matches no "
                f"convolution: {chosen[0].assignment.name} is {chosen[0].assignment.role}"
            )
        for item in chosen:
            _override(item, pattern, options, rule)
            if pattern not in roles:
                item.pattern = pattern


def _override(item: _GroupCandidate, pattern: str, options: Mapping[str, Any], rule: str) -> None:
    a = item.assignment
    ends_guess = bool(_GROUPING_OPTIONS & set(options))
    why = (
        f"override {pattern!r}" if item.guessed and ends_guess else f"{a.why}; override {pattern!r}"
    )
    changes: dict[str, Any] = {"why": why}
    if "role" in options:
        role = Role(options["role"])
        item.rule, item.on_adamw_lr = _rule_of(role, rule), role not in MATRIX_ROLES
        # A matrix called norm holds none any more; a convolution called hidden keeps its layout.
        changes |= {"role": role, "matrices": None if role == Role.NORM else a.matrices}
    if "matrices" in options:
        changes["matrices"] = _amended(a.matrices or PLAIN, options["matrices"], pattern)
    item.assignment = replace(a, **changes)
    item.guessed = item.guessed and not ends_guess
    if (heads := _heads_asked(options)) is not None:
        item.heads, item.heads_pattern = heads, "" if pattern in set(Role) else pattern
    if "convolutions" in options and item.assignment.role == Role.CONVOLUTION:
        _set_convolution(item, options["convolutions"], rule)
    if "rule" in options:
        item.rule, item.on_adamw_lr = options["rule"], not RULES[options["rule"]].on_matrices
    item.options |= {k: v for k, v in options.items() if k in option_names()}


def _heads_asked(options: Mapping[str, Any]) -> HeadsT | None:
    """Return the `heads` of an override; numbers of heads are part of the matrices, as they are."""
    given = options.get("matrices")
    if isinstance(given, MatrixSpec) or (isinstance(given, Mapping) and "heads" in given):
        found = None if isinstance(given, MatrixSpec) else given["heads"]
        return options.get("heads", "auto" if found == "auto" else "whole")
    return options.get("heads")


def _amended(found: MatrixSpec, given: object, pattern: str) -> MatrixSpec:
    """Return what an override says of the matrices: all of it, or fields that change `found`."""
    if isinstance(given, MatrixSpec):
        return given
    if not isinstance(given, Mapping):
        raise ConfigError(
            f"override {pattern!r}: matrices is {given!r}: a MatrixSpec or a mapping of its fields is "
            'accepted, such as {"heads": 8}'
        )
    if given.get("heads") == "auto":
        given = {name: value for name, value in given.items() if name != "heads"}
    try:
        return amend(found, given)
    except ConfigError as error:
        raise ConfigError(f"override {pattern!r}: {error}") from None


def _divide_by_heads(candidates: list[_GroupCandidate], model: nn.Module) -> list[str]:
    """Divide the projections of attention whose `heads` is "auto" into a matrix for each head.

    A projection whose heads are not found stays whole and is a guess. Returns a sentence for each
    request that divides nothing.
    """
    asked = [item for item in candidates if item.heads == "auto"]
    projections = attention_projections(model) if asked else {}
    doubts = list[str]()
    divided = set[str]()
    for item in asked:
        a, projection = item.assignment, projections.get(item.assignment.parameter)
        if projection is None or a.role != Role.HIDDEN or not RULES[item.rule].on_matrices:
            continue
        divided.add(item.heads_pattern)
        try:
            matrices = projection.by_head(tuple(a.parameter.shape), a.matrices or PLAIN)
        except HeadsNotFound as error:
            if item.heads_pattern:
                raise GroupingError(
                    f'override {item.heads_pattern!r} has heads="auto", and the heads of {a.name} were '
                    f'not found: {error}. Give their number, as in {{"matrices": {{"heads": 8}}}}, or '
                    'heads="whole"'
                ) from None
            item.assignment = replace(a, why=f"{a.why}; {NOT_DIVIDED}: {error}")
            item.guessed = True
            continue
        item.assignment = replace(a, matrices=matrices, why=f"{a.why}, by head")
    for pattern in {item.heads_pattern for item in asked} - divided:
        names = [item.assignment.name for item in asked if item.heads_pattern == pattern]
        text = (
            f'heads="auto" divides none of {len(names)} parameters (first: {names[0]}): none is a '
            "projection of an attention module that is known. Give the number of heads by name, as in "
            '{"matrices": {"heads": 8}}'
        )
        if pattern:
            raise GroupingError(f"override {pattern!r}: {text}")
        doubts.append(text)
    return doubts


def _matches(pattern: str, assignment: RoleAssignment) -> bool:
    """Return whether an override's key is a parameter's role, or a glob that matches its name."""
    if pattern in set(Role):
        return assignment.role == pattern
    return any(fnmatch.fnmatchcase(name, pattern) for name in assignment.aliases)


def _nothing_matched(
    pattern: str, candidates: list[_GroupCandidate], frozen: list[RoleAssignment]
) -> str:
    if frozen_names := [a.name for a in frozen if _matches(pattern, a)]:
        return (
            f"override {pattern!r} matches {frozen_names[0]} and no trainable parameter: what it matches "
            "is frozen (requires_grad is False)"
        )
    names = [item.assignment.name for item in candidates]
    roles = {str(item.assignment.role) for item in candidates}
    hint = nearest(pattern, {*names, *roles})
    if hint.startswith("accepted"):
        hint = f"the roles here are {', '.join(sorted(roles))}; a parameter is called {names[0]}"
    return f"override {pattern!r} matches no trainable parameter: {hint}"


def _check_options(pattern: str, options: Mapping[str, Any]) -> None:
    for option in options:
        if option not in option_names() | _GROUPING_OPTIONS:
            hint = nearest(option, option_names() | _GROUPING_OPTIONS)
            raise ConfigError(f"override {pattern!r} has no option {option!r}: {hint}")
    if "role" in options and options["role"] not in set(Role):
        raise ConfigError(f"override {pattern!r}: {nearest(str(options['role']), set(Role))}")
    if "rule" in options:
        find_rule(options["rule"], f"override {pattern!r}: rule")
    try:
        check_options_given(options)
        check_given(options, GroupingOptions)
    except ConfigError as error:
        raise ConfigError(f"override {pattern!r}: {error}") from None


def _check_item(item: _GroupCandidate) -> None:
    a = item.assignment
    if not RULES[item.rule].on_matrices:
        return
    if a.matrices is None:
        raise GroupingError(
            f"{a.name} has shape {tuple(a.parameter.shape)} and is no matrix ({a.why}): "
            f'{RULES[item.rule].title} is for matrices, use rule "{ADAMW.name}" for it'
        )
    try:
        matrix_shapes(a.parameter.shape, a.matrices)
    except LayoutError as error:
        raise LayoutError(f"{a.name}: {error}") from None


def _rates(item: _GroupCandidate, common: Mapping[str, Any]) -> dict[str, Any]:
    """Return the learning rate and decay that were given for a parameter's group."""
    lr = common.get("adamw_lr", common.get("lr")) if item.on_adamw_lr else common.get("lr")
    rates = {"lr": lr, "weight_decay": common.get("weight_decay")}
    return {option: value for option, value in rates.items() if value is not None}


def _grouped(candidates: list[_GroupCandidate], common: dict[str, Any]) -> list[dict[str, Any]]:
    groups: dict[tuple[str, ...], dict[str, Any]] = {}
    for item in sorted(candidates, key=lambda item: list(Role).index(item.assignment.role)):
        a = item.assignment
        name = f"{a.role}/{item.pattern}" if item.pattern else str(a.role)
        options = _rates(item, common) | item.options
        key = (name, item.rule, repr(sorted(options.items(), key=lambda pair: pair[0])))
        if key not in groups:
            taken = sum(group["name"].split("#")[0] == name for group in groups.values())
            groups[key] = {
                "name": f"{name}#{taken + 1}" if taken else name,
                "role": str(a.role),
                "rule": item.rule,
                "params": [],
                "param_names": [],
                **options,
                "matrices": {},
                "why": {},
                "guessed": [],
            }
        group = groups[key]
        group["params"].append(a.parameter)
        group["param_names"].append(a.name)
        group["why"][a.name] = a.why
        if item.guessed:
            group["guessed"].append(a.name)
        if a.matrices is not None:
            group["matrices"][a.name] = a.matrices
    return list(groups.values())
