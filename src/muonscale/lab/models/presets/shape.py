"""The class of presets, and the architectures that several families share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class ModelPreset:
    """One named shape."""

    model_type: str
    """Hugging Face model type, such as `llama`."""
    fields: dict[str, Any]
    """Fields of the Hugging Face configuration; the others have their defaults."""


def llama(*, hidden: int, layers: int, heads: int, inner: int, **fields: Any) -> ModelPreset:
    """Return a Llama with equal numbers of query and key-value heads and an untied head."""
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "tie_word_embeddings": False,
    }
    return ModelPreset(model_type="llama", fields=shape | fields)


def gpt2(*, hidden: int, layers: int, heads: int, **fields: Any) -> ModelPreset:
    """Return a GPT-2 without dropout: one pass over the data does not need it."""
    shape = {
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return ModelPreset(model_type="gpt2", fields=shape | fields)


def global_gemma3(
    *,
    hidden: int,
    layers: int,
    heads: int,
    key_value: int,
    head_dim: int,
    inner: int,
    **fields: Any,
) -> ModelPreset:
    """Return a Gemma 3 in which every layer attends to the whole sequence.

    The original has five layers with a sliding window per global layer. A pattern of one layer
    makes all of them global.
    """
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value,
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,  # scores are divided by its root
        "intermediate_size": inner,
        "sliding_window_pattern": 1,
        "tie_word_embeddings": True,
    }
    return ModelPreset(model_type="gemma3_text", fields=shape | fields)
