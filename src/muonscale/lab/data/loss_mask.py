"""Bits of a token in a row that say whether it is a target and begins a conversation.

A row is int64. The low 32 bits are the token id, and two higher bits are flags. Rows of plain text
have no flags. Rows with flags are called marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_TARGET = 1 << 32
"""The token is an input only."""
BEGIN = 1 << 33
"""A conversation begins with this token; attention does not reach back beyond it."""
IDS = (1 << 32) - 1
"""The bits of the token id."""

IGNORED = -100
"""A target that `cross_entropy` leaves out."""


@dataclass(frozen=True)
class TokenBatch:
    """Marked rows `[B, L + 1]` as inputs and targets of a model."""

    inputs_BL: Tensor
    """Token ids, int64."""
    targets_BL: Tensor
    """Token ids, int64; `IGNORED` where there is no target."""
    positions_BL: Tensor
    """Positions of the inputs in their conversations, from 0, int64."""


def unpack(rows_BL: Tensor) -> TokenBatch:
    """Return inputs, targets and positions of marked rows, int64 `[B, L + 1]`."""
    ids_BL = rows_BL & IDS
    targets_BL = ids_BL[:, 1:].masked_fill((rows_BL[:, 1:] & NO_TARGET) != 0, IGNORED)
    return TokenBatch(ids_BL[:, :-1], targets_BL, count_from((rows_BL[:, :-1] & BEGIN) != 0))


def count_from(begins_BL: Tensor) -> Tensor:
    """Return positions that start again at 0 where a row begins and where it is true, int64."""
    at_L = torch.arange(begins_BL.shape[1], device=begins_BL.device)
    return at_L - torch.where(begins_BL, at_L, 0).cummax(dim=1).values


def is_marked(rows: NDArray[np.int64]) -> bool:
    """Return whether rows have flags."""
    return bool(rows.size) and int(rows.max()) > IDS


def targets_of_rows(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return how many tokens of each row are predicted, int64 `[B]`; rows `[B, L + 1]`."""
    return np.count_nonzero((rows[:, 1:] & NO_TARGET) == 0, axis=1)


def count_targets(rows: NDArray[np.int64]) -> int:
    """Return how many tokens of rows `[B, L + 1]`, marked or not, are predicted."""
    return int(targets_of_rows(rows).sum())


def pair_with_previous(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the targets of rows `[B, L + 1]` and the tokens before them, int64 `[targets]`."""
    rows = rows.astype(np.int64, copy=False)
    previous, target = rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)
    if is_marked(rows):
        here = (target & NO_TARGET) == 0
        previous, target = previous[here] & IDS, target[here] & IDS
    return previous, target
