"""The whole of a model that lies on many ranks, on the first one."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from muonscale.lab.models.build import build_model
from muonscale.lab.parallel.processes import Processes
from muonscale.optim.distributed.dtensor import gather_full


@torch.no_grad()
def whole_model(model: PreTrainedModel, processes: Processes) -> PreTrainedModel | None:
    """Return a model with the weights of all ranks, on the CPU of the first; None on the others.

    Where there is one process it is the model itself. A collective: parameters are gathered one at
    a time.
    """
    if not processes.many:
        return model
    whole = build_model(model.config, seed=0) if processes.is_first else None
    if whole is not None:
        whole.generation_config = model.generation_config
    for name, parameter in model.named_parameters():
        values = gather_full(parameter.detach())
        if whole is not None:
            whole.get_parameter(name).copy_(values)
    for name, buffer in model.named_buffers():
        values = gather_full(buffer)
        if whole is not None:
            whole.get_buffer(name).copy_(values)
    return whole
