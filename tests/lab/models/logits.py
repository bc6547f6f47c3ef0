"""The inputs of the softmax of transformers' own `eager` attention: the oracle of what is heard."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 4,
    "vocab_size": 50,
    "max_position_embeddings": 32,
}
LATENT: dict[str, Any] = {
    **SMALL,
    "moe_intermediate_size": 12,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 8,
    "q_lora_rank": None,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
GPT2: dict[str, Any] = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "vocab_size": 50,
    "n_positions": 32,
}
NO_TOKENS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}

CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (hf.LlamaConfig, SMALL),
    "llama_grouped": (hf.LlamaConfig, SMALL | {"num_key_value_heads": 2}),
    "llama_bias": (hf.LlamaConfig, SMALL | {"num_key_value_heads": 1, "attention_bias": True}),
    "mistral_window": (
        hf.MistralConfig,
        SMALL | {"num_key_value_heads": 2, "sliding_window": 3},
    ),
    "mixtral": (
        hf.MixtralConfig,
        SMALL | {"num_key_value_heads": 2, "num_local_experts": 4, "sliding_window": None},
    ),
    "qwen2": (hf.Qwen2Config, {k: v for k, v in SMALL.items() if k != "head_dim"}),
    "qwen2_moe": (
        hf.Qwen2MoeConfig,
        {k: v for k, v in SMALL.items() if k != "head_dim"}
        | {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 12,
            "shared_expert_intermediate_size": 12,
        },
    ),
    "gpt2": (hf.GPT2Config, GPT2 | NO_TOKENS),
    "gpt2_by_layer": (
        hf.GPT2Config,
        GPT2 | NO_TOKENS | {"scale_attn_by_inverse_layer_idx": True},
    ),
    "gemma3": (
        hf.Gemma3TextConfig,
        SMALL
        | {
            "num_key_value_heads": 2,
            "sliding_window": 4,
            "query_pre_attn_scalar": 1,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "qwen3": (hf.Qwen3Config, SMALL),
    "deepseek_v3": (hf.DeepseekV3Config, LATENT),
    "deepseek_v3_low_rank": (hf.DeepseekV3Config, LATENT | {"q_lora_rank": 8}),
}


def build(kind: str, attention: str = "sdpa", dtype: torch.dtype = torch.float64) -> Any:
    """Return a small model, in evaluation mode, whose heads have logits of very different sizes."""
    cls, fields = CONFIGS[kind]
    torch.manual_seed(0)
    config = cls(**fields)
    model = hf.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention, experts_implementation="eager"
    )
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 or name.endswith("bias"):
            noise = torch.randn(parameter.shape, generator=generator)
            with torch.no_grad():
                parameter.copy_(noise * (parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 1))
    for module in model.modules():
        if hasattr(module, "q_norm"):  # it makes queries of one length
            nn.init.constant_(module.q_norm.weight, 80.0)
        for name in ("q_proj", "q_b_proj", "c_attn"):
            projection = getattr(module, name, None)
            if projection is not None:
                _spread(projection, 4, 3 if name == "c_attn" else 1)
    return model.to(dtype).eval()


@torch.no_grad()
def _spread(projection: nn.Module, heads: int, parts: int) -> None:
    """Make the queries of the heads 4, 16, 64 and 256 times as large."""
    weight: Any = projection.weight
    outputs = weight.T if type(projection).__name__ == "Conv1D" else weight
    queries = outputs[: outputs.shape[0] // parts]
    for head, rows in enumerate(queries.chunk(heads)):
        rows *= 4.0 ** (head + 1)


def ids(batch: int = 3, length: int = 9) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(2))


@contextmanager
def softmax_inputs(monkeypatch: Any) -> Generator[list[Tensor]]:
    """Collect what softmax is taken of, `[B, H, T, T]`, hidden pairs hugely negative."""
    seen: list[Tensor] = []
    former = nn.functional.softmax

    def softmax(X: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if X.ndim == 4:
            seen.append(X.detach().clone())
        return former(X, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(nn.functional, "softmax", softmax)
        yield seen


def eager_logits(model: Any, batch: Tensor, monkeypatch: Any) -> list[Tensor]:
    """Return the logits of every layer of a model that computes attention by `eager`."""
    assert model.config._attn_implementation == "eager"
    with softmax_inputs(monkeypatch) as seen, torch.no_grad():
        model(input_ids=batch, use_cache=False)
    assert len(seen) == model.config.num_hidden_layers
    return seen


def counted(logits: Tensor) -> tuple[Tensor, float, float]:
    """Return the largest of every head, how many are above 100, and how many there are."""
    visible = logits > torch.finfo(logits.dtype).min / 2
    return logits.amax((0, 2, 3)), float((logits[visible] > 100).sum()), float(visible.sum())
