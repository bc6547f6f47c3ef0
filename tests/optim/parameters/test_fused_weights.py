"""Fused projections of transformers' models, held against what their forward pass does with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale.optim.matrices.spec import MatrixSpec, unview, view
from muonscale.optim.parameters.fused_weights import FUSED
from muonscale.optim.parameters.roles import Role, assign_roles

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
OLD = {"n_embd": 32, "n_layer": 1, "n_head": 8, "vocab_size": 50}
BIG_CODE = {**OLD, "n_positions": 32}
DELTA = {
    **SIZES,
    "head_dim": 8,
    "layer_types": ["linear_attention"] * 2,
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
}


@dataclass(frozen=True)
class Attention:
    """A model whose attention has one projection for q, k and v."""

    config: str
    fields: dict[str, Any]
    fused: str
    back: str
    order: str = "qkv"
    """What its matrices are, in their order."""
    negates: bool = True
    """Whether the output is the same after q and k have both changed sign."""


def neox(**more: Any) -> dict[str, Any]:
    return {k: v for k, v in SIZES.items() if k != "num_key_value_heads"} | more


CASES = {
    "phi3": Attention("Phi3Config", SIZES, "self_attn.qkv_proj", "self_attn.o_proj"),
    "mpt": Attention(
        "MptConfig",
        {"d_model": 32, "n_heads": 8, "n_layers": 1, "vocab_size": 50, "max_seq_len": 32},
        "attn.Wqkv",
        "attn.out_proj",
    ),
    "gpt_neox": Attention("GPTNeoXConfig", neox(), "attention.query_key_value", "attention.dense"),
    "gpt_neox_japanese": Attention(
        "GPTNeoXJapaneseConfig", neox(), "attention.query_key_value", "attention.dense"
    ),
    "bloom": Attention(
        "BloomConfig",
        {"hidden_size": 32, "n_head": 8, "n_layer": 1, "vocab_size": 50},
        "self_attention.query_key_value",
        "self_attention.dense",
    ),
    "persimmon": Attention(
        "PersimmonConfig",
        neox(qk_layernorm=False),
        "self_attn.query_key_value",
        "self_attn.dense",
    ),
    "codegen": Attention(
        "CodeGenConfig",
        {**OLD, "n_positions": 32, "rotary_dim": 2},
        "attn.qkv_proj",
        "attn.out_proj",
        order="qvk",
    ),
    "big_code_mqa": Attention(
        "GPTBigCodeConfig", {**BIG_CODE, "multi_query": True}, "attn.c_attn", "attn.c_proj"
    ),
    "big_code_mha": Attention(
        "GPTBigCodeConfig", {**BIG_CODE, "multi_query": False}, "attn.c_attn", "attn.c_proj"
    ),
    "falcon_new": Attention(
        "FalconConfig",
        {**neox(), "new_decoder_architecture": True, "num_kv_heads": 2},
        "self_attention.query_key_value",
        "self_attention.dense",
    ),
    "falcon_mqa": Attention(
        "FalconConfig",
        {**neox(), "multi_query": True},
        "self_attention.query_key_value",
        "self_attention.dense",
    ),
    "falcon_mha": Attention(
        "FalconConfig",
        {**neox(), "multi_query": False},
        "self_attention.query_key_value",
        "self_attention.dense",
    ),
    "dbrx": Attention(
        "DbrxConfig",
        {
            "d_model": 32,
            "n_heads": 8,
            "n_layers": 1,
            "vocab_size": 50,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 100.0},
            "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 2, "moe_top_k": 1},
        },
        "norm_attn_norm.attn.Wqkv",
        "norm_attn_norm.attn.out_proj",
    ),
    "qwen3_5": Attention(
        "Qwen3_5TextConfig",
        DELTA,
        "linear_attn.in_proj_qkv",
        "linear_attn.out_proj",
        negates=False,
    ),
    "qwen3_next": Attention(
        "Qwen3NextConfig",
        {**DELTA, "num_experts": 4, "moe_intermediate_size": 8, "num_experts_per_tok": 1},
        "linear_attn.in_proj_qkvz",
        "linear_attn.out_proj",
        order="qkvz",
        negates=False,
    ),
}


def build(config: str, fields: dict[str, Any]) -> nn.Module:
    import transformers as hf

    torch.manual_seed(0)
    cfg = getattr(hf, config)(**fields)
    cfg._attn_implementation = "eager"
    model = hf.AutoModelForCausalLM.from_config(cfg).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model


def find(model: nn.Module, place: str) -> tuple[str, nn.Module]:
    return next((n, m) for n, m in model.named_modules() if n.endswith("." + place))


def scaled(module: nn.Module, layout: MatrixSpec, factors: list[float]) -> None:
    """Multiply each of the matrices in a projection by a number."""
    W: Any = module.weight
    with torch.no_grad():
        parts = [part * f for part, f in zip(view(W, layout), factors, strict=True)]
        W.copy_(unview(parts, layout, W.shape))


def run(model: nn.Module, back: nn.Module) -> tuple[Tensor, Tensor]:
    """Return the logits, and what the output projection was given."""
    seen: list[Tensor] = []
    handle = back.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 13).view(1, 12), use_cache=False).logits
    handle.remove()
    return logits, seen[0]


@pytest.mark.parametrize("name", CASES)
def test_the_matrices_of_a_fused_projection_are_queries_keys_and_values(name: str) -> None:
    case = CASES[name]
    expected = None
    for change in ("", "v", "q", "qk"):
        model = build(case.config, case.fields)
        found = {a.name: a for a in assign_roles(model)}
        place, fused = find(model, case.fused)
        _, back = find(model, case.back)
        assignment = found[f"{place}.weight"]
        assert assignment.role == Role.HIDDEN
        layout = assignment.matrices
        assert layout is not None and len(layout.splits) == len(case.order)
        if change == "v":
            scaled(fused, layout, [0.0 if letter == "v" else 1.0 for letter in case.order])
            assert run(model, back)[1].abs().max() == 0
            continue
        scaled(fused, layout, [-1.0 if letter in change else 1.0 for letter in case.order])
        logits, _ = run(model, back)
        expected = logits if change == "" else expected
        assert expected is not None
        if change == "q":
            assert not torch.allclose(logits, expected, atol=1e-4)
        elif case.negates:
            assert torch.allclose(logits, expected, atol=1e-4)


GATED = {
    "phi3": ("Phi3Config", SIZES, "mlp.gate_up_proj", "mlp.down_proj"),
    "glm": ("GlmConfig", {**SIZES, "head_dim": 4}, "mlp.gate_up_proj", "mlp.down_proj"),
    "glm4": ("Glm4Config", {**SIZES, "head_dim": 4}, "mlp.gate_up_proj", "mlp.down_proj"),
    "modernbert": (
        "ModernBertDecoderConfig",
        {**neox(), "cls_token_id": 1, "sep_token_id": 2, "bos_token_id": 1, "eos_token_id": 2},
        "mlp.Wi",
        "mlp.Wo",
    ),
}


@pytest.mark.parametrize("name", GATED)
def test_each_half_of_a_gated_projection_multiplies_the_other(name: str) -> None:
    config, fields, place, back_place = GATED[name]
    for half in range(2):
        model = build(config, fields)
        found = {a.name: a for a in assign_roles(model)}
        full_name, fused = find(model, place)
        _, back = find(model, back_place)
        layout = found[f"{full_name}.weight"].matrices
        assert layout == MatrixSpec(splits=(24, 24))
        scaled(fused, layout, [0.0 if i == half else 1.0 for i in range(2)])
        assert run(model, back)[1].abs().max() == 0


def test_the_classes_in_the_table_are_those_of_transformers() -> None:
    import importlib
    import pkgutil

    import transformers.models

    homes = {
        "Phi3": "phi3", "Phi4Multimodal": "phi4_multimodal", "Dbrx": "dbrx", "Mpt": "mpt",
        "ModernBertDecoder": "modernbert_decoder", "ModernBert": "modernbert",
        "GPTNeoXJapanese": "gpt_neox_japanese", "GPTNeoX": "gpt_neox", "Bloom": "bloom",
        "Persimmon": "persimmon", "MiniMaxM3VL": "minimax_m3_vl", "MiniMax": "minimax",
        "Falcon": "falcon", "GPTBigCode": "gpt_bigcode", "CodeGen": "codegen",
        "Qwen3Next": "qwen3_next", "Qwen3_5Moe": "qwen3_5_moe", "Qwen3_5": "qwen3_5",
        "Glm4": "glm4", "Glm": "glm", "GraniteMoeHybrid": "granitemoehybrid",
        "GraniteMoeShared": "granitemoeshared", "GraniteMoeSWA": "granitemoe_swa",
    }  # fmt: skip
    known = {m.name for m in pkgutil.iter_modules(transformers.models.__path__)}
    for class_name, _ in FUSED:
        home = next(homes[prefix] for prefix in homes if class_name.startswith(prefix))
        assert home in known
        module = importlib.import_module(f"transformers.models.{home}.modeling_{home}")
        assert hasattr(module, class_name), class_name


def test_a_class_of_ones_own_with_a_known_name_is_not_taken_for_it() -> None:
    class Phi3MLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_up_proj = nn.Linear(8, 8, bias=False)

    (found,) = assign_roles(Phi3MLP())
    assert found.matrices == MatrixSpec()


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_weights_hold_a_matrix_for_each_gate(
    kind: Callable[..., nn.Module], gates: int
) -> None:
    found = {a.name: a for a in assign_roles(kind(6, 5))}
    splits = (5,) * gates if gates > 1 else ()
    assert found["weight_hh_l0"].matrices == MatrixSpec(splits=splits)
    assert found["bias_hh_l0"].role == Role.NORM


def test_experts_of_dbrx_are_the_matrices_that_its_forward_pass_multiplies_by() -> None:
    case = CASES["dbrx"]
    model = build(case.config, case.fields)
    name, experts = next(
        (n, m) for n, m in model.named_modules() if type(m).__name__ == "DbrxExperts"
    )
    found = {a.name: a.matrices for a in assign_roles(model)}
    W1, V1, W2 = (
        view(experts.mlp.get_parameter(leaf), found[f"{name}.mlp.{leaf}"])[0]
        for leaf in ("w1", "v1", "w2")
    )
    assert (W1.shape, W2.shape) == ((2, 16, 32), (2, 32, 16))
    x, chosen = torch.randn(6, 32), torch.tensor([0, 1, 1, 0, 1, 0])
    expected = [
        W2[e] @ (experts.mlp.activation_fn(W1[e] @ row) * (V1[e] @ row))
        for row, e in zip(x, chosen.tolist(), strict=True)
    ]
    got = experts(x[None], chosen[:, None], torch.ones(6, 1))[0]
    torch.testing.assert_close(got, torch.stack(expected))
