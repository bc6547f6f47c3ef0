"""Into which parts a module's forward pass cuts the output of a product with one of its weights.

The oracle for the table of fused weights, which it does not use. Every entry of the output is
replaced by the number of its feature. Operations that only move entries (views, copies, `cat`)
keep the numbers; the first operation that computes with a tensor tells which features go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

MOVES = frozenset([
    "view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "t", "slice",
    "select", "split", "split_with_sizes", "tensor_split", "unbind", "chunk", "narrow", "unfold",
    "unsqueeze", "squeeze", "expand", "repeat", "clone", "contiguous", "_to_copy", "to", "detach",
    "alias", "cat", "stack", "index", "index_select", "as_strided", "constant_pad_nd", "roll",
    "flip", "lift_fresh",
])  # fmt: skip
"""Operations that only move entries."""
IGNORES = frozenset([
    "new_zeros", "new_full", "new_empty", "new_ones", "zeros_like", "empty_like", "ones_like",
    "full_like",
])  # fmt: skip
"""Operations that read a tensor's shape alone."""
PRODUCTS = frozenset(["mm", "addmm", "bmm", "baddbmm", "matmul", "linear"])


class DataFlow(TorchDispatchMode):
    """Records the parts of the output of the products with `weight`.

    Args:
        weight: the parameter.
        through: names of operations that are taken for moves: a convolution over time, an
            activation function, a product or sum with a tensor that has no numbered features.
    """

    def __init__(self, weight: Tensor, through: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.weight, self.through = weight, through
        self.features = 0
        self.out_axis = 0
        """The axis of the weight that the features run along."""
        self.parts: set[frozenset[int]] = set()
        self._numbered: dict[int, Tensor] = {}

    def largest(self) -> set[frozenset[int]]:
        """Return the parts that no other part contains."""
        return {part for part in self.parts if not any(part < other for other in self.parts)}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func.__name__.split(".")[0], kwargs or {}
        out = func(*args, **kwargs)
        if name in PRODUCTS and (place := self._weight_among(args)) is not None:
            return self._number(out, args[place], place == len(args) - 2)
        numbered = [x for x in tree_iter((args, kwargs)) if self._has_numbers(x)]
        if not numbered or name in IGNORES:
            return out
        if name in MOVES:
            return tree_map_only(Tensor, self._keep, out)
        if name == "add" and any(_is_bias(other, self.features) for other in args):
            return self._keep(_moved(numbered[0], out))
        if name in self.through and isinstance(out, Tensor):
            return self._keep(_moved(numbered[0], out))
        if name in self.through:
            return (self._keep(_moved(numbered[0], out[0])), *out[1:])
        if name == "glu":
            halves = numbered[0].chunk(2, args[1] if len(args) > 1 else -1)
            numbered = [self._keep(half) for half in halves]
        self.end_with(numbered)
        return out

    def end_with(self, tensors: object) -> None:
        """Count each of `tensors` that has numbered features as a part."""
        for x in tree_iter(tensors):
            if self._has_numbers(x):
                self.parts.add(self._features_of(x))

    def _weight_among(self, args: Any) -> int | None:
        home = self.weight.untyped_storage().data_ptr()
        for place in (len(args) - 2, len(args) - 1):
            if args[place].untyped_storage().data_ptr() == home:
                return place
        return None

    def _number(self, out: Tensor, factor: Tensor, is_left: bool) -> Tensor:
        contracted = factor.stride(-1 if is_left else -2)
        self.out_axis = -2 if contracted == self.weight.stride(-1) else -1
        self.features = out.shape[-2 if is_left else -1]
        numbers = torch.arange(1.0, self.features + 1)
        numbers = numbers[:, None] if is_left else numbers
        return self._keep(numbers.expand(out.shape).clone())

    def _keep(self, out: Tensor) -> Tensor:
        self._numbered[id(out)] = out  # holding it keeps the id
        return out

    def _has_numbers(self, x: object) -> bool:
        return isinstance(x, Tensor) and id(x) in self._numbered

    def _features_of(self, x: Tensor) -> frozenset[int]:
        values = {float(value) for value in x.detach().float().unique()}
        return frozenset(int(v) for v in values if v == int(v) and 1 <= v <= self.features)


def _is_bias(x: object, features: int) -> bool:
    return isinstance(x, Tensor) and x.shape == (features,)


def _moved(x: Tensor, out: Tensor) -> Tensor:
    """Return a tensor with the shape of `out` and the numbers of `x`, which may be longer in time."""
    if x.ndim == out.ndim + 1:  # a sum over the last axis: its first entry stands for all
        x = x[..., 0]
    changed = [axis for axis in range(x.ndim) if x.shape[axis] != out.shape[axis]]
    for axis in changed if x.ndim == out.ndim else []:
        x = x.narrow(axis, 0, 1)
    return x.expand(out.shape).clone()


def parts_of(
    weight: Tensor, run: Callable[[], object], through: tuple[str, ...] = ()
) -> tuple[set[frozenset[int]], int, int]:
    """Return the parts, the number of features, and the weight's axis that they run along."""
    with torch.no_grad(), DataFlow(weight, through) as flow:
        flow.end_with(run())
    assert flow.features, "the forward pass has no product with the weight"
    return flow.largest(), flow.features, flow.out_axis


def rows_of(matrices: list[Tensor]) -> Iterator[frozenset[int]]:
    """Yield which numbered features each of a weight's matrices has as rows."""
    for batch in matrices:
        yield frozenset(int(number) for number in batch.unique())
