"""Practical Efficiency of Muon for Pretraining, arXiv 2505.02222: Gemma 3, global attention only.

The paper gives the dimensions of the five widths of its telescoping experiment (section 3): heads
of 128, twice as many of queries as of keys and values, a feed-forward of 4 widths, 34 layers,
Llama 3's vocabulary, a tied head. For the models of section 2, 100M to 4B, it
gives only the sizes: their widths are ours, with the same proportions, and the number of layers
brings the total nearest to the name. Norms, rotary base and initialization are Gemma 3's.
"""

from __future__ import annotations

from muonscale.lab.models.presets.shape import ModelPreset, global_gemma3

LLAMA3_VOCABULARY = 128256


def _gemma(hidden: int, layers: int) -> ModelPreset:
    return global_gemma3(
        hidden=hidden,
        layers=layers,
        heads=hidden // 128,
        key_value=hidden // 256,
        head_dim=128,
        inner=4 * hidden,
        vocab_size=LLAMA3_VOCABULARY,
        max_position_embeddings=8192,
    )


PRESETS = {
    "essential-0.07b": _gemma(256, 34),
    "essential-0.20b": _gemma(512, 34),
    "essential-0.67b": _gemma(1024, 34),
    "essential-2.40b": _gemma(2048, 34),
    "essential-3.67b": _gemma(2560, 34),
    "essential-100m": _gemma(512, 9),
    "essential-500m": _gemma(1024, 23),
    "essential-1b": _gemma(1536, 23),
    "essential-2b": _gemma(2048, 28),
    "essential-4b": _gemma(2560, 37),
}
