"""Matrices in the shapes of a Llama, under FSDP2 or replicated on all ranks, with given gradients."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

LAYERS, WIDTH, FFN = 4, 256, 704
SHAPES = (*[(WIDTH, WIDTH)] * 4, *[(FFN, WIDTH)] * 2, (WIDTH, FFN))


class Stack:
    """The parameters, and gradients that are put back before every step."""

    def __init__(self, *, sharded: bool) -> None:
        layers = [
            nn.Sequential(*(nn.Linear(in_, out, bias=False) for out, in_ in SHAPES))
            for _ in range(LAYERS)
        ]
        self.model = nn.Sequential(*layers)
        if sharded:
            for layer in layers:
                fully_shard(layer)
            fully_shard(self.model)
        self.parameters = list(self.model.parameters())
        generator = torch.Generator().manual_seed(0)
        self.gradients = [torch.randn(p.shape, generator=generator) for p in self.parameters]
        self._pristine = [
            placed(G, p) for G, p in zip(self.gradients, self.parameters, strict=True)
        ]

    def restore_gradients(self) -> None:
        """Put the gradients back: some optimizers write to them."""
        for parameter, gradient in zip(self.parameters, self._pristine, strict=True):
            parameter.grad = gradient.clone()

    @torch.no_grad()
    def zero(self) -> None:
        """Set the parameters to zero."""
        for parameter in self.parameters:
            parameter.zero_()

    @property
    def elements(self) -> int:
        """Of all parameters, on all ranks together."""
        return sum(parameter.numel() for parameter in self.parameters)


def placed(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return a tensor that every rank has as it lies for a parameter."""
    if not isinstance(parameter, DTensor):
        return whole
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(whole, mesh, placements, src_data_rank=None)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
