"""Checks that all gradients are finite. The host reads the flag only after it has arrived.

The ranks agree in `muonscale.optim.distributed.consensus`. What follows, raising or skipping, is in
`Muon.check_finite` (`muonscale.optim.muon`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from muonscale.errors import GroupingError
from muonscale.optim.newton_schulz.kernels.cpu import is_on_host

_LONG = 2**16
"""A tensor with at least this many elements is summed faster as a sum of products."""


@dataclass
class FiniteCheck:
    """Whether the gradients of one step are finite: known at once on a CPU, later elsewhere."""

    names: list[str]
    at_fault: Tensor
    """`[parameters]`, int32, on the host; to be read after `arrived`. 0 where a gradient is finite,
    else the number of a process that has a non-finite one, from 1."""
    mask: Tensor | None
    """0-D bool on the device, or None if the host knows the answer without waiting."""
    on_device: Tensor
    """`at_fault` on the device that computed it."""
    arrived: torch.Event | None = None

    def nonfinite_names(self) -> list[str]:
        """Return the names of the parameters with a non-finite gradient; waits for the device."""
        return [name for name, _ in self._faults()]

    def nonfinite_ranks(self) -> list[int]:
        """Return one process with a non-finite gradient for each of these parameters, from 0."""
        return [process - 1 for _, process in self._faults()]

    def _faults(self) -> list[tuple[str, int]]:
        if self.arrived is not None:
            self.arrived.synchronize()
        pairs = zip(self.names, self.at_fault.tolist(), strict=True)
        return [(name, process) for name, process in pairs if process]


def check_gradients(
    names: Sequence[str], gradients: Sequence[Tensor], process: int = 0
) -> FiniteCheck:
    """Return whether every element of every gradient is finite, without waiting for the device.

    Args:
        names: one per gradient.
        gradients: dense, floating; of any shape, dtype and device. Not written to.
        process: number of this process, from 0.
    """
    checked = [(n, g) for n, g in zip(names, gradients, strict=True) if g.numel()]
    kept = [name for name, _ in checked]
    if not checked:
        return answer(kept, torch.zeros(0, dtype=torch.int32, device="cpu"))
    gradients = [gradient for _, gradient in checked]
    if all(map(is_on_host, gradients)):
        if _are_finite([_sum_of_terms(gradient) for gradient in gradients]).all():
            return answer(kept, torch.zeros(len(kept), dtype=torch.int32, device="cpu"))
        pairs = [torch.aminmax(gradient) for gradient in gradients]
        finite = _are_finite([low for low, _ in pairs]) & _are_finite([high for _, high in pairs])
    else:
        if meta := [name for name, gradient in checked if gradient.is_meta]:
            raise GroupingError(
                f"the gradient of {meta[0]} is on the meta device and has no values: move the model "
                "to a device, and make the optimizer after that"
            )
        finite = _are_finite(list(torch._foreach_norm(gradients, math.inf)))
    return answer(kept, (~finite).to(torch.int32) * (process + 1))


def _sum_of_terms(G: Tensor) -> Tensor:
    """Return a 0-D sum over all of `G`, which is finite only if every element is; it may overflow.

    It takes half the time of the largest magnitude. A long tensor is read as two halves whose
    products are summed, since a core reads two streams faster than one (EXPERIMENTS.md, "A faster
    check for NaN"). A product with NaN or infinity is never finite.
    """
    if G.numel() < _LONG or not G.is_contiguous() or G.dtype not in (torch.float32, torch.float64):
        return G.sum()
    flat = G.view(-1)
    half = G.numel() // 2
    return torch.dot(flat[: len(flat) - half], flat[half:])  # of odd length, they share an element


def _are_finite(values: list[Tensor]) -> Tensor:
    """Return `[values]`, bool, on the device of the first of some 0-D tensors of any dtype."""
    if len({(value.dtype, value.device) for value in values}) == 1:
        return torch.stack(values).isfinite()
    return torch.stack([value.isfinite().to(values[0].device) for value in values])


def answer(names: list[str], at_fault: Tensor) -> FiniteCheck:
    """Return the check for `FiniteCheck.at_fault`, a tensor on any device."""
    if is_on_host(at_fault):
        return FiniteCheck(names, at_fault, None, at_fault)
    host, arrived = send_to_host(at_fault)
    return FiniteCheck(names, host, (at_fault == 0).all(), at_fault, arrived)


def send_to_host(tensor: Tensor) -> tuple[Tensor, torch.Event]:
    """Return a tensor on the host, to be read after an event: the only copy of a step to it."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True, device="cpu")
    host.copy_(tensor, non_blocking=True)
    arrived = torch.Event(tensor.device)
    arrived.record()
    return host, arrived


def zero_unless_(mask: Tensor | None, tensors: list[Tensor]) -> None:
    """Write zeros into `tensors`, on the device of `mask`, if `mask` (0-D bool) is false.

    The bits are multiplied, because a product of NaN and zero is NaN. All tensors take one launch,
    where `torch.where` would take one for each.
    """
    if mask is not None:
        bits = _bits(tensors)
        torch._foreach_mul_(bits, mask.to(bits[0].dtype))


def or_zeros(mask: Tensor | None, tensors: list[Tensor]) -> list[Tensor]:
    """Return `tensors` if `mask` is None; otherwise copies, which are zeros if it is false."""
    if mask is None:
        return tensors
    bits = _bits(tensors)
    products = torch._foreach_mul(bits, mask.to(bits[0].dtype))
    return [product.view(tensor.dtype) for product, tensor in zip(products, tensors, strict=True)]


def _bits(tensors: list[Tensor]) -> list[Tensor]:
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return [tensor.view(integers[tensor.dtype.itemsize]) for tensor in tensors]


def number_if(mask: Tensor | None, number: float, otherwise: float, like: list[Tensor]) -> Any:
    """Return `number` if `mask` is true or None, else `otherwise`: a factor of the tensors `like`."""
    if mask is None:
        return number
    widest = max(like, key=lambda tensor: tensor.dtype.itemsize)
    wanted = torch.full((), number, dtype=widest.dtype, device=widest.device)
    return torch.where(mask, wanted, otherwise)
