"""Folded factors against the same factors written into the forward pass, over a training of both."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from muonscale import Muon, parameter_groups, parametrize

LR, DECAY, EPS = 0.01, 0.4, 1e-3  # eps of the size of gradients, and decay that shows
STEPS, VOCABULARY = 15, 64
IDS = torch.randint(VOCABULARY, (32, 16), generator=torch.Generator().manual_seed(1))  # full rank
# Muon enlarges the rounding differences of a Gemma's nearly singular gradients; nothing here needs it.
ADAMW: dict[str, Any] = {"rule": "adamw"}
Given = dict[str, tuple[float, float, float]]
"""From a parameter to lr, weight decay and eps of the explicit model."""


def gpt2(width: int, layers: int = 2, heads: int = 2) -> nn.Module:
    shape = {"n_embd": width, "n_head": heads, "n_layer": layers, "n_positions": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**shape, **drop, **ends, vocab_size=VOCABULARY)
    return AutoModelForCausalLM.from_config(config)


def llama(width: int, *, tied: bool, heads: int) -> nn.Module:
    config = LlamaConfig(
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
    )
    return AutoModelForCausalLM.from_config(config)


def gemma3(width: int, head_dim: int = 8) -> nn.Module:
    config = Gemma3TextConfig(
        hidden_size=width,
        num_attention_heads=width // 8,
        num_key_value_heads=width // 16,
        head_dim=head_dim,
        query_pre_attn_scalar=8,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        vocab_size=VOCABULARY,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return AutoModelForCausalLM.from_config(config)


def losses(model: nn.Module, groups: list) -> list[float]:
    optimizer = Muon(groups, scale="rms", eps=EPS)
    found = []
    for _ in range(STEPS):
        logits = model(IDS).logits[:, :-1].flatten(0, 1)
        loss = nn.functional.cross_entropy(logits, IDS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


def times(factor: float) -> Callable:
    return lambda module, given, output: output * factor


def trained_both(
    wide: nn.Module,
    narrow: nn.Module,
    unfold: Callable[[nn.Module], None],
    given: Given,
    depth: str = "none",
    **routing: Any,
) -> tuple[nn.Module, nn.Module]:
    """Train a model as transfer has it, and one whose weights and forward pass `unfold` has changed.

    The explicit model's groups are those of transfer but for the parameters in `given`.
    """
    options = {"lr": LR, "weight_decay": DECAY, **routing}
    explicit = copy.deepcopy(wide)
    groups = parameter_groups(wide, **options)
    transfer = parametrize(wide, narrow, groups, depth=depth, defaults={"eps": EPS})
    for model in (wide, explicit):
        transfer.scale_weights_(model)
    unfold(explicit)
    assert set(given) <= set(transfer.rows)
    other = []
    for group in transfer.groups(parameter_groups(explicit, **options)):
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            own = {**group, "name": name, "params": [parameter], "param_names": [name]}
            if name in given:
                lr, decay, eps = given[name]
                own |= {"lr": LR * lr, "weight_decay": decay, "eps": EPS * eps}
            other.append(own)
    found, expected = losses(wide, transfer.groups(groups)), losses(explicit, other)
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < 0.9 * expected[0]
    return wide, explicit


def test_a_tied_gpt2_is_one_whose_logits_are_divided() -> None:
    torch.manual_seed(0)
    m = 3.0

    def unfold(model: nn.Module) -> None:
        model.lm_head.register_forward_hook(times(1 / m))
        with torch.no_grad():
            model.transformer.ln_f.weight.fill_(1.0)  # as it is drawn

    norms = {f"transformer.ln_f.{name}": (1.0, DECAY, 1 / m) for name in ("weight", "bias")}
    wide, explicit = trained_both(gpt2(48, heads=6), gpt2(16), unfold, norms)
    gains = (model.transformer.ln_f.weight.detach() for model in (wide, explicit))
    torch.testing.assert_close(next(gains) * m, next(gains), rtol=2e-4, atol=2e-5)


def test_a_tied_llama_is_one_whose_logits_are_divided() -> None:
    torch.manual_seed(0)

    def unfold(model: nn.Module) -> None:
        model.lm_head.register_forward_hook(times(1 / 2))
        with torch.no_grad():
            model.model.norm.weight.fill_(1.0)

    narrow = llama(16, tied=True, heads=2)
    trained_both(
        llama(32, tied=True, heads=4), narrow, unfold, {"model.norm.weight": (1, DECAY, 1 / 2)}
    )


def test_a_tied_gemma_is_one_whose_embedding_is_multiplied_by_a_constant() -> None:
    """And its logits divided: by m, of which half the power is in the smaller table already."""
    torch.manual_seed(0)
    m, base_width = 2, 16

    def unfold(model: nn.Module) -> None:
        embedding = model.model.embed_tokens
        embedding.embed_scale.fill_(math.sqrt(base_width))
        model.lm_head.register_forward_hook(times(1 / m))
        with torch.no_grad():
            embedding.weight.mul_(math.sqrt(m))  # as it is drawn
            model.model.norm.weight.zero_()

    given = {
        "model.embed_tokens.weight": (1.0, DECAY, 1 / m),
        "model.norm.weight": (1.0, 0.0, 1 / m),
    }
    undecayed = {"model.norm.weight": {"weight_decay": 0.0}}
    trained_both(gemma3(32), gemma3(16), unfold, given, **ADAMW, overrides=undecayed)


def test_longer_heads_are_scores_divided_by_their_length() -> None:
    torch.manual_seed(0)
    size, base_size = 16, 4

    def unfold(model: nn.Module) -> None:
        for layer in model.model.layers:
            layer.self_attn.scaling = math.sqrt(base_size) / size
            with torch.no_grad():
                layer.self_attn.q_proj.weight.mul_(math.sqrt(size / base_size))

    # scale=rms, four times as wide: lr by 1/2, the decay of a step as it was
    queries = {f"model.layers.{i}.self_attn.q_proj.weight": (1 / 2, 2 * DECAY, 1.0) for i in (0, 1)}
    wide, narrow = llama(32, tied=False, heads=2), llama(8, tied=False, heads=2)
    trained_both(wide, narrow, unfold, queries)


def test_longer_heads_whose_queries_are_normalized() -> None:
    torch.manual_seed(0)

    def unfold(model: nn.Module) -> None:
        for layer in model.model.layers:  # scaling has a constant root: all of 1/2 was missing
            layer.self_attn.scaling = 8**-0.5 / 2
            with torch.no_grad():
                layer.self_attn.q_norm.weight.zero_()

    name = "model.layers.{}.self_attn.q_norm.weight"
    given = {name.format(i): (1.0, 0.0, 1 / 2) for i in (0, 1)}
    undecayed = {"*.q_norm.weight": {"weight_decay": 0.0}}
    trained_both(gemma3(16, 16), gemma3(16, 8), unfold, given, **ADAMW, overrides=undecayed)


def test_complete_p_is_branches_divided_by_the_layers() -> None:
    torch.manual_seed(0)

    def unfold(model: nn.Module) -> None:
        for layer in model.transformer.h:
            for end in (layer.attn.c_proj, layer.mlp.c_proj):
                end.register_forward_hook(times(1 / 2))
                with torch.no_grad():
                    end.weight.mul_(2)

    given = {}
    for layer in range(4):
        for end in ("attn", "mlp"):
            name = f"transformer.h.{layer}.{end}.c_proj"
            given[f"{name}.weight"] = (1.0, DECAY, 1.0)
            given[f"{name}.bias"] = (1.0, DECAY, 1 / 2)  # 1 of the width, 1/layers of the depth
    wide, narrow = gpt2(16, layers=4), gpt2(16, layers=2)
    drawn, base = (
        model.transformer.h[0].mlp.c_proj.weight.std().item() for model in (wide, narrow)
    )
    _, explicit = trained_both(wide, narrow, unfold, given, depth="complete_p")
    assert drawn / base == pytest.approx(0.5**0.5, rel=0.1)  # which the multiplier has to undo
    assert explicit is not wide


def test_complete_p_draws_branches_as_the_base_does() -> None:
    torch.manual_seed(0)
    wide, narrow = gpt2(32, layers=8), gpt2(32, layers=2)
    groups = parameter_groups(wide, lr=LR)
    parametrize(wide, narrow, groups, depth="complete_p").scale_weights_(wide)
    drawn, base = (
        model.transformer.h[0].mlp.c_proj.weight.std().item() for model in (wide, narrow)
    )
    assert drawn / base == pytest.approx(1 / 4, rel=0.05)
