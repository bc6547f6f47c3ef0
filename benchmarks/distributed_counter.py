"""Bytes that a rank sends, counted at torch's collectives.

A mode sees every operation of `torch.ops.c10d` and of the functional collectives, so also those that
FSDP2 and DTensor call inside.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

FUNCTIONAL = {
    "all_gather_into_tensor": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "all_reduce": "all_reduce",
    "all_to_all_single": "all_to_all",
}
PASSIVE = ("wait_tensor", "_wrap_tensor_autograd")
DIRECT = {
    "_allgather_base_": "all_gather",
    "allgather_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
    "allreduce_": "all_reduce",
    "alltoall_base_": "all_to_all",
}
"""The collective, by the operation's name in `_c10d_functional` and in `c10d`."""


def tensors(value: Any) -> Iterable[Tensor]:
    """Yield the tensors in nested lists."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from tensors(inner)


def nbytes(value: Any) -> int:
    """Return the bytes of all tensors in nested lists."""
    return sum(tensor.nbytes for tensor in tensors(value))


class Counter(TorchDispatchMode):
    """Bytes sent on this rank, as a ring sends them, by collective."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: defaultdict[str, float] = defaultdict(float)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count an operation between ranks; let DTensors take themselves apart first."""
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        namespace = getattr(func, "namespace", "")
        name = func._schema.name.partition("::")[2] if namespace else ""
        if namespace == "c10d":
            self._direct(name, args)
        elif namespace == "_c10d_functional" and name not in PASSIVE:
            group = dist.distributed_c10d._resolve_process_group(args[-1])
            self._count(FUNCTIONAL[name], args[0], args[0], group, args[2:3])
        return func(*args, **(kwargs or {}))

    def _direct(self, name: str, args: tuple[Any, ...]) -> None:
        if name == "barrier":
            return
        kind = DIRECT[name]  # one that is not in the table is an error: nothing goes uncounted
        boxed = next(a for a in args if type(a).__name__ == "ScriptObject")
        group = dist.ProcessGroup.unbox(boxed)
        given = args[0] if kind == "all_reduce" else args[1]
        self._count(kind, given, args[0], group, args[4:5])

    def _count(self, kind: str, given: Any, taken: Any, group: Any, counts: Any) -> None:
        ranks = group.size()
        if kind == "all_reduce":
            self.sent[kind] += 2 * (ranks - 1) / ranks * nbytes(given)
        elif kind == "all_gather":
            self.sent[kind] += (ranks - 1) * nbytes(given)
        elif kind == "reduce_scatter":
            self.sent[kind] += (ranks - 1) / ranks * nbytes(given)
        else:
            (whole,) = tensors(given)
            rows = counts[0][group.rank()] if counts and counts[0] else whole.shape[0] // ranks
            kept = rows * (whole[0].nbytes if len(whole) else 0)
            self.sent[kind] += whole.nbytes - kept
