"""Named model shapes: a Hugging Face `model_type` and the fields of its configuration that make it.

What depends on the data (vocabulary, special tokens, positions) is filled in by
`build.model_config`: a published `vocab_size` counts where a model is looked at on its own, and
the tokenizer's replaces it in training.
"""

from __future__ import annotations

from muonscale.lab.models.presets import essential, moonlight, muon_plus, nano
from muonscale.lab.models.presets.shape import Preset

PRESETS: dict[str, Preset] = {
    **moonlight.PRESETS,
    **muon_plus.PRESETS,
    **essential.PRESETS,
    **nano.PRESETS,
}

__all__ = ["PRESETS", "Preset"]
