"""A rule made up for tests: all that it takes to add one, in one place."""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.optim.options import OPTIONS_OF, RuleOptions
from muonscale.optim.rules.base import (
    RULES,
    Group,
    MatrixUpdate,
    Rows,
    Rule,
    StateTensor,
    register,
)
from muonscale.optim.rules.moments import average_, widened
from muonscale.optim.rules.post_norm import Reducer


@dataclass(frozen=True, kw_only=True)
class TiltOptions(RuleOptions):
    """Options of the Tilt rule."""

    title: ClassVar[str] = "Tilt"
    on_matrices: ClassVar[bool] = True
    tilt: float = 0.9
    """Decay rate of the averages."""


class TiltRule(Rule):
    """Two averages per element, and rows divided by a running length."""

    name = "tilt"
    options = TiltOptions
    scale_free = True
    elements_touched = 10

    def check(self, options: Group) -> None:
        if options["tilt"] == 0.123:
            raise ConfigError("tilt=0.123 is the one value that this rule refuses")

    def state(self, group: Group) -> tuple[StateTensor, ...]:
        return StateTensor("mean"), StateTensor("square"), StateTensor("row_length", per="row")

    def direction_(
        self, state: Mapping[str, list[Any]], G: list[Tensor], group: Group, mask: Tensor | None
    ) -> list[Tensor]:
        M, V = state["mean"], state["square"]
        wide_G = widened(G, M)
        average_(M, wide_G, group["tilt"], mask)
        average_(V, [g.square() for g in wide_G], group["tilt"], mask)
        return [m / (v.sqrt() + 1e-8) for m, v in zip(M, V, strict=True)]

    def matrix_update(self, group: Group) -> MatrixUpdate:
        return TiltUpdate(row_states=("row_length",), tilt=group["tilt"])


@dataclass(frozen=True, kw_only=True)
class TiltUpdate(MatrixUpdate):
    tilt: float

    def update(
        self, N_NMK: Tensor, rows: Rows, shape: tuple[int, int], reducer: Reducer
    ) -> tuple[Tensor, Rows]:
        length_NM1 = reducer.sum_cols(N_NMK.square())
        V_NM1 = rows["row_length"].lerp(length_NM1, 1 - self.tilt)
        return N_NMK / (V_NM1.sqrt() + 1e-8), {"row_length": V_NM1}

    def flops(
        self, shape: tuple[int, int], state_dtype: torch.dtype, device: torch.device | str
    ) -> int:
        return 4 * math.prod(shape)


@contextmanager
def tilt_rule() -> Generator[None]:
    """Register the rule for as long as the context lasts."""
    register(TiltRule())
    try:
        yield
    finally:
        del RULES["tilt"], OPTIONS_OF["tilt"]


def reference(
    W: Tensor, gradients: list[Tensor], lr: float, weight_decay: float, tilt: float
) -> Tensor:
    """Return one plain matrix after a step for each gradient, in float64 and without the library."""
    W = W.double()
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    L = W.new_zeros(W.shape[0], 1)
    for G in gradients:
        M = tilt * M + (1 - tilt) * G.double()
        V = tilt * V + (1 - tilt) * G.double() ** 2
        N = M / (V.sqrt() + 1e-8)
        L = tilt * L + (1 - tilt) * (N**2).sum(1, keepdim=True)
        W = (1 - lr * weight_decay) * W - lr * N / (L.sqrt() + 1e-8)
    return W
