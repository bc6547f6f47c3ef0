"""After a clip the logits of every head are gamma times as large, rotary positions and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from muonscale.errors import ConfigError
from muonscale.lab.models.query_key import CLIPS, query_key_clips
from muonscale.optim.diagnostics.qk_clip import clip_factors
from tests.lab.models.logits import CONFIGS, build, eager_logits, ids

CLIPPED = [kind for kind in CONFIGS if kind not in ("gemma3", "qwen3")]


@pytest.mark.parametrize("alpha", [0.5, 0.2])
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", CLIPPED)
def test_logits_are_gamma_times_as_large(
    kind: str, layer: int, alpha: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(kind, "eager")
    before = eager_logits(model, ids(), monkeypatch)
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    gamma = clip_factors(before[layer].amax((0, 2, 3)), 10.0)
    assert 0 < int((gamma < 1).sum()) < 4 or gamma.unique().numel() > 1
    query_key_clips(model)[layer](gamma, alpha, None)
    after = eager_logits(model, ids(), monkeypatch)
    visible = before[layer] > torch.finfo(torch.float64).min / 2
    expected = before[layer] * gamma[:, None, None]
    torch.testing.assert_close(after[layer][visible], expected[visible], rtol=1e-9, atol=1e-9)
    largest = after[layer].amax((0, 2, 3))
    torch.testing.assert_close(largest[gamma < 1], torch.full_like(largest[gamma < 1], 10.0))
    touched = {
        n.rpartition(".")[0].rpartition(".")[2]
        for n, p in model.named_parameters()
        if not torch.equal(p, values[n])
    }
    assert touched <= {"q_proj", "k_proj", "c_attn", "q_b_proj", "kv_b_proj"}


def test_the_table_is_tested() -> None:
    tested = {
        type(module).__name__
        for kind in CLIPPED
        for module in build(kind).modules()
        if hasattr(module, "is_causal")
    }
    assert tested == set(CLIPS)


def test_values_stay_as_they_are() -> None:
    gamma = torch.full((4,), 0.25, dtype=torch.float64)
    gpt2, latent = build("gpt2"), build("deepseek_v3")
    before: dict[str, Any] = {
        "gpt2": gpt2.transformer.h[0].attn.c_attn.weight[:, 32:].clone(),
        "latent": latent.model.layers[0].self_attn.kv_b_proj.weight.view(4, 14, 8)[:, 6:].clone(),
    }
    for model in (gpt2, latent):
        query_key_clips(model)[0](gamma, 0.5, None)
    assert torch.equal(gpt2.transformer.h[0].attn.c_attn.weight[:, 32:], before["gpt2"])
    now = latent.model.layers[0].self_attn.kv_b_proj.weight.view(4, 14, 8)
    assert torch.equal(now[:, 6:], before["latent"])


@pytest.mark.parametrize(("kind", "norm"), [("gemma3", "q_norm"), ("qwen3", "q_norm")])
def test_models_that_normalize_queries_are_refused(kind: str, norm: str) -> None:
    with pytest.raises(ConfigError, match=rf"normalizes queries or keys .*\.{norm}\).*null"):
        query_key_clips(build(kind))


def test_attention_that_is_not_known_is_refused() -> None:
    config = hf.PhiConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=50,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match=r"PhiAttention of model_type 'phi'"):
        query_key_clips(model)
