"""What a preset is, and the two architectures that more than one family has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One named shape."""

    model_type: str
    """Hugging Face model type, such as `llama`."""
    fields: dict[str, Any]
    """Fields of the Hugging Face configuration; the rest keep its defaults."""


def llama(*, hidden: int, layers: int, heads: int, inner: int, **fields: Any) -> Preset:
    """Return a Llama with as many heads of keys and values as of queries, and an untied head."""
    shape = {
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "intermediate_size": inner,
        "tie_word_embeddings": False,
    }
    return Preset(model_type="llama", fields=shape | fields)


def gpt2(*, hidden: int, layers: int, heads: int, **fields: Any) -> Preset:
    """Return a GPT-2 without dropout: one pass over the data does not need it."""
    shape = {
        "n_embd": hidden,
        "n_layer": layers,
        "n_head": heads,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    }
    return Preset(model_type="gpt2", fields=shape | fields)


def global_gemma3(
    *,
    hidden: int,
    layers: int,
    heads: int,
    key_value: int,
    head_dim: int,
    inner: int,
    **fields: Any,
) -> Preset:
    """Return a Gemma 3 whose every layer attends to the whole sequence.

    Gemma 3 itself has five layers with a sliding window to each global one. A pattern of one layer
    makes all of them global, for any number of layers.
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
    return Preset(model_type="gemma3_text", fields=shape | fields)
