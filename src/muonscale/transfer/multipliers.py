"""Multipliers of init, learning rate, decay and eps of one matrix, as functions of its shape.

They are relative to a base shape, at which every multiplier is exactly 1. Letters: out and in of a
logical matrix; r_out = out/base_out and r_in = in/base_in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from muonscale.errors import ConfigError, nearest
from muonscale.optim.options import DecayT, check_options_given
from muonscale.optim.parameters.roles import Role
from muonscale.optim.rules import MUON
from muonscale.optim.rules.base import find_rule
from muonscale.optim.rules.constraint import resolve_constraint
from muonscale.optim.rules.post_norm import resolve_post_norm
from muonscale.optim.rules.scale import ScaleLike, check_scale, shape_factor
from muonscale.transfer.options import CONVENTIONS, ConventionT

MatrixShape = tuple[int, int]
"""(out, in) of a logical matrix."""

_DIGITS = 12
"""Digits that multipliers are rounded to, so that sqrt(2)/sqrt(2) is 1 and equal ones are equal."""


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """Factors of a parameter's hyper-parameters, relative to the base shape."""

    init: float = 1.0
    """Factor of the initial weight."""
    shift: float = 0.0
    """Added to the initial weight after that. It is 0 unless a gain is stored as its difference
    from 1."""
    lr: float = 1.0
    weight_decay: float | None = 1.0
    """None if no decay corresponds to that at the base shape; there must not be any then."""
    eps: float = 1.0
    """Factor of the eps of AdamW."""


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """The options of a parameter group that multipliers depend on."""

    rule: str = MUON.name
    scale: ScaleLike = "rms"
    rms: float = 0.2
    post_norm: str | None = None
    constraint: str | None = None
    decay: DecayT = "coupled"

    def __post_init__(self) -> None:
        find_rule(self.rule)
        check_scale(self.scale)
        resolve_post_norm(self.post_norm)
        resolve_constraint(self.constraint)
        check_options_given({"decay": self.decay})

    @property
    def on_matrices(self) -> bool:
        """Whether the rule updates whole matrices."""
        return find_rule(self.rule).on_matrices

    @classmethod
    def of(cls, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> UpdateRule:
        """Return the options of a parameter group; those that it does not set are in `defaults`."""
        names = ("rule", "scale", "rms", "post_norm", "constraint", "decay")
        given = {**defaults, **group}
        return cls(**{name: given[name] for name in names if name in given})

    def update_rms(self, shape: MatrixShape) -> float:
        """Return the root mean square of a Muon update of a full-rank matrix, in units of lr.

        It is `rms` at scale="rms" and "rms_exact". Otherwise it is the shape factor times the RMS
        of a polar factor, `1/sqrt(max(out, in))` (Liu et al., arXiv 2502.16982, lemma 1). If the
        post-normalization ends with rows it is `1/sqrt(in)` instead, and with columns
        `1/sqrt(out)`.

        Raises:
            ConfigError: if the shape factor is not above 0.
        """
        factor = shape_factor(self.scale, shape, self.rms)
        if not factor > 0:
            raise ConfigError(f"the shape factor of {shape} is {factor}: it must be above 0")
        if self.scale in ("rms", "rms_exact"):
            return self.rms
        post_norm = resolve_post_norm(self.post_norm)
        last = post_norm.last if post_norm else None
        return factor / math.sqrt({None: max(shape), "row": shape[1], "col": shape[0]}[last])

    def rms_ratio(self, base: MatrixShape, shape: MatrixShape, init: float) -> float:
        """Return the RMS of an update at the base shape, divided by that at `shape`.

        A constraint that keeps the norm of the weight makes the update proportional to the weight,
        whose RMS is `init` times that at the base shape.
        """
        constraint = resolve_constraint(self.constraint)
        if constraint is not None and constraint.keeps_norm:
            return 1 / init
        return self.update_rms(base) / self.update_rms(shape)


def multipliers(
    role: Role,
    shape: MatrixShape,
    base: MatrixShape,
    rule: UpdateRule,
    convention: ConventionT = "spectral",
) -> Multipliers:
    """Return the multipliers of a parameter of a model without width factors in its forward pass.

    For a matrix (hidden, head, router, convolution), let `R` be the RMS of its Muon update in units
    of lr, with the shape factor (`UpdateRule`), and `N = R*sqrt(max(out, in))` its spectral norm,
    because its singular values are about equal:

    |           | spectral                              | adam_table                   |
    |-----------|---------------------------------------|------------------------------|
    | init      | `min(1, sqrt(r_out/r_in))/sqrt(r_in)` | the same                     |
    | lr, muon  | `sqrt(r_out/r_in) * N(base)/N(shape)` | `1/r_in * R(base)/R(shape)`  |
    | lr, adamw | `1/r_in`                              | `1/r_in`                     |
    | decay     | `lr*wd` is constant                   | `wd` is constant             |
    | eps       | `1/r_out`                             | 1                            |

    An embedding and a vector (a gain, a bias) have r_in = 1. Their init is 1. Their lr is 1 under
    AdamW, and under Muon it keeps the RMS of the update constant. `lr*wd` is constant. For eps,
    r_out is the growth of a row or of the vector. "standard" is 1 everywhere.

    Reasons:

    * spectral: ||W||_2 and ||dW||_2 stay proportional to sqrt(out/in). Activations and their
      changes then neither grow nor vanish with the width. The entries of an AdamW update are about
      lr and agree in sign, so its norm grows as `sqrt(out*in)`. The growth of N is divided out: lr
      is constant at scale="spectral", 1/sqrt(m) at "rms" for a square matrix m times as wide, and
      sqrt(r_out/r_in) at "none".
    * adam_table: Muon uses 1/fan_in, the rule for AdamW. The growth of R is divided out: lr is
      1/r_in at scale="rms", as in the paper, and no factor is applied twice.
    * decay: with updates of length `lr*u` and a decay of `lr*wd` per step, weights reach a length
      proportional to `u/wd` (times `lr*wd` for updates that do not agree). A constant `lr*wd`
      preserves the spectral condition and the time scale of `1/(lr*wd)` steps. The paper of the
      table multiplies `lr*wd` and keeps `wd`. With decay="independent" the learning rate is no
      factor of the decay, and only `wd` changes.
    * eps: it follows the gradient, which falls as 1/out of the activations it belongs to.

    Args:
        role: role of the parameter.
        shape: (out, in) of the logical matrix; (rows, length of a row) of an embedding, as stored;
            (length, 1) of a vector.
        base: the same at the base width.
        rule: options of its update.
        convention: see the table.

    Raises:
        ConfigError: if the convention is unknown, a side is 0, or the number of rows of an
            embedding changes.

    References:
        Yang et al., A Spectral Condition for Feature Learning, arXiv 2310.17813, condition 1
        (spectral). Yang et al., Tensor Programs V, arXiv 2203.03466, table 3 (init, and lr under
        AdamW). Practical Efficiency of Muon for Pretraining, arXiv 2505.02222, section 3.4 and
        table 5 (adam_table; its weight a(n)*w is W here). Dey et al., CompleteP, arXiv 2505.01618,
        table 1 (decay and eps of hidden matrices; other eps follow in the same way).

    Examples:
        >>> multipliers(Role.HIDDEN, (1024, 1024), (256, 256), UpdateRule(scale="rms"))
        Multipliers(init=0.5, shift=0.0, lr=0.5, weight_decay=2.0, eps=1.0)
    """
    check_convention(convention)
    if min(*shape, *base) < 1:
        raise ConfigError(
            f"the sides of a matrix must be at least 1: the shape is {shape}, and {base} at the "
            "base width"
        )
    if convention == "standard":
        return Multipliers()
    if role in (Role.EMBEDDING, Role.NORM):
        return _scale_vectors(role, shape, base, rule, convention)
    return _scale_matrix(shape, base, rule, convention)


def check_convention(convention: object) -> None:
    """Raise ConfigError for an unknown convention."""
    if convention not in CONVENTIONS:
        hint = nearest(convention, CONVENTIONS)
        raise ConfigError(f"no transfer convention is called {convention!r}: {hint}")


def _scale_matrix(
    shape: MatrixShape, base: MatrixShape, rule: UpdateRule, convention: ConventionT
) -> Multipliers:
    r_out, r_in = shape[0] / base[0], shape[1] / base[1]
    aspect = math.sqrt(r_out / r_in)
    init = min(1.0, aspect) / math.sqrt(r_in)
    if not rule.on_matrices:
        lr = 1 / r_in
    elif convention == "spectral":
        lr = aspect * rule.rms_ratio(base, shape, init) * math.sqrt(max(base) / max(shape))
    else:
        lr = rule.rms_ratio(base, shape, init) / r_in
    decayed = 1.0 if convention == "spectral" else 1 / r_in
    return _complete(init, lr, decayed, r_out, rule, convention)


def _scale_vectors(
    role: Role, shape: MatrixShape, base: MatrixShape, rule: UpdateRule, convention: ConventionT
) -> Multipliers:
    """Return the multipliers of an embedding, a gain or a bias."""
    if role == Role.EMBEDDING and shape[0] != base[0]:
        raise ConfigError(
            f"an embedding has {shape[0]} rows, but {base[0]} at the base width: vocabulary and "
            "number of positions must be the same"
        )
    growth = shape[1] / base[1] if role == Role.EMBEDDING else shape[0] / base[0]
    lr = rule.rms_ratio(base, shape, 1.0) if rule.on_matrices else 1.0
    return _complete(1.0, lr, 1.0, growth, rule, convention)


def _complete(
    init: float,
    lr: float,
    decayed: float,
    r_out: float,
    rule: UpdateRule,
    convention: ConventionT,
) -> Multipliers:
    """Return all multipliers. `decayed` is that of the part of a weight that decay subtracts."""
    eps = 1 / r_out if not rule.on_matrices and convention == "spectral" else 1.0
    weight_decay = decayed / lr if rule.decay == "coupled" else decayed
    return round_multipliers(Multipliers(init=init, lr=lr, weight_decay=weight_decay, eps=eps))


def fold_in(found: Multipliers, factor: float, rule: UpdateRule, *, offset: bool) -> Multipliers:
    """Return the multipliers of `W' = factor*W`, which replaces `factor*W` in the forward pass.

    Training W' with them equals training W with `found` and the factor in the forward pass. init
    and lr are multiplied by the factor. The gradient of W' is that of W divided by the factor, so
    eps is divided by it; a Muon update does not change. Decay subtracts the same part of W' as of
    W: weight_decay is divided by the factor if decay is coupled, and constant if it is independent.

    Args:
        found: multipliers of W.
        factor: factor above 0.
        rule: options of the update.
        offset: whether the parameter is the w of a gain 1 + w, so that 1 + w' = factor*(1 + w).
            Decay would pull the gain to 1 and not to `factor`, so weight_decay becomes None.
    """
    if factor == 1:
        return found
    changed = replace(found, init=found.init * factor, lr=found.lr * factor)
    if not rule.on_matrices:
        changed = replace(changed, eps=changed.eps / factor)
    if offset:
        shift = (1 + found.shift) * factor - 1
        return round_multipliers(replace(changed, shift=shift, weight_decay=None))
    if found.weight_decay is not None and rule.decay == "coupled":
        changed = replace(changed, weight_decay=found.weight_decay / factor)
    return round_multipliers(changed)


def round_multipliers(found: Multipliers) -> Multipliers:
    """Return the multipliers without the rounding errors of roots and quotients."""
    decay = found.weight_decay
    return Multipliers(
        init=_round(found.init),
        shift=_round(found.shift),
        lr=_round(found.lr),
        weight_decay=None if decay is None else _round(decay),
        eps=_round(found.eps),
    )


def _round(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")
