"""Small models of the families with about a million parameters, which train in minutes on a CPU."""

from __future__ import annotations

from muonscale.lab.models.moe.gate_scale import gate_scale
from muonscale.lab.models.presets.shape import ModelPreset, global_gemma3, gpt2, llama

# A small Moonlight: latent attention, one dense layer, and two routed and two shared experts per
# token, which together are as wide as the dense feed-forward.
MOONLIGHT = ModelPreset(
    model_type="deepseek_v3",
    fields={
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "intermediate_size": 352,
        "moe_intermediate_size": 88,
        "n_routed_experts": 8,
        "n_shared_experts": 2,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": round(gate_scale(8, 2), 3),
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": None,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
    },
)

PRESETS = {
    "llama-nano": llama(hidden=128, layers=4, heads=4, inner=352),
    "gpt-nano": gpt2(hidden=128, layers=4, heads=4),
    "gemma-nano": global_gemma3(hidden=128, layers=4, heads=4, key_value=2, head_dim=32, inner=512),
    "moonlight-nano": MOONLIGHT,
    # For tests: a step takes milliseconds. Grouped-query attention, as in most published shapes.
    "llama-pico": llama(hidden=32, layers=2, heads=4, inner=88, num_key_value_heads=2),
}
