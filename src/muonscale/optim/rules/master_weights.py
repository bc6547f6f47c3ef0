"""The weights that a step updates, and two ways to keep small steps of weights in 16 bits.

A bf16 weight has 8 bits, so a step of less than 1/512 of it is rounded away. There are two remedies
(`master`). "float32" keeps a float32 copy in the state and computes on it. "stochastic" rounds up
or down at random with the right mean. The random numbers depend on (seed, name, step, position)
alone, so a resumed run rounds as an uninterrupted one does, and many ranks round as one.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from muonscale.optim.matrices.sharding import Sharding, element_numbers
from muonscale.optim.rules.moments import widened, write_


def is_narrow(parameter: Tensor) -> bool:
    """Return whether `parameter` is in 16 bits or fewer."""
    return parameter.dtype.itemsize < 4


@dataclass(frozen=True)
class Rounding:
    """How a parameter is rounded at random in one step; the same in every sharding."""

    key: int
    """See `rounding_key`."""
    part: tuple[Sharding, tuple[int, ...]] | None = None
    """Sharding and `shard_coordinates` of the local part; None if the parameter is whole here."""

    def apply(self, X: Tensor) -> Tensor:
        """Return float32 `X`, this rank's part of the parameter, in bfloat16."""
        numbers = None if self.part is None else element_numbers(*self.part, X.device)
        return stochastic_bfloat16(X, self.key, numbers)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The stored weights of one call, and how to update them."""

    stored: list[Tensor]
    """Parameters, any floating dtype."""
    masters: list[Tensor | None] | None = None
    """Float32 copies of the parameters that have one; None if none has."""
    roundings: list[Rounding | None] | None = None
    """How each parameter is rounded at random; None if none is."""

    def wide(self, like: list[Tensor]) -> list[Tensor]:
        """Return the weights in the dtypes of `like`, to compute on in place.

        They are the parameters themselves if those can be updated in place. If a parameter differs
        from its rounded float32 copy, other code has written to it (a checkpoint of the model, a
        clip), and its value replaces the copy.
        """
        return widened(self._bases(), like)

    def copies(self, like: list[Tensor]) -> Iterator[Tensor]:
        """Yield a copy of each of the weights that `wide` returns."""
        for base, other in zip(self._bases(), like, strict=True):
            yield base.to(other.dtype, copy=True)

    def _bases(self) -> list[Tensor]:
        if self.masters is None:
            return self.stored
        return [
            stored if master is None else _agreed(master, stored)
            for master, stored in zip(self.masters, self.stored, strict=True)
        ]

    def write_(self, values: list[Tensor]) -> None:
        """Write `values` from `wide`, rounded once."""
        if self.masters is not None:
            pairs = [(m, v) for m, v in zip(self.masters, values, strict=True) if m is not None]
            write_([m for m, _ in pairs], [v for _, v in pairs])
        if self.roundings is not None:
            values = [
                value if rounding is None else rounding.apply(value)
                for value, rounding in zip(values, self.roundings, strict=True)
            ]
        write_(self.stored, values)


def _agreed(master: Tensor, stored: Tensor) -> Tensor:
    return torch.where(master.to(stored.dtype) == stored, master, stored.to(master.dtype))


def rounding_key(seed: int, name: str, step: int) -> int:
    """Return the key, below 2^31, with which a parameter is rounded at a step."""
    return zlib.crc32(f"{seed}/{step}/{name}".encode()) >> 1


def stochastic_bfloat16(X: Tensor, key: int, numbers: Tensor | None = None) -> Tensor:
    """Return `X` in bfloat16, each element rounded up or down at random with mean `X`.

    A value that bfloat16 can represent does not change. A value a quarter of the way between its
    neighbors becomes the farther one with probability 1/4. Probabilities are multiples of 1/65536.

    Args:
        X: float32, any shape; not written to.
        key: key of this tensor at this step, see `rounding_key`. Equal keys round equally, on every
            device.
        numbers: int32, shape of `X`: where its elements are in the tensor that it is a part of, see
            `element_numbers`. None if it is whole.
    """
    if numbers is None:
        numbers = torch.arange(X.numel(), dtype=torch.int32, device=X.device).view(X.shape)
    bits = X.contiguous().view(torch.int32) + _random_16_bits(numbers, key)
    return bits.bitwise_and_(-65536).view(torch.float32).to(torch.bfloat16)


def _random_16_bits(numbers: Tensor, key: int) -> Tensor:
    """Return int32 in [0, 65535], a hash of (key, number) for every int32; products wrap.

    The mixing steps are those of Wellons, Prospecting for Hash Functions (2018), lowbias32, whose
    right shifts fill with zeros.
    """
    x = (numbers * -1640531535).add_(key)  # 2654435761, Knuth's multiplier, as int32
    x.bitwise_xor_((x >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    x.bitwise_xor_((x >> 15).bitwise_and_(0x1FFFF)).mul_(-2073254261)  # 0x846ca68b
    return (x >> 16).bitwise_and_(0xFFFF)
