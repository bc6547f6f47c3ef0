"""Models and arrangements for the tests of costs."""

from __future__ import annotations

import json
from pathlib import Path

from muonscale.lab.estimate.resolve import PlanRequest, ResolvedPlan, resolve

MOONLIGHT = Path(__file__).parents[2] / "fixtures" / "moonlight-16b"

SMALL = ["data.sequence_length=32", "train.steps=3", "train.batch_tokens=768"]
"""24 sequences."""


def planned(
    layout: str, *overrides: str, target: str = "llama-pico", device: str = "h100"
) -> ResolvedPlan:
    """Return a small model on an arrangement, in float32."""
    words = [*SMALL, "train.precision=float32", *overrides]
    return resolve(PlanRequest(target=target, overrides=words, layout=layout, device=device))


def small_mixture(folder: Path) -> str:
    """Write a small DeepSeek-V3 with 8 experts, 2 for a token, and a dense first layer of three."""
    tree = json.loads((MOONLIGHT / "config.json").read_text())
    tree |= {
        "vocab_size": 128, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 64,
        "moe_intermediate_size": 24, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "n_shared_experts": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 16,
        "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 0,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(tree))
    return str(folder)
