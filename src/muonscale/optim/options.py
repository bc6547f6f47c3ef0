"""The options of every rule, each written once: name, type, default, range and meaning.

These classes feed the constructor of `Muon`, parameter groups, their checks, the configuration of
runs, the model card, and the reference pages. They import no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin, get_type_hints

from muonscale.errors import ConfigError, nearest

Row = TypeVar("Row")
DecayT = Literal["coupled", "independent"]
MasterT = Literal["none", "float32", "stochastic"]
CommDTypeT = Literal["float32", "bfloat16"]
FormT = Literal["auto", "direct", "gram"]
KernelT = Literal["auto", "torch", "triton"]
SecondMomentT = Literal["gradient", "update"]
PreNormT = Literal["row", "col", "row_col", "aurora", "sign"]
ConstraintT = Literal["weight_norm", "radial_brake", "row_magnitude"]
PostNormT = Literal["row", "col", "row_col", "col_row", "normuon", "frobenius"]
HeadsT = Literal["whole", "auto"]
ConvolutionsT = Literal["adamw", "muon"]


def _option(default: Any, range: str) -> Any:
    return field(default=default, metadata={"range": range})


@dataclass(frozen=True, kw_only=True)
class RuleOptions:
    """Base of the options of a rule: what is known of the rule without importing torch."""

    title: ClassVar[str]
    """What people call the rule."""
    on_matrices: ClassVar[bool] = False
    """Whether it works on whole matrices, so that a parameter must hold some."""


@dataclass(frozen=True, kw_only=True)
class CommonOptions:
    """Options of every rule."""

    lr: float = _option(1e-3, "at least 0")
    """Learning rate."""
    weight_decay: float = _option(0.1, "at least 0")
    """Decoupled weight decay."""
    decay: DecayT = "coupled"
    """`coupled` subtracts lr * weight_decay of a weight per step; `independent` subtracts
    weight_decay times the multiplier of the schedule, which is lr over the lr that the group was
    added with."""
    cautious_decay: bool = False
    """Decay only where the update makes the weight smaller (Chen et al., Cautious Weight Decay,
    arXiv 2510.12402)."""


@dataclass(frozen=True, kw_only=True)
class NarrowOptions:
    """Options of every rule for parameters in 16 bits, which lose small steps to rounding."""

    master: MasterT = "none"
    """`float32` keeps and saves a float32 copy of such parameters, `stochastic` rounds to bfloat16
    at random without bias, `none` warns."""
    rounding_seed: int = 0
    """Seed of master="stochastic". A resumed run rounds as an uninterrupted one does."""


@dataclass(frozen=True, kw_only=True)
class MuonOptions(RuleOptions):
    """Options of the Muon rule."""

    title: ClassVar[str] = "Muon"
    on_matrices: ClassVar[bool] = True

    momentum: float = _option(0.95, "in [0, 1)")
    """Decay rate of the momentum, mu, in [0, 1)."""
    nesterov: bool = True
    """Orthogonalize the look-ahead direction `mu*M + (1-mu)*G` in place of M."""
    ns_coefficients: Any = "jordan"
    """Newton-Schulz polynomials: a name from muonscale.optim.newton_schulz.coefficients, a triple,
    or a list of triples."""
    ns_steps: int = _option(5, "at least 1")
    """Newton-Schulz iterations."""
    ns_form: FormT = "auto"
    """How the polynomial is evaluated; `auto` is the form with fewer operations for each shape."""
    ns_dtype: Any = "auto"
    """Dtype of the Newton-Schulz products; `auto` is bfloat16 where that is fast, else float32."""
    ns_kernel: KernelT = "auto"
    """Kernel of the symmetric products. `torch` is torch's, on a CPU by panels. `triton` computes half
    of each product, in bfloat16 or float16 on CUDA. `auto` is `torch` for now, because `triton`
    has not been measured on a GPU."""
    second_moment: SecondMomentT | None = None
    """`gradient` divides every element of the direction by the root of the running mean of the
    squared gradient, before the polar step (Muon2, arXiv 2604.09967); `update` divides every
    element of the polar factor by the root of its own running mean square, and keeps the length
    (AdaMuon, arXiv 2507.11005). Both keep one more value per element; on sharded parameters
    `update` sends it with the matrices.
    """
    second_moment_beta: float = _option(0.95, "in [0, 1)")
    """Decay rate of that mean."""
    second_moment_eps: float = _option(1e-10, "above 0")
    """Epsilon added to the root. Elements far below it are not divided."""
    pre_norm: PreNormT | None = None
    """What precedes the polar factor. `row` and `col` scale rows or columns of the direction to
    unit length, `row_col` divides by the lengths of both (Chang et al., MuonEq, arXiv 2603.28254);
    `aurora` balances the long side of a matrix by a polar step of its own, so that the rows of a
    tall update have equal lengths (Aurora, arXiv 2606.27715); `sign` takes the sign of every
    element (AdaMuon).
    """
    post_norm: PostNormT | None = None
    """What follows the polar factor. `row`, `col`, `row_col` (rows, then columns) and `col_row`
    scale rows or columns to unit length (Zhang et al., Muon+, arXiv 2602.21545); `normuon` divides
    rows by their running RMS (Li et al., NorMuon, arXiv 2510.05491); `frobenius` gives the update
    the length of an exact polar factor."""
    post_norm_eps: float = _option(1e-8, "above 0")
    """Epsilon inside the root of a sum of squares; `normuon` adds it to the root."""
    normuon_beta2: float = _option(0.95, "in [0, 1)")
    """Decay rate of the running mean square of `normuon`."""
    row_fraction: float = _option(1.0, "in (0, 1]")
    """The part of the rows of every matrix that a step orthogonalizes and updates: those with the
    largest sums of magnitudes in the direction. The momentum of the other rows does not decay
    (Dion2, arXiv 2512.16928). It keeps one value per row."""
    block_period: int = _option(1, "at least 1")
    """Orthogonalize whole matrices in every step of this number only, the first included. In the
    other steps every rank orthogonalizes what it holds of a sharded matrix, as a matrix of its own,
    and sends nothing (MuonBP, arXiv 2510.16981). The numbers then depend on the layout. 1 for whole
    matrices in every step."""
    scale: Any = "rms"
    """Shape factor: rms, rms_exact, spectral, keller, none, another project's name for one, a
    number for all shapes, or in Python a function of (out, in). `rms` allows for what post_norm
    ends with."""
    rms: float = _option(0.2, "above 0")
    """RMS of the update under scale="rms" and "rms_exact", in units of lr (Moonlight, section
    2.2)."""
    constraint: ConstraintT | None = None
    """What holds for the weight after the update. `weight_norm` keeps the Frobenius norm of every
    matrix (MuonH; Hyperball, arXiv 2606.16899): the update has the length lr times that norm, so lr
    is about an angle, `scale` and `rms` have no effect, and there is no weight decay.
    `radial_brake` lets the norm grow by only a part of what the update adds. `row_magnitude` trains
    every row as a direction, by Muon, and a magnitude, by Adam with the same lr, `betas` and `eps`
    (Muown, arXiv 2605.10797)."""
    outward_scale: float = _option(0.5, "in [0, 1)")
    """The part of a growing norm that `radial_brake` lets through."""
    comm_dtype: CommDTypeT = "float32"
    """Dtype to which directions and updates are rounded, on many ranks and on one; `bfloat16`
    halves the bytes in communication."""


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(RuleOptions):
    """Options of the AdamW rule."""

    title: ClassVar[str] = "AdamW"

    betas: tuple[float, float] = _option((0.9, 0.95), "two of [0, 1)")
    """Decay rates of both moments, each in [0, 1)."""
    eps: float = _option(1e-8, "above 0")
    """Epsilon added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class GroupingOptions:
    """Options of `parameter_groups`, which decide what is a matrix and what is on Muon."""

    heads: HeadsT = "whole"
    """Matrices of attention: `whole` takes each projection as one, `auto` takes the block of each
    head as a matrix of its own, in the projections to queries, keys and values, in the
    up-projections of multi-head latent attention and, by columns, in the output projection (Kimi
    K3, arXiv 2607.24653, section 2.5; GLM-5, arXiv 2602.15763, Muon Split).
    """
    convolutions: ConvolutionsT = "adamw"
    """Kernels of convolutions: `adamw`, or `muon`, which flattens each kernel to a matrix, one for
    each group, and puts it on the rule of the hidden matrices. Kernels that are vectors (depthwise
    convolutions) stay on AdamW.
    """


OPTIONS_OF: dict[str, type[RuleOptions]] = {"muon": MuonOptions, "adamw": AdamWOptions}
"""The options of each rule by its name; `muonscale.optim.rules.base.register` adds to it."""
COMMON = (CommonOptions, NarrowOptions)


def add_options(name: str, options: type[RuleOptions]) -> None:
    """Add the options of a rule to `OPTIONS_OF`.

    Raises:
        ConfigError: for an option without a default or a known range, or with the name of an option
            of another rule: groups keep the options of all rules in one dict.
    """
    others = [cls for rule, cls in OPTIONS_OF.items() if rule != name]
    taken = set(names_of(*COMMON, *others))
    for f in fields(options):
        problem = ""
        if f.name in taken:
            problem = "has the name of an option of another rule: give it a name of its own"
        elif f.default is MISSING:
            problem = "has no default"
        elif f.metadata.get("range", "above 0") not in RANGES:
            problem = (
                f"has the range {f.metadata['range']!r}: {nearest(f.metadata['range'], RANGES)}"
            )
        if problem:
            raise ConfigError(f"option {f.name} of the rule {name!r} {problem}")
    OPTIONS_OF[name] = options


def option_names() -> set[str]:
    """Return the names of the options of all rules."""
    return set(names_of(*COMMON, *OPTIONS_OF.values()))


def all_defaults() -> dict[str, Any]:
    """Return the options of all rules with their defaults."""
    return defaults_of(*COMMON, *OPTIONS_OF.values())


def check_options_given(given: Mapping[str, Any]) -> None:
    """Check the options of any rule among `given`, see `check_given`."""
    check_given(given, *COMMON, *OPTIONS_OF.values())


def check_schedulable(option: str) -> None:
    """Raise ConfigError for an option that no `OptionSchedule` can set.

    Those that it can set are the real numbers among the options of all rules, but the learning
    rate.
    """
    if option == "lr":
        raise ConfigError(f"{option}: learning rates have schedulers of their own")
    ranges = ("at least 0", "above 0", "in [0, 1)")
    classes = (*COMMON, *OPTIONS_OF.values())
    known = {f.name for cls in classes for f in fields(cls) if f.metadata.get("range") in ranges}
    if option not in known - {"lr"}:
        raise ConfigError(
            f"{option!r} is no option that can be scheduled; {nearest(option, known - {'lr'})}"
        )


def unused_options(rule: str | None) -> set[str]:
    """Return the options of rules on matrices that a run does not use where no parameter is on one.

    A run with a rule on matrices uses those of an elementwise rule too, for the rest.
    """
    if rule not in OPTIONS_OF or OPTIONS_OF[rule].on_matrices:
        return set()
    others = [cls for name, cls in OPTIONS_OF.items() if name != rule and cls.on_matrices]
    return set(names_of(*others)) - set(names_of(OPTIONS_OF[rule]))


def names_of(*options: type) -> tuple[str, ...]:
    """Return the names of the options of some classes, in order."""
    return tuple(f.name for cls in options for f in fields(cls))


def defaults_of(*options: type) -> dict[str, Any]:
    """Return the options of some classes with their defaults."""
    return {f.name: f.default for cls in options for f in fields(cls)}


def check_given(given: Mapping[str, Any], *options: type) -> None:
    """Check the options among `given` that belong to some classes.

    Raises:
        ConfigError: for a value that is no number where one is needed, is outside its range, is
            not among the accepted words, or is not true or false.
    """
    for cls in options:
        for name, check in _checks_of(cls):
            if name in given:
                check(name, given[name])


@functools.cache
def _checks_of(options: type) -> tuple[tuple[str, Callable[[str, Any], None]], ...]:
    """Return (name, check) of each option of a class that has a range, words, or two values."""
    hints = get_type_hints(options)
    checks: list[tuple[str, Callable[[str, Any], None]]] = []
    for f in fields(options):
        if "range" in f.metadata:
            checks.append((f.name, RANGES[f.metadata["range"]]))
        elif get_origin(hints[f.name]) is Literal:
            checks.append((f.name, functools.partial(check_word, accepted=get_args(hints[f.name]))))
        elif hints[f.name] is bool:
            checks.append((f.name, _check_bool))
    return tuple(checks)


def _check_bool(option: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{option} is {value!r}: give True or False")


def check_word(option: str, word: object, accepted: Sequence[str]) -> None:
    """Raise ConfigError for a word that is not accepted."""
    if word not in accepted:
        raise ConfigError(f"{option} is {word!r}: {nearest(str(word), accepted)}")


def row_of(option: str, name: str | None, rows: Mapping[str, Row]) -> Row | None:
    """Return the row that an option names, None for None.

    Raises:
        ConfigError: for an unknown name.
    """
    if name is None:
        return None
    check_word(option, name, tuple(rows))
    return rows[name]


def check_at_least_0(option: str, value: object) -> None:
    """Raise ConfigError for what is not a number from 0 on."""
    if not _number(option, value) >= 0:
        raise ConfigError(f"{option} is {value}: it cannot be below 0; give 0 or a number above it")


def _check_above_0(option: str, value: object) -> None:
    if not _number(option, value) > 0:
        raise ConfigError(f"{option} is {value}: it must be above 0")


def _check_at_least_1(option: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{option} is {value!r}: give a whole number from 1 on")


def _check_fraction(option: str, value: object) -> None:
    if not 0 <= _number(option, value) < 1:
        raise ConfigError(f"{option} is {value}: 0 <= x < 1 is accepted")


def _check_two_fractions(option: str, value: object) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != 2:
        raise ConfigError(f"{option} is {value!r}: give two numbers, such as (0.9, 0.95)")
    for one in value:
        _check_fraction(option, one)


def _check_part(option: str, value: object) -> None:
    if not 0 < _number(option, value) <= 1:
        raise ConfigError(f"{option} is {value}: 0 < x <= 1 is accepted")


FLOAT32_END = 3.4e38
"""Steps are computed in float32, which has no larger number."""

RANGES: dict[str, Callable[[str, object], None]] = {
    "at least 0": check_at_least_0,
    "above 0": _check_above_0,
    "at least 1": _check_at_least_1,
    "in [0, 1)": _check_fraction,
    "in (0, 1]": _check_part,
    "two of [0, 1)": _check_two_fractions,
}
"""The ranges of options that are numbers."""


def _number(option: str, value: object) -> float:
    """Return a finite number as float; one that torch keeps in a tensor of one element too."""
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    numel = getattr(value, "numel", None)
    if not (is_number or (callable(numel) and numel() == 1)):
        raise ConfigError(f"{option} is {value!r}: give a number")
    try:
        number = float(value)  # type: ignore[arg-type]
    except OverflowError:
        number = math.inf
    if not abs(number) < FLOAT32_END:
        raise ConfigError(f"{option} is {number}: give a finite number, of a size that float32 has")
    return number
