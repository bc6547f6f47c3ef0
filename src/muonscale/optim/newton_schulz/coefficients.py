"""The polynomials of Newton-Schulz: one odd quintic per step, with its source.

A *triple* `(a, b, c)` is the polynomial `p(s) = a*s + b*s^3 + c*s^5`. The step
`X <- a*X + (b*A + c*A@A) @ X` with `A = X @ X.T` applies it to every singular value of `X`. A
*schedule* is a row of the table: triples, the normalization they were made for, and their source.
*Coefficients* are the triples of a given number of steps. If a schedule has fewer triples, its last
one is repeated; if it has more, its first ones are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any, Literal

from muonscale.errors import ConfigError, nearest
from muonscale.optim.newton_schulz.polar_express import apply_safety

Triple = tuple[float, float, float]
"""Coefficients `(a, b, c)` of one odd quintic."""

NormalizationT = Literal["frobenius", "schatten4", "aol"]
NORMALIZATIONS: tuple[NormalizationT, ...] = ("frobenius", "schatten4", "aol")
"""Normalizations that bring the singular values to at most 1, see `Coefficients`."""


@dataclass(frozen=True, kw_only=True)
class Coefficients:
    """The parameters of a Newton-Schulz iteration. Hashable."""

    triples: tuple[Triple, ...]
    """One triple per step, in order."""
    normalization: NormalizationT = "frobenius"
    """`frobenius` divides by the Frobenius norm, an upper bound of the spectral norm. `schatten4`
    divides by `sqrt(||X X^T||_F)`, a closer bound (Grishina et al., Accelerating Newton-Schulz
    Iteration for Orthogonalization via Chebyshev-type Polynomials, arXiv 2506.10935). `aol` divides
    row i by `sqrt(sum_j |X X^T|_ij)`. It is closer still, but changes the matrix and so its polar
    factor (Turbo-Muon, arXiv 2512.04632). Rows are along the shorter side."""
    margin: float = 1.0
    """Factor of the norm, at least 1, so that rounding does not carry singular values beyond 1."""
    restarts: tuple[int, ...] | None = None
    """Steps after which the Gram form restarts from `X`. None chooses them by the rounding of the
    dtype."""

    def __post_init__(self) -> None:
        _check_normalization(self.normalization)
        if not self.margin >= 1:
            raise ConfigError(f"margin is {self.margin}: it must be at least 1")
        if any(not step >= 1 for step in self.restarts or ()):
            raise ConfigError(
                f"restarts are {self.restarts}: each must be a number of steps, at least 1"
            )

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.triples)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A row of the table."""

    triples: tuple[Triple, ...]
    """One triple per step, in order. The last one may be repeated."""
    source: str
    """Author and title, and where the numbers were read."""
    normalization: NormalizationT = "frobenius"
    """See `Coefficients`."""
    margin: float = 1.0
    """See `Coefficients`."""
    least_steps: int = 1
    """Smallest number of steps. Triples that were tuned together need all steps; if each is optimal
    for the result of the one before, fewer are allowed."""


CoefficientsLike = str | Triple | Sequence[Sequence[float]] | Coefficients
"""A name, one triple for all steps, one triple per step, or `Coefficients`: see `resolve`."""


def to_plain(coefficients: CoefficientsLike) -> Any:
    """Return coefficients as strings, numbers and tuples, which `torch.load` accepts by default."""
    if isinstance(coefficients, Coefficients):
        return tuple(getattr(coefficients, field.name) for field in fields(Coefficients))
    return coefficients


def from_plain(value: Any) -> CoefficientsLike:
    """Return coefficients from the result of `to_plain`."""
    whole = isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 4
    if whole and isinstance(value[1], str):
        triples, normalization, margin, restarts = value
        return Coefficients(
            triples=tuple(tuple(triple) for triple in triples),
            normalization=normalization,
            margin=margin,
            restarts=None if restarts is None else tuple(restarts),
        )
    return value


_JORDAN: Triple = (3.4445, -4.7750, 2.0315)

_POLAR_EXPRESS: tuple[Triple, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)

_POLAR_EXPRESS_NANOCHAT: tuple[Triple, ...] = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)

SCHEDULES: dict[str, Schedule] = {
    "jordan": Schedule(
        triples=(_JORDAN,),
        source="Jordan et al., Muon: An optimizer for hidden layers in neural networks (2024), "
        "section 'Tuning the coefficients'; Liu et al., Muon is Scalable for LLM Training, "
        "arXiv 2502.16982, equation 2",
    ),
    "you5": Schedule(
        triples=(
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        source="You Jiacheng's five steps, as 'quintic' in NVIDIA Emerging-Optimizers, the default "
        "there and in Megatron-LM",
        least_steps=5,
    ),
    "you6": Schedule(
        triples=(
            (3955 / 1024, -8306 / 1024, 5008 / 1024),
            (3735 / 1024, -6681 / 1024, 3463 / 1024),
            (3799 / 1024, -6499 / 1024, 3211 / 1024),
            (4019 / 1024, -6385 / 1024, 2906 / 1024),
            (2677 / 1024, -3029 / 1024, 1162 / 1024),
            (2172 / 1024, -1833 / 1024, 682 / 1024),
        ),
        source="You Jiacheng's six steps in units of 1/1024, as 'Jiacheng' in the repository of "
        "Muon+ (arXiv 2602.21545)",
        least_steps=6,
    ),
    "polar_express": Schedule(
        triples=(*(apply_safety(t, 1.01) for t in _POLAR_EXPRESS[:-1]), _POLAR_EXPRESS[-1]),
        source="Amsel et al., The Polar Express, arXiv 2505.16932, the published table with the "
        "safety factor 1.01 on all rows but the last; X is divided by 1.01 ||X||_F",
        margin=1.01,
    ),
    "polar_express_nanochat": Schedule(
        triples=_POLAR_EXPRESS_NANOCHAT,
        source="Karpathy, nanochat; the same table in microsoft/dion (there with the margin 1.02): "
        "Polar Express with cushion 0.02 and safety 1.02 on all steps but the last",
        margin=1.01,
    ),
    "gram_ns": Schedule(
        triples=tuple(apply_safety(t, 1.05) for t in _POLAR_EXPRESS[:5]),
        source="Dao-AILab, Gram Newton-Schulz (2026): the first five steps of the published Polar "
        "Express table with safety 1.05 on all of them",
    ),
    "cans": Schedule(
        triples=(
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        source="Grishina et al., Accelerating Newton-Schulz Iteration for Orthogonalization via "
        "Chebyshev-type Polynomials, arXiv 2506.10935, as in NVIDIA Emerging-Optimizers",
    ),
    "aol": Schedule(
        triples=(
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        # The first polynomial has a zero at 0.884. This normalization leaves singular values
        # above it if rows are nearly orthogonal, and these come out near -1.
        source="Turbo-Muon, arXiv 2512.04632, as 'aol' in NVIDIA Emerging-Optimizers; an earlier "
        "set of flash-newton-schulz. It reverses singular values above 0.88: see 'aol_flash'",
        normalization="aol",
        least_steps=4,
    ),
    "aol_flash": Schedule(
        triples=(
            (4.6051, -9.6552, 5.6769),
            (4.7505, -6.0861, 2.1790),
            (2.7763, -2.3190, 0.5523),
            (2.4231, -2.2861, 0.8193),
        ),
        source="flash-newton-schulz, the current coefficients of the authors of Turbo-Muon "
        "(arXiv 2512.04632)",
        normalization="aol",
        least_steps=4,
    ),
    "cubic5": Schedule(
        triples=(
            (3.3656576, -3.3420992, 0.0),
            (2.5744352, -1.4957376, 0.0),
            (2.5368962, -1.4312570, 0.0),
            (2.4418906, -1.2764040, 0.0),
            (2.2230472, -0.9630650, 0.0),
        ),
        source="Relaxed cubic polynomials, arXiv 2606.00371, as in NVIDIA Emerging-Optimizers; "
        "c = 0 saves one product per step",
        least_steps=5,
    ),
    "deepseek_v4": Schedule(
        triples=(*(_JORDAN,) * 8, (2.0, -1.5, 0.5), (2.0, -1.5, 0.5)),
        source="DeepSeek-V4, hybrid Newton-Schulz of eight and two steps, as in NVIDIA "
        "Emerging-Optimizers",
        least_steps=10,
    ),
}


MOST_STEPS = 1000
"""Largest number of steps. Five to ten are usual, so more is taken to be a mistake."""


def resolve(coefficients: CoefficientsLike, steps: int) -> Coefficients:
    """Return the coefficients for a number of steps.

    Args:
        coefficients: the name of a row of `SCHEDULES`, optionally with another normalization after
            a plus sign ("you5+schatten4"); one triple; a sequence of triples; or `Coefficients`.
            Bare triples use the Frobenius norm. If the number of triples is not `steps`, they are
            cut, or the last one is repeated.
        steps: number of Newton-Schulz steps, 1 to 1000.

    Raises:
        ConfigError: if a name is unknown, a triple is not three numbers, or `steps` is out of range
            or below the `least_steps` of the row.

    Examples:
        >>> resolve("polar_express", 3).margin
        1.01
        >>> resolve("you5+schatten4", 5).normalization
        'schatten4'
        >>> resolve((2.0, -1.5, 0.5), 2).triples
        ((2.0, -1.5, 0.5), (2.0, -1.5, 0.5))
    """
    if not 1 <= steps <= MOST_STEPS:
        raise ConfigError(f"ns_steps is {steps}: it must be at least 1 and at most {MOST_STEPS:,}")
    whole = _parse(coefficients, steps)
    triples = whole.triples[:steps] + whole.triples[-1:] * (steps - len(whole.triples))
    return replace(whole, triples=triples)


def _parse(coefficients: CoefficientsLike, steps: int) -> Coefficients:
    if isinstance(coefficients, Coefficients):
        if not coefficients.triples:
            raise ConfigError(
                f"ns_coefficients has {len(coefficients.triples)} triples: at least one is needed"
            )
        return coefficients
    if isinstance(coefficients, str):
        return _look_up(coefficients, steps)
    if not isinstance(coefficients, Sequence) or len(coefficients) == 0:
        raise ConfigError(
            f"ns_coefficients is {coefficients!r}: give a name, a triple or a list of triples"
        )
    if len(coefficients) == 3 and all(isinstance(c, (int, float)) for c in coefficients):
        return Coefficients(triples=(_parse_triple(coefficients),))
    return Coefficients(triples=tuple(_parse_triple(triple) for triple in coefficients))


def _look_up(words: str, steps: int) -> Coefficients:
    name, plus, normalization = words.partition("+")
    if name not in SCHEDULES:
        hint = nearest(name, SCHEDULES)
        raise ConfigError(f"no Newton-Schulz coefficients are called {name!r}: {hint}")
    row = SCHEDULES[name]
    if steps < row.least_steps:
        raise ConfigError(
            f"ns_steps is {steps}, but the {row.least_steps} steps of {name!r} were tuned "
            f"together: set ns_steps to {row.least_steps} or more"
        )
    kind = _check_normalization(normalization) if plus else row.normalization
    return Coefficients(triples=row.triples, normalization=kind, margin=row.margin)


def _check_normalization(name: str) -> NormalizationT:
    for known in NORMALIZATIONS:
        if name == known:
            return known
    raise ConfigError(f"no normalization is called {name!r}: {nearest(name, NORMALIZATIONS)}")


def _parse_triple(numbers: object) -> Triple:
    listed = isinstance(numbers, Sequence) and not isinstance(numbers, str) and len(numbers) == 3
    if not listed or not all(isinstance(number, Real) for number in numbers):
        raise ConfigError(
            f"ns_coefficients has {numbers!r}: a triple (a, b, c) of numbers is needed"
        )
    a, b, c = (float(number) for number in numbers)
    return a, b, c
