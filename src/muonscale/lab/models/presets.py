"""Named model shapes: a Hugging Face `model_type` and the fields of its configuration that make it.

What depends on the data (vocabulary, special tokens, positions) is filled in by `build.model_config`.
"""

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


PRESETS: dict[str, Preset] = {
    # About 1M parameters with a vocabulary of 1024: trains in minutes on a laptop CPU.
    "llama-nano": Preset(
        model_type="llama",
        fields={
            "hidden_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "intermediate_size": 352,
            "tie_word_embeddings": False,
        },
    ),
    # For tests: a step takes milliseconds. Grouped-query attention, as in most published shapes.
    "llama-pico": Preset(
        model_type="llama",
        fields={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 88,
            "tie_word_embeddings": False,
        },
    ),
}
