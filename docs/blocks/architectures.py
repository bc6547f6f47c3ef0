"""Models of transformers whose parameters hold several matrices, at their published defaults.

One layer of each, or as few as it can have; they are built on the meta device. They are examples:
every class that is known is in `muonscale.optim.parameters.fused_table`.
"""

from __future__ import annotations

from typing import Any

CAUSAL = "AutoModelForCausalLM"
DBRX = {
    "n_layers": 1,
    "attn_config": {"kv_n_heads": 8, "rope_theta": 5e5, "clip_qkv": 8.0},
    "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
    "d_model": 6144,
    "n_heads": 48,
}
ONE = {"num_hidden_layers": 1}
TWO_KINDS = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}

FUSED_IN: dict[str, tuple[str, str, dict[str, Any]]] = {
    "GPT2Config": (CAUSAL, "GPT2Config", {"n_layer": 1}),
    "GPTNeoXConfig": (CAUSAL, "GPTNeoXConfig", ONE),
    "GPTNeoXJapaneseConfig": (CAUSAL, "GPTNeoXJapaneseConfig", ONE),
    "GPTBigCodeConfig": (CAUSAL, "GPTBigCodeConfig", {"n_layer": 1}),
    "GPTBigCodeConfig, multi_query=False": (
        CAUSAL,
        "GPTBigCodeConfig",
        {"n_layer": 1, "multi_query": False},
    ),
    "CodeGenConfig": (CAUSAL, "CodeGenConfig", {"n_layer": 1}),
    "BloomConfig": (CAUSAL, "BloomConfig", {"n_layer": 1, "hidden_size": 1024, "n_head": 16}),
    "MptConfig": (CAUSAL, "MptConfig", {"n_layers": 1}),
    "FalconConfig": (CAUSAL, "FalconConfig", ONE),
    "FalconConfig, new_decoder_architecture=True": (
        CAUSAL,
        "FalconConfig",
        {**ONE, "new_decoder_architecture": True, "num_kv_heads": 8, "hidden_size": 8192,
         "num_attention_heads": 128},
    ),
    "PersimmonConfig": (CAUSAL, "PersimmonConfig", ONE),
    "Phi3Config": (CAUSAL, "Phi3Config", ONE),
    "Phi4MultimodalConfig": (CAUSAL, "Phi4MultimodalConfig", ONE),
    "DbrxConfig": (CAUSAL, "DbrxConfig", DBRX),
    "GlmConfig": (CAUSAL, "GlmConfig", ONE),
    "Glm4Config": (CAUSAL, "Glm4Config", ONE),
    "ModernBertConfig": ("AutoModelForMaskedLM", "ModernBertConfig", ONE),
    "ModernBertDecoderConfig": (CAUSAL, "ModernBertDecoderConfig", ONE),
    "GraniteMoeHybridConfig": (CAUSAL, "GraniteMoeHybridConfig", ONE),
    "GraniteMoeSharedConfig": (
        CAUSAL,
        "GraniteMoeSharedConfig",
        {**ONE, "shared_intermediate_size": 1024},
    ),
    "GraniteMoeSWAConfig": (
        CAUSAL,
        "GraniteMoeSWAConfig",
        {**ONE, "shared_intermediate_size": 1024},
    ),
    "MiniMaxConfig": (CAUSAL, "MiniMaxConfig", TWO_KINDS),
    "MiniMaxM3VLConfig": ("AutoModelForImageTextToText", "MiniMaxM3VLConfig", {}),
    "MixtralConfig": (CAUSAL, "MixtralConfig", ONE),
    "Qwen3MoeConfig": (CAUSAL, "Qwen3MoeConfig", ONE),
    "GptOssConfig": (CAUSAL, "GptOssConfig", ONE),
    "Qwen3NextConfig": (CAUSAL, "Qwen3NextConfig", ONE),
    "Qwen3_5TextConfig": (CAUSAL, "Qwen3_5TextConfig", ONE),
    "Qwen3_5MoeTextConfig": (CAUSAL, "Qwen3_5MoeTextConfig", ONE),
}  # fmt: skip
"""Title to (auto class, configuration, fields)."""
