"""How an error is provoked, and what its message must name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from muonscale.errors import MuonscaleError


@dataclass(frozen=True)
class Row:
    error: type[MuonscaleError]
    said: tuple[str, ...]
    """What its message must name: the value, the key, or the accepted values; no wording."""
    call: Callable[[Path], object]
    """Given an empty folder, raises the error."""


def row(error: type[MuonscaleError], *said: str) -> Callable[[Callable[[Path], object]], Row]:
    return lambda call: Row(error, said, call)
