"""Which conversations share a row; pure, from their lengths alone.

Best-fit decreasing: the longest first, each into the fullest row that still has room for it, else
into a new one. It needs at most 11/9 of the fewest rows possible, and 4 more (Johnson, Demers,
Ullman, Garey and Graham, SIAM J. Computing 3(4), 1974, whose bound is that of first-fit decreasing too).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def pack(lengths: NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Divide items among rows.

    Args:
        lengths: of the items, from 1 to capacity, int64 `[items]`.
        capacity: of a row.

    Returns:
        The items of every row by number, the longest first; the same for the same lengths.

    Raises:
        ValueError: for a length out of range.
    """
    if lengths.size and not 1 <= lengths.min() <= lengths.max() <= capacity:
        raise ValueError(f"lengths {lengths.min()} to {lengths.max()} for rows of {capacity}")
    rows: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = (
        0  # bit r is set where some row has room for r: the best fit is its lowest bit from there
    )
    for item in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[item])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(item)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows
