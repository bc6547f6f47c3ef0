from __future__ import annotations

import json
import math
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig

from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models.build import build_model, meta_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.flops import active_parameters
from muonscale.lab.models.moe.gate_scale import gate_scale
from muonscale.lab.models.presets import PRESETS
from muonscale.lab.models.presets.moonlight import llama_inner
from muonscale.lab.models.structure import ParameterCount, count_parameters

ROOT = Path(__file__).parents[3]
MOONLIGHT = ROOT / "tests" / "fixtures" / "moonlight-16b"

# What the papers say: parameters in millions, with or without embeddings and head, and how far
# ours may be from it. arXiv 2502.16982, Tables 2 and 3; 2602.21545; 2505.02222, section 3.
PUBLISHED = {
    "moonlight-16b-a3b": ("without", 15290, 0.0005),
    "moonlight-dense-545m": ("without", 545, 0.002),
    "moonlight-dense-822m": ("without", 822, 0.001),
    "moonlight-dense-1.1b": ("without", 1100, 0.05),
    "moonlight-dense-1.5b": ("without", 1500, 0.06),
    "gpt-small": ("with", 124, 0.011),
    "gpt-base": ("with", 362, 0.012),
    "gpt-large": ("with", 774, 0.001),
    "llama-60m": ("with", 58, 0.005),
    "llama-130m": ("with", 134, 0.005),
    "llama-350m": ("with", 368, 0.001),
    "llama-1b": ("with", 1339, 0.001),
    "essential-0.07b": ("with", 70, 0.06),
    "essential-0.20b": ("with", 200, 0.005),
    "essential-0.67b": ("with", 670, 0.006),
    "essential-2.40b": ("with", 2400, 0.001),
    "essential-3.67b": ("with", 3670, 0.001),
    # widths of ours, brought near to the name
    "essential-100m": ("with", 100, 0.015),
    "essential-500m": ("with", 500, 0.015),
    "essential-1b": ("with", 1000, 0.015),
    "essential-2b": ("with", 2000, 0.015),
    "essential-4b": ("with", 4000, 0.01),
}
# Hidden size, layers and tokens in billions of the ladder: arXiv 2502.16982, Table 2.
LADDER = {
    "moonlight-dense-399m": (1536, 12, 8.92),
    "moonlight-dense-545m": (1792, 14, 14.04),
    "moonlight-dense-822m": (2048, 16, 20.76),
    "moonlight-dense-1.1b": (2304, 18, 28.54),
    "moonlight-dense-1.5b": (2560, 20, 38.91),
}
GEMMAS = [name for name, preset in PRESETS.items() if preset.model_type == "gemma3_text"]


def published(name: str, **fields: object) -> PreTrainedConfig:
    """Return the configuration of a preset with the vocabulary that it has on its own."""
    section = ModelSection(preset=name, fields=fields)
    return model_config(section, vocab_size=None, sequence_length=1, bos_id=None, eos_id=None)


def size_of(name: str) -> ParameterCount:
    return count_parameters(meta_model(published(name)))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_has_the_published_number_of_parameters(name: str) -> None:
    kind, millions, tolerance = PUBLISHED[name]
    size = size_of(name)
    ours = size.total if kind == "with" else size.without_embeddings
    assert ours / 1e6 == pytest.approx(millions, rel=tolerance)


def test_moonlight_has_the_fields_of_the_published_configuration() -> None:
    tree = json.loads((MOONLIGHT / "config.json").read_text())
    tree = {k: v for k, v in tree.items() if k not in ("architectures", "torch_dtype")}
    preset = PRESETS["moonlight-16b-a3b"]
    assert {"model_type": preset.model_type, **preset.fields} == tree
    size = size_of("moonlight-16b-a3b")
    assert size.total - size.without_embeddings == 2 * 163840 * 2048
    config = published("moonlight-16b-a3b")
    active = active_parameters(config, meta_model(config))
    assert active is not None and round(active / 1e9, 2) == 2.24


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_lies_on_the_papers_law_of_compute_optimal_sizes(name: str) -> None:
    """Table 9: N = 0.0483359 C^0.5112684, C = 6 N D. It decides the feed-forward and the misprint."""
    hidden, layers, tokens = LADDER[name]
    config = published(name)
    assert (config.hidden_size, config.num_hidden_layers) == (hidden, layers)
    assert hidden // config.num_attention_heads == 128

    def off(inner: float) -> float:
        n = layers * (4 * hidden**2 + 3 * hidden * inner)
        return n / (0.0483359 * (6 * n * tokens * 1e9) ** 0.5112684) - 1

    assert abs(off(config.intermediate_size)) < 1e-3
    assert abs(off(2.6 * hidden)) > 5e-3


def test_the_feed_forward_is_llamas() -> None:
    """Llama 7B and 65B, arXiv 2302.13971: 4096 -> 11008, 8192 -> 22016."""
    assert [llama_inner(hidden) for hidden in (4096, 8192)] == [11008, 22016]
    assert [llama_inner(LADDER[name][0]) for name in LADDER] == [4096, 4864, 5632, 6144, 6912]


def test_the_ladders_counts_are_cut_off_and_one_is_misprinted() -> None:
    millions = [size_of(name).without_embeddings // 10**6 for name in LADDER]
    assert millions == [339, 545, 822, 1146, 1586]  # 399 in the table; 1.1 and 1.5 billion


@pytest.mark.parametrize("name", GEMMAS)
def test_no_layer_of_essentials_models_has_a_window(name: str) -> None:
    for layers in (None, 2):  # also where layers are cut
        config = published(name, **({} if layers is None else {"num_hidden_layers": layers}))
        assert config.layer_types == ["full_attention"] * config.num_hidden_layers
        heads = (config.num_attention_heads, config.num_key_value_heads)
        assert heads[0] == 2 * heads[1] and heads[0] * config.head_dim == config.hidden_size
        assert config.query_pre_attn_scalar == config.head_dim


def gemma_logits(**fields: object) -> torch.Tensor:
    section = ModelSection(preset="gemma-nano", fields={"num_hidden_layers": 2, **fields})
    config = model_config(section, vocab_size=64, sequence_length=32, bos_id=0, eos_id=0)
    tokens = torch.randint(64, (1, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return build_model(config, seed=0)(tokens).logits


def test_the_window_of_gemma_3_changes_nothing() -> None:
    whole = gemma_logits()
    assert torch.equal(gemma_logits(sliding_window=4), whole)
    layers = ["sliding_attention", "full_attention"]
    windowed = gemma_logits(sliding_window=4, layer_types=layers)
    assert not torch.allclose(windowed, whole)


def test_gpt2_has_no_dropout() -> None:
    for name in (name for name, preset in PRESETS.items() if preset.model_type == "gpt2"):
        config = published(name)
        assert (config.resid_pdrop, config.embd_pdrop, config.attn_pdrop) == (0, 0, 0)


def test_moonlight_nano_has_the_proportions_of_moonlight() -> None:
    nano, full = published("moonlight-nano"), published("moonlight-16b-a3b")
    for config in (nano, full):
        met = config.num_experts_per_tok + config.n_shared_experts
        assert met * config.moe_intermediate_size == config.intermediate_size
        scale = gate_scale(config.n_routed_experts, config.num_experts_per_tok)
        assert config.routed_scaling_factor == round(scale, 3)
        assert config.q_lora_rank is None and config.first_k_dense_replace == 1


def test_training_takes_the_vocabulary_of_the_tokenizer() -> None:
    section = ModelSection(preset="gpt-small")
    config = model_config(section, vocab_size=300, sequence_length=64, bos_id=0, eos_id=0)
    assert (config.vocab_size, config.bos_token_id, config.n_positions) == (300, 0, 2048)
    assert published("gpt-small").vocab_size == 50257


def test_the_table_of_the_documentation_has_every_preset() -> None:
    rows = re.findall(
        r"^\| `([^`]+)` \| ([a-z0-9_]+) \| ([\d,]+|) *\| ([\d,]+) \| ([\d,]+) \|$",
        (ROOT / "docs" / "models.md").read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert rows == [documented(name) for name in PRESETS]


def documented(name: str) -> tuple[str, ...]:
    """Return a row of the table: a total only where a vocabulary is published."""
    config = published(name)
    model = meta_model(config)
    size, active = count_parameters(model), active_parameters(config, model)
    total = f"{size.total:,}" if "vocab_size" in PRESETS[name].fields else ""
    return name, config.model_type, total, f"{size.without_embeddings:,}", f"{active:,}"


PROGRAM = """
import json
from muonscale.lab.targets import inspect
from muonscale.lab.models.presets import PRESETS
print(json.dumps({name: inspect(name).size.total for name in PRESETS}))
"""


@pytest.mark.slow
def test_all_presets_are_inspected_within_two_gigabytes() -> None:
    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))

    words = [sys.executable, "-c", PROGRAM]
    answer = subprocess.run(words, capture_output=True, text=True, preexec_fn=limits)
    assert answer.returncode == 0, answer.stderr
    totals = json.loads(answer.stdout)
    assert totals.keys() == PRESETS.keys()
    assert totals["moonlight-16b-a3b"] == 15_960_108_544


def test_a_size_says_what_is_in_it() -> None:
    """GPT-2's four matrices of a layer, by hand: 12 d^2 and their biases and norms."""
    d, layers = 768, 12
    body = layers * (12 * d * d + 13 * d) + 2 * d
    size = size_of("gpt-small")
    assert size.without_embeddings == body
    assert size.total == body + (50257 + 2048) * d
    assert math.isclose(size.total / 1e6, 125.2, abs_tol=0.05)
