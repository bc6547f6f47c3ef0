"""What a row of a batch says of its tokens besides their ids.

A row is int64. Its low 32 bits are the token id; of the others two are in use, and none in rows of
plain text, which are ids and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

NO_TARGET = 1 << 32
"""The token is read and not predicted."""
BEGIN = 1 << 33
"""A conversation begins with this token: nothing before it in the row is seen from it on."""
IDS = (1 << 32) - 1
"""The bits of the token id."""

IGNORED = -100
"""A target that `cross_entropy` leaves out."""


@dataclass(frozen=True)
class Batch:
    """Marked rows `[B, L + 1]` as a model takes them."""

    inputs_BL: Tensor
    """Token ids, int64."""
    targets_BL: Tensor
    """Token ids, int64; `IGNORED` where there is no target."""
    positions_BL: Tensor
    """Of the inputs in their conversations, counted from 0, int64."""


def unpack(rows_BL: Tensor) -> Batch:
    """Take marked rows, int64 `[B, L + 1]`, apart."""
    ids_BL = rows_BL & IDS
    targets_BL = ids_BL[:, 1:].masked_fill((rows_BL[:, 1:] & NO_TARGET) != 0, IGNORED)
    return Batch(ids_BL[:, :-1], targets_BL, _positions((rows_BL[:, :-1] & BEGIN) != 0))


def _positions(begins_BL: Tensor) -> Tensor:
    """Count from the last beginning, or from the start of the row."""
    at_L = torch.arange(begins_BL.shape[1], device=begins_BL.device)
    starts_BL = torch.where(begins_BL, at_L, 0).cummax(dim=1).values
    return at_L - starts_BL


def is_marked(rows: NDArray[np.int64]) -> bool:
    """Return whether rows have marks, unlike those of plain text."""
    return bool(rows.size) and int(rows.max()) > IDS


def count_targets(rows: NDArray[np.int64]) -> int:
    """Return how many tokens of rows `[B, L + 1]`, marked or not, are predicted."""
    return int(np.count_nonzero((rows[:, 1:] & NO_TARGET) == 0))


def neighbours(rows: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the targets of rows `[B, L + 1]` and the tokens before them, int64 ids `[targets]` each."""
    rows = rows.astype(np.int64, copy=False)
    previous, target = rows[:, :-1].reshape(-1), rows[:, 1:].reshape(-1)
    if is_marked(rows):
        here = (target & NO_TARGET) == 0
        previous, target = previous[here] & IDS, target[here] & IDS
    return previous, target
