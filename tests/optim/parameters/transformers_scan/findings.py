"""What the scan of modeling code finds."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Cut:
    """A piece taken of a layer's features."""

    cls: str
    attribute: str
    how: str
    line: int
    file: str
    part: bool = False
    """Whether what is cut is itself such a piece."""

    @property
    def key(self) -> tuple[str, str]:
        return self.cls, self.attribute


@dataclass(frozen=True)
class Use:
    """What happens to a bare parameter."""

    cls: str
    attribute: str
    kind: str
    """"lookup", "elementwise", "matrix_right" (x @ W), "matrix_left" (W @ x), "linear", "einsum",
    "kernel", "table", "function" (a nonlinear one) or "call" (of what is not followed)."""
    how: str
    line: int
    file: str

    @property
    def key(self) -> tuple[str, str]:
        return self.cls, self.attribute


@dataclass
class Findings:
    cuts: list[Cut] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    classes: int = 0
    linears: set[tuple[str, str]] = field(default_factory=set)
    parameters: dict[tuple[str, str], tuple[str, int, str]] = field(default_factory=dict)
    """Of bare parameters: file, line and text of their construction."""
    lineage: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """By class: its own name and those of its bases, as far as its file defines them."""
    places: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """By class: where modules of it stand, as (class, attribute)."""
    experts: set[str] = field(default_factory=set)
    """Classes with the flags of transformers' experts interface."""

    def cut_keys(self) -> dict[tuple[str, str], list[Cut]]:
        found: dict[tuple[str, str], list[Cut]] = {}
        for cut in self.cuts:
            found.setdefault(cut.key, []).append(cut)
        return found

    def use_keys(self) -> dict[tuple[str, str], list[Use]]:
        found: dict[tuple[str, str], list[Use]] = {}
        for use in self.uses:
            found.setdefault(use.key, []).append(use)
        return found
