"""Expert parallelism: tokens are sent to the ranks of their experts, and the outputs back.

It supports the `experts(hidden, expert numbers, weights)` modules of transformers, whose parameters
are stacks `[experts, ...]`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from muonscale.optim.distributed.dtensor import to_local


def shard_experts(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the experts of a module over a mesh, and dispatch tokens to them.

    Args:
        module: a module of stacked experts; changed in place. Each rank keeps the experts
            `[rank * E / ranks, (rank + 1) * E / ranks)`.
        mesh: mesh of one axis, whose size divides the number of experts.
    """
    for name, parameter in list(module.named_parameters(recurse=False)):
        stack = distribute_tensor(parameter.data, mesh, [Shard(0)], src_data_rank=None)
        module.register_parameter(name, nn.Parameter(stack, parameter.requires_grad))
    number: int = module.num_experts  # type: ignore[assignment]
    module.num_experts = number // mesh.size()  # type: ignore[assignment]
    module.forward = _Dispatch(module, module.forward, mesh.get_group(), number)


class _Dispatch:
    """The forward pass of sharded experts."""

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Tensor],
        group: dist.ProcessGroup,
        number: int,
    ) -> None:
        self._module, self._forward, self._group = module, forward, group
        self._here = number // group.size()
        self._number = number

    def __call__(self, hidden_NH: Tensor, experts_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """Return `[N, H]`, the weighted outputs of the K experts of every token."""
        K = experts_NK.shape[1]
        experts = experts_NK.flatten()
        order = experts.argsort(stable=True)
        counts = torch.bincount(experts, minlength=self._number).view(-1, self._here)
        arriving = torch.empty_like(counts)
        dist.all_to_all_single(arriving, counts, group=self._group)
        send, receive = counts.sum(1).tolist(), arriving.sum(1).tolist()
        rows_RH = _ExchangeRows.apply(hidden_NH[order // K], send, receive, self._group)
        numbers = torch.arange(self._here, device=experts.device).repeat(self._group.size())
        numbers = numbers.repeat_interleave(arriving.flatten(), output_size=sum(receive))
        with _local_parameters(self._module) as parameters:
            if len(rows_RH):
                ones = rows_RH.new_ones(len(rows_RH), 1)
                outputs_RH = self._forward(rows_RH, numbers.unsqueeze(1), ones)
            else:  # No token arrived: gradients of zero, so that all ranks reduce the same ones.
                outputs_RH = rows_RH + sum(p.flatten()[:1].sum() * 0 for p in parameters)
        done_RH = _ExchangeRows.apply(outputs_RH, receive, send, self._group)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        outputs_NKH = done_RH[back].unflatten(0, (-1, K))
        return (outputs_NKH * weights_NK.unsqueeze(-1)).sum(1).to(hidden_NH.dtype)


class _ExchangeRows(torch.autograd.Function):
    """Sends rows to other ranks; the backward pass returns their gradients."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.reverse = receive, send, group
        arrived = rows.new_empty(sum(receive), rows.shape[1])
        dist.all_to_all_single(arrived, rows.contiguous(), receive, send, group=group)
        return arrived

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        return _ExchangeRows.apply(gradient, *ctx.reverse), None, None, None


@contextmanager
def _local_parameters(module: nn.Module) -> Generator[list[Tensor]]:
    """Replace the parameters of a module by their local tensors inside the block."""
    whole: dict[str, Any] = dict(module._parameters)
    parts = {name: to_local(p) for name, p in whole.items() if p is not None}
    module._parameters.update(parts)  # type: ignore[arg-type]
    try:
        yield list(parts.values())
    finally:
        module._parameters.update(whole)
