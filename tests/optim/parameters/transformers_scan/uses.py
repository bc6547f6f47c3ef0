"""What the scan makes of a bare parameter, held against what the product does with it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from enum import StrEnum

from muonscale.optim.matrices.spec import MatrixSpec, matrix_shapes
from muonscale.optim.parameters.roles import Role
from tests.optim.parameters.transformers_scan.findings import Use

MATRIX_USES = {"linear", "matrix_right", "matrix_left", "einsum"}


class Seen(StrEnum):
    """What the code uses a parameter as."""

    MATRIX = "matrix"
    KERNEL = "kernel"
    TABLE = "table"
    ELEMENTWISE = "elementwise"
    NOT_SEEN = "not seen"


def seen(uses: list[Use]) -> Seen:
    """Return what all uses together say; a product outweighs the rest."""
    kinds = {use.kind for use in uses}
    rows = [use for use in uses if _of_rows(use)]
    if any(use.kind in MATRIX_USES and use not in rows for use in uses):
        return Seen.MATRIX
    if "kernel" in kinds:
        return Seen.KERNEL
    if kinds & {"lookup", "table", "call"} or rows:
        return Seen.TABLE
    return Seen.ELEMENTWISE if kinds else Seen.NOT_SEEN


def _of_rows(use: Use) -> bool:
    """Return whether rows were taken by index before the use; an expert of several is no row."""
    form = use.how.partition("] ")[0].lstrip("[")
    if use.kind in MATRIX_USES:
        return "looked up" in form and "viewed" in form
    return form.startswith("looked up")


@dataclass(frozen=True)
class Bare:
    """A bare parameter with two long axes, in a model that was built."""

    cls: str
    attribute: str
    shape: tuple[int, ...]
    role: Role
    rule: str
    matrices: MatrixSpec | None
    guessed: bool
    model: str
    name: str

    @property
    def key(self) -> tuple[str, str]:
        return self.cls, self.attribute


def fault(bare: Bare, uses: list[Use]) -> str:
    """Return what is wrong with the product's answer, "" if nothing."""
    kind = seen(uses)
    on_muon = bare.rule == "muon"
    if kind == Seen.MATRIX and not on_muon:
        return "" if bare.guessed or bare.role == Role.HEAD else "a matrix that is not on Muon"
    if kind == Seen.MATRIX:
        return _stored_wrongly(bare, uses)
    if kind == Seen.NOT_SEEN:
        return "on Muon, and no use is seen" if on_muon else ""
    return f"a {kind.value} parameter on Muon" if on_muon else ""


def _stored_wrongly(bare: Bare, uses: list[Use]) -> str:
    """Compare the number of inputs of the product's matrices with what the products sum over."""
    assert bare.matrices is not None
    inputs = {in_ for _, _, in_ in matrix_shapes(bare.shape, bare.matrices)}
    wanted = {n for use in uses if (n := _summed(use, bare.shape)) is not None}
    if not wanted or inputs == wanted:
        return ""
    return f"matrices of {sorted(inputs)} inputs, while the code sums over {sorted(wanted)}"


def _summed(use: Use, shape: tuple[int, ...]) -> int | None:
    """Return how many entries of the parameter one number of the product sums over."""
    form, _, text = use.how.partition("] ") if use.how.startswith("[") else ("", "", use.how)
    if any(word in form for word in ("viewed", "permuted", "sliced")):
        return None
    swapped = "swapped" in form
    if use.kind in ("linear", "matrix_left"):
        return shape[-2] if swapped else shape[-1]
    if use.kind == "matrix_right":
        return shape[-1] if swapped else shape[-2]
    if use.kind == "einsum" and (match := re.match(r"(\w+), sums over (\w+):", text)):
        letters, summed = match.groups()
        sizes = dict(zip(letters, shape[-len(letters) :], strict=False))
        return math.prod(sizes[letter] for letter in summed) if summed != "nothing" else None
    return None
