"""Liu et al., Muon is Scalable for LLM Training, arXiv 2502.16982: Moonlight and its ladder."""

from __future__ import annotations

from muonscale.lab.models.presets.shape import ModelPreset, llama

VOCABULARY = 163840

# The published config.json of Moonlight-16B-A3B, without its fields on training and dtype.
MOONLIGHT = ModelPreset(
    model_type="deepseek_v3",
    fields={
        "vocab_size": VOCABULARY,
        "hidden_size": 2048,
        "num_hidden_layers": 27,
        "first_k_dense_replace": 1,
        "intermediate_size": 11264,
        "moe_intermediate_size": 1408,
        "moe_layer_freq": 1,
        "n_routed_experts": 64,
        "n_shared_experts": 2,
        "num_experts_per_tok": 6,
        "n_group": 1,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.446,
        "aux_loss_alpha": 0.001,
        "seq_aux": True,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "max_position_embeddings": 8192,
        "rope_theta": 50000.0,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.02,
        "hidden_act": "silu",
        "num_nextn_predict_layers": 0,
        "bos_token_id": 163584,
        "eos_token_id": 163585,
        "tie_word_embeddings": False,
    },
)


def llama_inner(hidden: int) -> int:
    """Return Llama's feed-forward width: 8/3 of the hidden size, up to a multiple of 256."""
    return -(-8 * hidden // (3 * 256)) * 256


def _dense(hidden: int) -> ModelPreset:
    """Return a model of the scaling ladder (Table 2): heads of 128, one layer per head.

    The paper gives the feed-forward width as 2.6 H. No rounding of that gives its parameter counts.
    Llama's rule, 2.67 H, does, if counts are truncated: 545.9M, 822.1M, 1.147B, 1.586B. It gives
    339.7M instead of the 399M in the table. All these sizes agree with the paper's law for N at the
    stated tokens (Table 9) to four digits, so 399M is a misprint. Vocabulary and rotary base are
    not in the paper; they are Moonlight's.
    """
    return llama(
        hidden=hidden,
        layers=hidden // 128,
        heads=hidden // 128,
        inner=llama_inner(hidden),
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
        rope_theta=50000.0,
        rms_norm_eps=1e-5,
    )


PRESETS = {
    "moonlight-16b-a3b": MOONLIGHT,
    "moonlight-dense-399m": _dense(1536),
    "moonlight-dense-545m": _dense(1792),
    "moonlight-dense-822m": _dense(2048),
    "moonlight-dense-1.1b": _dense(2304),
    "moonlight-dense-1.5b": _dense(2560),
}
