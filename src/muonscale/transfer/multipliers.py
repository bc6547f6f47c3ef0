"""How init, learning rate, decay and eps of one matrix change with its shape: functions of numbers.

Everything is relative to a base shape, at which every multiplier is exactly 1. Letters: out and in of
a logical matrix; r_out = out/base_out and r_in = in/base_in, 1 for a side that does not grow.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from muonscale.errors import ConfigError, nearest
from muonscale.optim.options import DecayT, check_options_given
from muonscale.optim.parameters.roles import Role
from muonscale.optim.rules import MUON
from muonscale.optim.rules.base import find_rule
from muonscale.optim.rules.post_norm import resolve_post_norm
from muonscale.optim.rules.scale import ScaleLike, check_scale, shape_factor

ConventionT = Literal["spectral", "adam_table", "standard"]
CONVENTIONS: tuple[ConventionT, ...] = ("spectral", "adam_table", "standard")
MatrixShape = tuple[int, int]
"""(out, in) of a logical matrix."""

_DIGITS = 12  # of a multiplier: sqrt(2)/sqrt(2) is to be 1, and equal ones are to be one group


@dataclass(frozen=True, kw_only=True)
class Multipliers:
    """What a parameter's hyper-parameters are multiplied by, relative to the base shape."""

    init: float = 1.0
    """Of the freshly drawn weight."""
    shift: float = 0.0
    """Added to the weight after that; other than 0 only where a gain is stored as its difference
    from 1."""
    lr: float = 1.0
    weight_decay: float | None = 1.0
    """None where no decay can do what it does at the base shape, so that there must not be any."""
    eps: float = 1.0
    """Of the AdamW rule."""

    @property
    def change_the_update(self) -> bool:
        """Whether anything but the initial weight differs from the base shape."""
        return (self.lr, self.weight_decay, self.eps) != (1.0, 1.0, 1.0)


@dataclass(frozen=True, kw_only=True)
class UpdateRule:
    """What has to be known of the rule that updates a parameter: options of its group."""

    rule: str = MUON.name
    scale: ScaleLike = "rms"
    rms: float = 0.2
    post_norm: str | None = None
    decay: DecayT = "coupled"

    def __post_init__(self) -> None:
        find_rule(self.rule)
        check_scale(self.scale)
        resolve_post_norm(self.post_norm)
        check_options_given({"decay": self.decay})

    @property
    def on_matrices(self) -> bool:
        """Whether it updates whole matrices."""
        return find_rule(self.rule).on_matrices

    @classmethod
    def of(cls, group: Mapping[str, Any], defaults: Mapping[str, Any]) -> UpdateRule:
        """Return the rule of a parameter group; what the group does not say is in `defaults`."""
        names = ("rule", "scale", "rms", "post_norm", "decay")
        given = {**defaults, **group}
        return cls(**{name: given[name] for name in names if name in given})

    def update_rms(self, shape: MatrixShape) -> float:
        """Return the root mean square of a Muon update of a full-rank matrix, in units of lr.

        The shape factor times `1/sqrt(max(out, in))`, the RMS of a polar factor (Liu et al.,
        arXiv 2502.16982, lemma 1), `1/sqrt(in)` after rows of unit length, `1/sqrt(out)` after
        columns; `rms` itself at scale="rms" and "rms_exact".

        Raises:
            ConfigError: for a shape factor that is not above 0.
        """
        factor = shape_factor(self.scale, shape, self.rms)
        if not factor > 0:
            raise ConfigError(f"the shape factor of {shape} is {factor}: it must be above 0")
        if self.scale in ("rms", "rms_exact"):
            return self.rms
        post_norm = resolve_post_norm(self.post_norm)
        last = post_norm.last if post_norm else None
        return factor / math.sqrt({None: max(shape), "row": shape[1], "col": shape[0]}[last])

    def update_norm(self, shape: MatrixShape) -> float:
        """Return the spectral norm of such an update, in units of lr.

        Its singular values are about equal, so that it is RMS * sqrt(max(out, in)).
        """
        return self.update_rms(shape) * math.sqrt(max(shape))


def multipliers(
    role: Role,
    shape: MatrixShape,
    base: MatrixShape,
    rule: UpdateRule,
    convention: ConventionT = "spectral",
) -> Multipliers:
    """Return the multipliers of a parameter, whose model's forward pass holds no factor of the width.

    A matrix (hidden, head, router, convolution), with `N` the spectral norm and `R` the RMS of its
    Muon update in units of lr (`UpdateRule`), whatever the shape factor is:

    |              | spectral                            | adam_table                 |
    |--------------|-------------------------------------|----------------------------|
    | init         | min(1, sqrt(r_out/r_in))/sqrt(r_in) | the same                   |
    | lr, muon     | sqrt(r_out/r_in) * N(base)/N(shape) | 1/r_in * R(base)/R(shape)  |
    | lr, adamw    | 1/r_in                              | 1/r_in                     |
    | decay        | lr*wd stays                         | wd stays: lr*wd by 1/r_in  |
    | eps          | 1/r_out                             | 1                          |

    An embedding and a vector (a gain, a bias) have r_in = 1: init 1, lr 1 under AdamW, the RMS of
    the update constant under Muon; lr*wd stays; eps as above, r_out being the growth of a row or of
    the vector. "standard" is 1 everywhere.

    What is behind the columns:

    * spectral: weights and updates keep ||W||_2 and ||dW||_2 proportional to sqrt(out/in), so that
      activations and their changes neither grow nor vanish with the width. An AdamW update has
      entries of about lr that agree in sign, so its norm grows as sqrt(out*in). The growth of N is
      divided out: at scale="spectral" lr is constant, at "rms" it is 1/sqrt(m) for a square m
      times as wide, at "none" sqrt(r_out/r_in).
    * adam_table: what AdamW needs, 1/fan_in, used for Muon too. The growth of R is divided out, so
      that at scale="rms" (as in the paper) lr is 1/r_in, and no factor is applied twice.
    * decay: where updates of length lr*u meet a decay of lr*wd per step, weights settle at a length
      in proportion to u/wd (times lr*wd, for updates that do not agree). With lr*wd constant that
      keeps to the spectral condition, and the memory 1/(lr*wd), in steps, stays too. The table's
      paper multiplies lr*wd and leaves wd as it is. With decay="independent" the learning rate is
      no factor of the decay, so wd takes the change alone.
    * eps: has to follow the gradient, which falls as 1/out of the activations it belongs to.

    Args:
        role: what the parameter is.
        shape: (out, in) of the logical matrix; of an embedding as stored, (rows, length of a row);
            of a vector (length, 1).
        base: the same at the base width.
        rule: how it is updated.
        convention: see the table.

    Raises:
        ConfigError: for an unknown convention, an empty shape, or an embedding whose rows change
            in number.

    References:
        Yang et al., A Spectral Condition for Feature Learning, arXiv 2310.17813, condition 1
        (spectral). Yang et al., Tensor Programs V, arXiv 2203.03466, table 3 (init, and lr under
        AdamW). Practical Efficiency of Muon for Pretraining, arXiv 2505.02222, section 3.4 and
        table 5 (adam_table; a weight there is a(n)*w, whose product is meant here). Dey et al.,
        CompleteP, arXiv 2505.01618, table 1 (decay and eps of hidden matrices; eps of all else
        counts its gradients in the same way).

    Example:
        >>> multipliers(Role.HIDDEN, (1024, 1024), (256, 256), UpdateRule(scale="rms"))
        Multipliers(init=0.5, shift=0.0, lr=0.5, weight_decay=2.0, eps=1.0)
    """
    check_convention(convention)
    if min(*shape, *base) < 1:
        raise ConfigError(
            f"no side of a matrix may be 0 to scale it: {shape}, base {base}"
            "; each must be at least 1"
        )
    if convention == "standard":
        return Multipliers()
    if role in (Role.EMBEDDING, Role.NORM):
        return _vectors(role, shape, base, rule, convention)
    return _matrix(shape, base, rule, convention)


def check_convention(convention: object) -> None:
    """Raise ConfigError for an unknown convention."""
    if convention not in CONVENTIONS:
        hint = nearest(convention, CONVENTIONS)
        raise ConfigError(f"no convention of transfer is called {convention!r}: {hint}")


def _matrix(
    shape: MatrixShape, base: MatrixShape, rule: UpdateRule, convention: ConventionT
) -> Multipliers:
    r_out, r_in = shape[0] / base[0], shape[1] / base[1]
    aspect = math.sqrt(r_out / r_in)
    init = min(1.0, aspect) / math.sqrt(r_in)
    if not rule.on_matrices:
        lr = 1 / r_in
    elif convention == "spectral":
        lr = aspect * (rule.update_norm(base) / rule.update_norm(shape))
    else:
        lr = rule.update_rms(base) / rule.update_rms(shape) / r_in
    decayed = 1.0 if convention == "spectral" else 1 / r_in
    return _settled(init, lr, decayed, r_out, rule, convention)


def _vectors(
    role: Role, shape: MatrixShape, base: MatrixShape, rule: UpdateRule, convention: ConventionT
) -> Multipliers:
    """Return those of an embedding, whose input is one of its rows, or of a gain or bias."""
    if role == Role.EMBEDDING and shape[0] != base[0]:
        raise ConfigError(
            f"an embedding has {shape[0]} rows and {base[0]} at the base width: the vocabulary and "
            "the number of positions have to be the same"
        )
    growth = shape[1] / base[1] if role == Role.EMBEDDING else shape[0] / base[0]
    lr = rule.update_rms(base) / rule.update_rms(shape) if rule.on_matrices else 1.0
    return _settled(1.0, lr, 1.0, growth, rule, convention)


def _settled(
    init: float,
    lr: float,
    decayed: float,
    r_out: float,
    rule: UpdateRule,
    convention: ConventionT,
) -> Multipliers:
    """Return the multipliers, from what the part of a weight that a step takes away is to be."""
    eps = 1 / r_out if not rule.on_matrices and convention == "spectral" else 1.0
    weight_decay = decayed / lr if rule.decay == "coupled" else decayed
    return round_multipliers(Multipliers(init=init, lr=lr, weight_decay=weight_decay, eps=eps))


def fold_in(found: Multipliers, factor: float, rule: UpdateRule, *, offset: bool) -> Multipliers:
    """Return the multipliers of W' = factor*W, which stands for `factor` times W in the forward pass.

    Training W' with them is training W with `found` and the factor in the forward pass: init and lr
    take the factor. The gradient of W' is 1/factor that of W, so eps takes 1/factor (and a Muon
    update does not change). A step takes the same part of W' away as of W, so weight_decay takes
    1/factor under coupled decay and stays under independent decay.

    Args:
        found: of W.
        factor: above 0.
        rule: how it is updated.
        offset: the parameter is w, and 1 + w is what is multiplied: 1 + w' = factor*(1 + w). Decay
            would pull it to 1 and not to `factor`, so it has none.
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
    """Return the multipliers without the rounding error of the roots and quotients they came from."""
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
