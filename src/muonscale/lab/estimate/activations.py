"""The tensors that autograd saves for a micro-batch, measured on the meta device.

The model runs on tensors without storage. The tensors saved for the backward pass are added up by
layer, each storage once, without parameters. Attention is replaced by a function that saves what
fused kernels save: queries, keys, values, outputs, and one float32 per query.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from muonscale.lab.estimate.workload import Workload
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.loss import loss_bytes
from muonscale.lab.models.structure import decoder_layers
from muonscale.lab.parallel.placements import CUT_AXIS, sequence_norms, tensor_styles
from muonscale.lab.parallel.topology import Topology

COUNTED = "muonscale_counted"
"""Name of our attention function in transformers."""

KORTHIKANTI = 17
"""Saved elements per token and unit of width in a layer with fused attention: 34 bytes in 16 bits.
Korthikanti et al. 2022, arXiv 2205.05198, section 4.1."""

OUTSIDE = "outside"


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank for one micro-batch."""

    layers: tuple[int, ...]
    """Saved bytes of each layer."""
    inputs: int
    """Bytes of the inputs of all layers, which checkpointing saves."""
    outside: int
    """Saved bytes before and after the layers, without logits."""
    logits: int
    measured: bool
    """Whether they were measured on the meta device, or computed with `KORTHIKANTI`."""

    @property
    def plain(self) -> int:
        """Peak without checkpointing."""
        return sum(self.layers) + self.outside

    @property
    def checkpointed(self) -> int:
        """Peak with checkpointing, in the backward pass."""
        return self.inputs + max(self.layers) + self.outside


class _FusedAttention(torch.autograd.Function):
    """Shapes and saved tensors of fused attention."""

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        batch, heads, length, _ = q_BHLD.shape
        # The output has the strides of the queries, which decide whether merging heads is a copy.
        out = torch.empty_like(q_BHLD)
        if out.shape[-1] != v_BHLD.shape[-1]:
            out = q_BHLD.new_empty(batch, length, heads, v_BHLD.shape[-1]).transpose(1, 2)
        sums = q_BHLD.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q_BHLD, k_BHLD, v_BHLD, out, sums)
        return out


class _Grouped(torch.autograd.Function):
    """Shapes and saved tensors of the product of every expert with its rows."""

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, stack_EIO: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, stack_EIO)
        return rows_RI.new_empty(rows_RI.shape[0], stack_EIO.shape[-1])


class _AnyDtype(TorchFunctionMode):
    """Allows grouped products in every dtype; on the meta device torch supports only bfloat16."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Replace grouped products, and call all other functions."""
        if func is torch._grouped_mm:
            return _Grouped.apply(*args[:2])
        return func(*args, **(kwargs or {}))


def _count_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    out: Any = _FusedAttention.apply(query, key, value)
    return out.transpose(1, 2).contiguous(), None


def activation_bytes(
    shape: PreTrainedConfig, topology: Topology, workload: Workload
) -> Activations:
    """Return the activations of one micro-batch on a rank.

    Args:
        shape: Hugging Face configuration of the model.
        topology: tensor parallelism divides matrices and heads, sequence parallelism norms.
        workload: tokens and precision; experts are assumed to get equal numbers of tokens.
    """
    tokens, itemsize = workload.micro_tokens, workload.precision.itemsize
    inputs = tokens * shape.hidden_size * itemsize
    logits = loss_bytes(tokens, shape.vocab_size, itemsize)
    count = shape.num_hidden_layers
    if topology.sequence:
        inputs //= topology.tensor
    try:
        kept = _measure(shape, topology, workload)
    except RuntimeError:  # an operation that needs values, not shapes
        each = KORTHIKANTI * tokens * shape.hidden_size * itemsize // topology.tensor
        return Activations((each,) * count, count * inputs, inputs, logits, False)
    outside = kept.pop(OUTSIDE, 0)
    return Activations(tuple(kept.values()), count * inputs, outside, logits, True)


def _measure(shape: PreTrainedConfig, topology: Topology, workload: Workload) -> dict[str, int]:
    """Return the saved bytes by layer, and `OUTSIDE` of layers."""
    AttentionInterface.register(COUNTED, _count_attention)
    model = meta_model(shape)
    model.to(dtype=workload.precision).train()  # pyrefly: ignore
    model.set_attn_implementation(COUNTED)
    if topology.tensor > 1:
        _shrink(model, topology.tensor)
    meter = _SavedTensors(model)
    norms = sequence_norms(model) if topology.sequence else []
    sequences = workload.micro_tokens // workload.sequence_length
    ids_BL = torch.zeros(sequences, workload.sequence_length, dtype=torch.long, device="meta")
    with _AnyDtype(), meter.measuring(norms):
        model.base_model(input_ids=ids_BL)
    return meter.totals(topology.tensor)


def _shrink(model: PreTrainedModel, ways: int) -> None:
    """Replace tensor-parallel matrices by their part on one of `ways` ranks."""
    for name, style in tensor_styles(model).items():
        axis = CUT_AXIS[style]
        if axis is None:
            continue
        for leaf, parameter in list(model.get_submodule(name).named_parameters(recurse=False)):
            if parameter.ndim > axis:
                local = parameter.chunk(ways, axis)[0].detach()
                setattr(model.get_submodule(name), leaf, nn.Parameter(local.clone()))


class _SavedTensors:
    """Adds up the tensors that autograd saves while a model runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._kept: dict[int, tuple[str, bool, Tensor]] = {}
        self._layer = OUTSIDE
        self._in_norm = False

    @contextmanager
    def measuring(self, norms: list[str]) -> Generator[None]:
        """Measure inside the block; `norms` are counted separately."""
        hooks = []
        for number, layer in enumerate(decoder_layers(self._model)):
            hooks += self._around(layer, "_layer", f"layer {number}", OUTSIDE)
        for name in norms:
            hooks += self._around(self._model.get_submodule(name), "_in_norm", True, False)
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
            yield
        for hook in hooks:
            hook.remove()

    def _around(self, module: nn.Module, what: str, inside: object, after: object) -> list[Any]:
        def enter(*_: object) -> None:
            setattr(self, what, inside)

        def leave(*_: object) -> None:
            setattr(self, what, after)

        return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

    def _keep(self, tensor: Tensor) -> Tensor:
        number = tensor.untyped_storage()._cdata
        if number not in self._parameters:
            self._kept.setdefault(number, (self._layer, self._in_norm, tensor))
        return tensor

    def totals(self, ways: int) -> dict[str, int]:
        """Return the bytes by layer; the tensors of norms are divided by `ways`."""
        totals: defaultdict[str, int] = defaultdict(int)
        for layer, in_norm, tensor in self._kept.values():
            totals[layer] += tensor.untyped_storage().nbytes() // (ways if in_norm else 1)
        return dict(totals)
