"""What autograd keeps of a micro-batch, measured without memory: on the meta device.

The model is run on tensors that have no storage, and what its operations keep for the backward pass
is added up, each storage once, parameters left out, layer by layer. Attention is stood in for by
one that keeps what fused kernels keep: queries, keys, values, outputs, and one float32 per query.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from muonscale.lab.estimate.workload import Workload
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.structure import decoder_layers
from muonscale.lab.parallel.placements import CUT_AXIS, sequence_norms, tensor_styles
from muonscale.lab.parallel.topology import Topology

COUNTED = "muonscale_counted"
"""Our attention's name in transformers."""

KORTHIKANTI = 17
"""Elements kept per token and unit of width in a layer with fused attention: 34 bytes in 16 bits.
Korthikanti et al. 2022, arXiv 2205.05198, section 4.1."""

BYTES_PER_LOGIT = 12
"""At the height of the loss: float32 log-probabilities, their gradient, and that of the logits."""

OUTSIDE = "outside"


@dataclass(frozen=True)
class Activations:
    """Bytes on one rank for one micro-batch."""

    layers: tuple[int, ...]
    """Kept in each layer."""
    inputs: int
    """All layers' inputs, which checkpointing keeps."""
    outside: int
    """Kept before and after the layers, logits excluded."""
    logits: int
    measured: bool
    """On the meta device; else by `KORTHIKANTI`."""

    @property
    def plain(self) -> int:
        """Kept without checkpointing."""
        return sum(self.layers) + self.outside

    @property
    def checkpointed(self) -> int:
        """Kept with it, at the height of the backward pass."""
        return self.inputs + max(self.layers) + self.outside


class _Fused(torch.autograd.Function):
    """Shapes of fused attention."""

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor) -> Tensor:
        batch, heads, length, _ = q_BHLD.shape
        # The result lies as the queries do, which decides whether merging the heads is a copy.
        out = torch.empty_like(q_BHLD)
        if out.shape[-1] != v_BHLD.shape[-1]:
            out = q_BHLD.new_empty(batch, length, heads, v_BHLD.shape[-1]).transpose(1, 2)
        sums = q_BHLD.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q_BHLD, k_BHLD, v_BHLD, out, sums)
        return out


class _Grouped(torch.autograd.Function):
    """Shapes of the product of every expert with its rows."""

    @staticmethod
    def forward(ctx: Any, rows_RI: Tensor, stack_EIO: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RI, stack_EIO)
        return rows_RI.new_empty(rows_RI.shape[0], stack_EIO.shape[-1])


class _AnyDtype(TorchFunctionMode):
    """Lets grouped products through in every dtype: without values torch knows bfloat16 alone."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Answer a grouped product by its shape, and pass on the rest."""
        if func is torch._grouped_mm:
            return _Grouped.apply(*args[:2])
        return func(*args, **(kwargs or {}))


def _counted(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    out: Any = _Fused.apply(query, key, value)
    return out.transpose(1, 2).contiguous(), None


def activation_bytes(
    shape: PreTrainedConfig, topology: Topology, workload: Workload
) -> Activations:
    """Return what a rank keeps of one micro-batch.

    Args:
        shape: of the model.
        topology: tensor parallelism makes matrices, heads and what they keep smaller, sequence
            parallelism what norms keep.
        workload: tokens and precision; tokens of a mixture are taken to be spread evenly.
    """
    tokens, itemsize = workload.micro_tokens, workload.precision.itemsize
    inputs = tokens * shape.hidden_size * itemsize
    logits = BYTES_PER_LOGIT * tokens * shape.vocab_size
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
    """Return the bytes by layer, and `OUTSIDE` them."""
    AttentionInterface.register(COUNTED, _counted)
    model = meta_model(shape)
    model.to(dtype=workload.precision).train()  # pyrefly: ignore
    model.set_attn_implementation(COUNTED)
    if topology.tensor > 1:
        _cut(model, topology.tensor)
    meter = _Meter(model)
    norms = sequence_norms(model) if topology.sequence else []
    sequences = workload.micro_tokens // workload.sequence_length
    ids_BL = torch.zeros(sequences, workload.sequence_length, dtype=torch.long, device="meta")
    with _AnyDtype(), meter.measuring(norms):
        model.base_model(input_ids=ids_BL)
    return meter.totals(topology.tensor)


def _cut(model: PreTrainedModel, ways: int) -> None:
    """Leave of every shared matrix what one of `ways` ranks has; heads follow from the shapes."""
    for name, style in tensor_styles(model).items():
        axis = CUT_AXIS[style]
        if axis is None:
            continue
        for leaf, parameter in list(model.get_submodule(name).named_parameters(recurse=False)):
            if parameter.ndim > axis:
                local = parameter.chunk(ways, axis)[0].detach()
                setattr(model.get_submodule(name), leaf, nn.Parameter(local.clone()))


class _Meter:
    """Adds up what is kept while a model runs."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._parameters = {p.untyped_storage()._cdata for p in model.parameters()}
        self._kept: dict[int, tuple[str, bool, Tensor]] = {}
        self._layer = OUTSIDE
        self._in_norm = False

    @contextmanager
    def measuring(self, norms: list[str]) -> Generator[None]:
        """Measure within the block; `norms` are counted apart."""
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

    @property
    def _keep(self) -> Callable[[Tensor], Tensor]:
        def keep(tensor: Tensor) -> Tensor:
            number = tensor.untyped_storage()._cdata
            if number not in self._parameters:
                self._kept.setdefault(number, (self._layer, self._in_norm, tensor))
            return tensor

        return keep

    def totals(self, ways: int) -> dict[str, int]:
        """Return the bytes by layer; of what norms keep a rank has one of `ways`."""
        found: defaultdict[str, int] = defaultdict(int)
        for layer, in_norm, tensor in self._kept.values():
            found[layer] += tensor.untyped_storage().nbytes() // (ways if in_norm else 1)
        return dict(found)
