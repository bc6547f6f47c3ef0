"""Named model shapes: a Hugging Face `model_type` and fields of its configuration.

`models.config.model_config` adds the fields that depend on the data (vocabulary, special tokens,
positions). A published `vocab_size` is used to inspect a model; the tokenizer's replaces it in
training.
"""

from __future__ import annotations

from muonscale.lab.models.presets import essential, moonlight, muon_plus, nano
from muonscale.lab.models.presets.shape import ModelPreset

PRESETS: dict[str, ModelPreset] = {
    **moonlight.PRESETS,
    **muon_plus.PRESETS,
    **essential.PRESETS,
    **nano.PRESETS,
}

__all__ = ["PRESETS", "ModelPreset"]
