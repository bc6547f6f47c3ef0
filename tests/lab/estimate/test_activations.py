from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from muonscale.lab.estimate.activations import Activations, activation_bytes
from muonscale.lab.estimate.resolve import ResolvedPlan
from muonscale.lab.models import loss as loss_module
from muonscale.lab.models.build import build_model
from muonscale.lab.models.structure import decoder_layers
from tests.lab.estimate.build import planned, small_mixture
from tests.peak import peak_bytes


def counted(seen: ResolvedPlan) -> Activations:
    return activation_bytes(seen.shape, seen.placement.topology, seen.workload)


def kept_in_memory(seen: ResolvedPlan) -> int:
    """Return what autograd keeps of a real model's layers and what is before and after them."""
    model = build_model(seen.shape, seed=0).train()
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            kept.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    workload = seen.workload
    sequences = workload.micro_tokens // workload.sequence_length
    ids = torch.randint(seen.shape.vocab_size, (sequences, workload.sequence_length))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model.base_model(input_ids=ids)
    assert out.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def test_what_is_counted_without_memory_is_what_autograd_keeps(tmp_path: Path) -> None:
    for target in ("llama-nano", small_mixture(tmp_path)):
        seen = planned("fsdp=1", target=target, device="cpu")
        found = counted(seen)
        assert found.measured
        assert found.plain == pytest.approx(kept_in_memory(seen), rel=0.01)


@pytest.mark.parametrize("ways", [1, 2])
def test_a_llama_layer_keeps_what_its_formula_says(ways: int) -> None:
    seen = planned(f"tp={ways}")
    tokens, width, inner, heads, kv = 768, 32, 88, 4, 2
    head = width // heads
    # each norm: input, reciprocal root, normalised, output; queries, keys, values, outputs with a
    # float32 per query and head; gate, activated, up and their product
    norms = 2 * (3 * width + 1)
    attention = (2 * width + 2 * kv * head + heads) // ways
    feed_forward = 4 * inner // ways
    assert counted(seen).layers[1] == 4 * tokens * (norms + attention + feed_forward)


def test_a_divided_sequence_divides_what_norms_keep() -> None:
    whole, divided = counted(planned("tp=2")), counted(planned("tp=2,sp"))
    # input, reciprocal root and normalised of two norms; their outputs are gathered again
    assert whole.layers[1] - divided.layers[1] == 4 * 768 * 2 * (2 * 32 + 1) // 2
    assert divided.inputs == whole.inputs // 2


def test_checkpointing_keeps_the_inputs_and_one_layer() -> None:
    found = counted(planned("fsdp=1"))
    assert found.inputs == 2 * 768 * 32 * 4
    assert found.checkpointed == found.inputs + max(found.layers) + found.outside
    assert found.checkpointed < found.plain


def test_a_model_that_needs_values_is_estimated_by_the_formula(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("values")

    seen = planned("fsdp=1")
    layer = type(decoder_layers(seen.model)[0])
    monkeypatch.setattr(layer, "forward", refuse)
    found = counted(seen)
    assert not found.measured
    assert found.layers == (17 * 768 * 32 * 4,) * 2


@pytest.mark.parametrize("chunk", [2**24, 50_000, 10])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_cost_what_their_loss_takes_at_its_height(
    dtype: torch.dtype, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LOSS_CHUNK", chunk)
    tokens, vocabulary = 256, 1000
    hidden = torch.randn(tokens, 8, dtype=dtype, requires_grad=True)
    head = torch.randn(vocabulary, 8, dtype=dtype, requires_grad=True)
    targets = torch.zeros(tokens, dtype=torch.long)

    def loss() -> None:
        loss_module.summed_loss((hidden @ head.T)[None], targets[None]).backward()

    expected = loss_module.loss_bytes(tokens, vocabulary, dtype.itemsize)
    assert math.isclose(peak_bytes(loss), expected, rel_tol=0.1)
