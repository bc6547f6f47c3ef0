"""Gather a sharded model on the first rank."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from muonscale.lab.models.adapter import copy_adapter
from muonscale.lab.models.build import build_model
from muonscale.lab.parallel.processes import Processes
from muonscale.optim.distributed.dtensor import gather_full


@torch.no_grad()
def gather_model(model: PreTrainedModel, processes: Processes) -> PreTrainedModel | None:
    """Return the whole model on the CPU of the first rank, and None on the others.

    With one process it is the model itself. A collective: parameters are gathered one at a time.
    """
    if not processes.many:
        return model
    whole = build_model(model.config, seed=0) if processes.is_first else None
    if whole is not None:
        whole.generation_config = model.generation_config
        copy_adapter(model, whole)
    for name, parameter in model.named_parameters():
        values = gather_full(parameter.detach())
        if whole is not None:
            whole.get_parameter(name).copy_(values)
    for name, buffer in model.named_buffers():
        values = gather_full(buffer)
        if whole is not None:
            whole.get_buffer(name).copy_(values)
    return whole
