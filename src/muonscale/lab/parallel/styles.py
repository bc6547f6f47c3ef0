"""Tensor and sequence parallelism of a Hugging Face model as torch's styles of its modules.

Between the matrices of a layer activations are replicated, or sharded along the sequence. Attention
and feed-forward get them as DTensors, so that the gradients of all matrices that read them are
summed in one message.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    SequenceParallel,
)
from torch.distributed.tensor.placement_types import Placement
from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.models.structure import decoder_layers
from muonscale.lab.parallel.placements import sequence_norms, tensor_styles

SEQUENCE = Shard(1)
"""Sharding of activations `[batch, length, width]` along the sequence."""


def parallel_styles(model: PreTrainedModel, *, sequence: bool) -> dict[str, ParallelStyle]:
    """Return the parallel styles of modules, by name.

    Args:
        model: a causal language model with a tensor-parallel plan in transformers.
        sequence: shard the sequence between the matrices.

    Raises:
        ConfigError: if there is no plan, or it leaves out a module that would get a part of a
            sequence.
    """
    between: Placement = SEQUENCE if sequence else Replicate()
    kinds = tensor_styles(model)
    makers: dict[str, ParallelStyle] = {
        "rows": ColwiseParallel(),
        "columns": RowwiseParallel(output_layouts=between),
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "head": ColwiseParallel(input_layouts=between, output_layouts=Replicate()),
    }
    styles = {name: makers[kind] for name, kind in kinds.items() if kind in makers}
    readers = {name.rpartition(".")[0] for name, kind in kinds.items() if kind == "rows"}
    styles |= {name: _Enter(between, Replicate(), as_dtensor=True) for name in readers}
    if sequence:
        names = {module: name for name, module in model.named_modules()}
        _check_covered(model, names, readers)
        styles |= {name: SequenceParallel(use_local_output=True) for name in sequence_norms(model)}
        first = names[decoder_layers(model)[0]]
        styles[first] = _Enter(Replicate(), SEQUENCE, as_dtensor=False)
    return styles


def _check_covered(model: PreTrainedModel, names: dict[nn.Module, str], readers: set[str]) -> None:
    allowed = readers | set(sequence_norms(model))
    for layer in decoder_layers(model):
        for child in layer.children():
            if names[child] not in allowed and any(True for _ in child.parameters()):
                raise ConfigError(
                    f"sequence parallelism: transformers' tensor-parallel plan of model_type "
                    f"{model.config.model_type!r} leaves out {names[child]}; use tensor "
                    "parallelism without it"
                )


class _Enter(ParallelStyle):
    """Redistributes the activations that a module reads."""

    def __init__(self, given: Placement, wanted: Placement, *, as_dtensor: bool) -> None:
        super().__init__()
        self._given, self._wanted, self._as_dtensor = given, wanted, as_dtensor

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        def redistribute(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if args:
                return (self._redistribute(args[0], device_mesh), *args[1:]), kwargs
            hidden = self._redistribute(kwargs["hidden_states"], device_mesh)
            return args, {**kwargs, "hidden_states": hidden}

        module.register_forward_pre_hook(redistribute, with_kwargs=True)
        return module

    def _redistribute(self, hidden: Any, mesh: DeviceMesh) -> Any:
        if not isinstance(hidden, DTensor):
            hidden = DTensor.from_local(hidden, mesh, [self._given], run_check=False)
        hidden = hidden.redistribute(placements=[self._wanted])
        return hidden if self._as_dtensor else hidden.to_local()
