"""The model on one rank: its forward pass, and completing gradients after the backward pass."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from muonscale.lab.data.loss_mask import count_from
from muonscale.lab.models.contexts import evaluation_mode
from muonscale.lab.models.loss import causal_logits
from muonscale.optim.distributed.dtensor import placements_differ, to_local


@dataclass
class Parallelized:
    """A model on the ranks of a topology."""

    model: PreTrainedModel
    """The model whose parameters are trained."""
    wrapped: nn.Module
    """The module to call: the model or its wrapper."""
    precision: torch.dtype = torch.float32
    """Dtype of forward and backward passes."""
    casts: bool = False
    """Whether parameters are gathered in that dtype, as with FSDP."""
    partial: Collection[str] = ()
    """Parameters whose gradients on this rank come from its own attention heads only."""
    heads: dist.ProcessGroup | None = None
    """Group of the ranks with the other heads."""
    document_start: int | None = None
    """Token with which a document begins, if the documents of a row are kept apart."""

    def logits(self, ids_BL: Tensor, positions_BL: Tensor | None = None) -> Tensor:
        """Return `[B, L, V]` logits of token ids; see `causal_logits`."""
        if positions_BL is None and self.document_start is not None:
            positions_BL = count_from(ids_BL == self.document_start)
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
        """Delay communication that is needed once per step to the last micro-batch."""
        if isinstance(self.wrapped, DistributedDataParallel) and not last:
            with self.wrapped.no_sync():
                yield
            return
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_all_reduce(last)  # between replicas
        yield

    @contextmanager
    def evaluation(self) -> Generator[None]:
        """Use evaluation mode without gradients inside the block; reshard parameters after it."""
        with evaluation_mode(self.model):
            yield
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # FSDP keeps the outermost group gathered for a backward pass

    def complete_gradients(self) -> None:
        """Reduce the gradients that the backward pass has not: a collective of all ranks."""
        for name, parameter in self.model.named_parameters():
            gradient: Any = parameter.grad
            if gradient is None:
                continue
            if placements_differ(parameter, gradient):
                placements = parameter.placements  # type: ignore[attr-defined]
                parameter.grad = gradient.redistribute(placements=placements)
            if name in self.partial:
                dist.all_reduce(to_local(gradient), group=self.heads)
