"""A model as one rank has it: its forward pass, and its gradients when the backward pass is over."""

from __future__ import annotations

import warnings
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from muonscale.lab.models.loss import causal_logits, evaluating
from muonscale.optim.distributed.dtensor import placements_differ, to_local


@dataclass
class Parallelized:
    """A model on the ranks of an arrangement."""

    model: PreTrainedModel
    """Whose parameters are trained."""
    wrapped: nn.Module
    """What is called: the model, or what wraps it."""
    precision: torch.dtype = torch.float32
    """Of the forward and backward passes."""
    casts: bool = False
    """Whether parameters come in that dtype by themselves, as under FSDP."""
    partial: tuple[str, ...] = ()
    """Parameters whose gradients are of this rank's attention heads only, ..."""
    heads: dist.ProcessGroup | None = None
    """... and the ranks that have the others."""

    def logits(self, ids_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
        """Return `[B, L, V]` logits of token ids, as `causal_logits`."""
        autocast = self.precision != torch.float32 and not self.casts
        with (
            torch.autocast(ids_BL.device.type, dtype=self.precision, enabled=autocast),
            warnings.catch_warnings(),
        ):
            # Logits may be a view; nothing writes to them.
            warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
            return causal_logits(self.wrapped, ids_BL, positions_BL)

    @contextmanager
    def micro_batch(self, *, last: bool) -> Generator[None]:
        """Hold back, in all micro-batches but the last, what ranks need to exchange once only."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_all_reduce(last)  # between replicas
        yield

    @contextmanager
    def evaluation(self) -> Generator[None]:
        """Evaluation mode, without gradients; afterwards parameters lie as they did before."""
        with evaluating(self.model):
            yield
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # FSDP would keep the outermost group gathered for a backward pass

    def complete_gradients(self) -> None:
        """Sum what is still to be summed of the gradients: a collective of all ranks."""
        for name, parameter in self.model.named_parameters():
            gradient: Any = parameter.grad
            if gradient is None:
                continue
            if placements_differ(parameter, gradient):
                placements = parameter.placements  # type: ignore[attr-defined]
                parameter.grad = gradient.redistribute(placements=placements)
            if name in self.partial:
                dist.all_reduce(to_local(gradient), group=self.heads)
