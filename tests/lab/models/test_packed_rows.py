"""Conversations of one row have the logits that they have alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, LlamaConfig, MambaConfig

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.loss_mask import (
    BEGIN,
    NO_TARGET,
    count_targets,
    is_marked,
    pair_with_previous,
    unpack,
)
from muonscale.lab.models.contexts import quiet_transformers
from muonscale.lab.models.packed_rows import ISOLATES_CONVERSATIONS, check_isolates_conversations
from muonscale.lab.parallel.forward import Parallelized

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,  # Gemma 3: the last one attends to everything
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 60,
    "max_position_embeddings": 64,
    "head_dim": 8,
    "sliding_window": 4,
    "use_sliding_window": True,
    "pad_token_id": None,
    "num_local_experts": 4,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}


def small_model(kind: str) -> nn.Module:
    cls = CONFIG_MAPPING[kind]
    names = {field.name for field in dataclasses.fields(cls)} | set(cls.attribute_map)
    fields = {name: value for name, value in SMALL.items() if name in names}
    if kind.startswith("deepseek"):  # latent attention: a head size of its own, and no groups
        fields = {**fields, "num_key_value_heads": 4}
        fields.pop("head_dim", None)
    torch.manual_seed(0)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_config(cls(**fields), attn_implementation="sdpa")
    model = model.float().eval()
    for parameter in model.parameters():  # large enough that attention tells
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def marked(*conversations: torch.Tensor) -> torch.Tensor:
    """Return conversations in one row."""
    row = torch.cat(conversations, dim=1)
    starts = torch.tensor([0, *(c.shape[1] for c in conversations[:-1])]).cumsum(0)
    row[:, starts] |= BEGIN | NO_TARGET
    return row


@pytest.mark.parametrize("kind", ISOLATES_CONVERSATIONS)
@torch.no_grad()
def test_packed_logits_are_those_of_each_conversation_alone(kind: str) -> None:
    model = small_model(kind)
    forward = Parallelized(model, model)  # type: ignore[arg-type]
    parts = [torch.randint(0, 60, (2, length)) for length in (9, 1, 12)]
    alone = torch.cat([forward.logits(part) for part in parts], dim=1)
    rows = unpack(torch.cat([marked(*parts), torch.zeros(2, 1, dtype=torch.int64)], dim=1))
    assert torch.equal(rows.inputs_BL, torch.cat(parts, dim=1))
    packed = forward.logits(rows.inputs_BL, rows.positions_BL)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-4)
    assert (forward.logits(rows.inputs_BL) - alone).abs().max() > 0.1  # positions go on


@pytest.mark.parametrize(
    ("kind", "tolerance"),
    [
        ("llama", 1e-9),
        ("gpt2", 1e-9),
        ("olmo2", 1e-9),
        ("gemma3_text", 1e-3),  # its norms are computed in float32
    ],
)
def test_documents_of_a_row_have_the_logits_and_gradients_of_each_alone(
    kind: str, tolerance: float
) -> None:
    model, start = small_model(kind).double(), 59
    forward = Parallelized(model, model, document_start=start)  # type: ignore[arg-type]
    parts = [torch.randint(0, 59, (2, length)) for length in (5, 9, 1, 8)]
    for part in parts[1:]:  # the first one began in the row before
        part[:, 0] = start
    row = torch.cat(parts, dim=1)
    alone = torch.cat([Parallelized(model, model).logits(part) for part in parts], dim=1)  # type: ignore[arg-type]
    packed = forward.logits(row)
    torch.testing.assert_close(packed, alone, rtol=tolerance, atol=tolerance)
    weights, gradients = torch.randn_like(packed), []
    for logits in (alone, packed):
        model.zero_grad()
        (logits * weights).sum().backward()
        gradients.append(
            {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        )
    for name, expected in gradients[0].items():
        bound = tolerance * float(expected.abs().max())
        torch.testing.assert_close(gradients[1][name], expected, rtol=0, atol=bound)
    forward.document_start = None
    assert (forward.logits(row) - alone).abs().max() > 0.1


def test_other_models_are_refused() -> None:
    text = DataSection(source="python-stdlib")
    chats = DataSection(path="x.jsonl", format="chat", tokenizer="x")
    masked = DataSection(source="python-stdlib", document_mask=True)
    check_isolates_conversations(MambaConfig(), text)
    for data, key in ((chats, "data.format=chat"), (masked, "data.document_mask=true")):
        check_isolates_conversations(LlamaConfig(), data)
        with pytest.raises(ConfigError, match=rf"{key}.*'mamba'.*llama"):
            check_isolates_conversations(MambaConfig(), data)


def test_marks_by_hand() -> None:
    row = torch.tensor(
        [
            [
                5 | BEGIN | NO_TARGET,
                6 | NO_TARGET,
                7,
                8,
                5 | BEGIN | NO_TARGET,
                9,
                0 | BEGIN | NO_TARGET,
            ]
        ]
    )
    found = unpack(row)
    assert found.inputs_BL.tolist() == [[5, 6, 7, 8, 5, 9]]
    assert found.targets_BL.tolist() == [[-100, 7, 8, -100, 9, -100]]
    assert found.positions_BL.tolist() == [[0, 1, 2, 3, 0, 1]]
    rows = row.numpy()
    assert is_marked(rows) and count_targets(rows) == 3
    previous, target = pair_with_previous(rows)
    assert (previous.tolist(), target.tolist()) == ([6, 7, 5], [7, 8, 9])


def test_rows_of_plain_text_are_ids_and_nothing_else() -> None:
    rows = torch.arange(12).view(2, 6)
    found = unpack(rows)
    assert torch.equal(found.inputs_BL, rows[:, :-1]) and torch.equal(found.targets_BL, rows[:, 1:])
    assert found.positions_BL.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert not is_marked(rows.numpy()) and count_targets(rows.numpy()) == 10
