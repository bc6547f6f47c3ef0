"""Zhang et al., Muon+, arXiv 2602.21545: GPT-2 and Llama shapes, as in K1seki221/MuonPlus.

The final norm of their GPT is an RMSNorm; GPT-2's LayerNorm has an additional bias.
"""

from __future__ import annotations

from muonscale.lab.models.presets.shape import ModelPreset, gpt2, llama

GPT2_VOCABULARY = 50257
LLAMA2_VOCABULARY = 32000


def _gpt(hidden: int, layers: int, heads: int, positions: int) -> ModelPreset:
    return gpt2(
        hidden=hidden,
        layers=layers,
        heads=heads,
        vocab_size=GPT2_VOCABULARY,
        n_positions=positions,
    )


def _llama(hidden: int, layers: int, heads: int, inner: int) -> ModelPreset:
    return llama(
        hidden=hidden,
        layers=layers,
        heads=heads,
        inner=inner,
        vocab_size=LLAMA2_VOCABULARY,
        max_position_embeddings=4096,  # no parameters: their class's default
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
    )


PRESETS = {
    "gpt-small": _gpt(768, 12, 12, positions=2048),
    # The paper says 362M; the shape in its code has 358.0M. With 8192 positions it would be 362.2M.
    "gpt-base": _gpt(1024, 24, 16, positions=4096),
    # Not in the code: GPT-2 large, which has the paper's 774M with 1024 positions.
    "gpt-large": _gpt(1280, 36, 20, positions=1024),
    "llama-60m": _llama(512, 8, 8, inner=1376),
    "llama-130m": _llama(768, 12, 12, inner=2048),
    "llama-350m": _llama(1024, 24, 16, inner=2736),
    "llama-1b": _llama(2048, 24, 32, inner=5461),
}
