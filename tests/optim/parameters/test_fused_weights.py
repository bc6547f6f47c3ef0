"""Fused projections of transformers' models, held against what their forward pass does with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, unview, view
from muonscale.optim.parameters.fused_table import BARE_MATRICES, FUSED
from muonscale.optim.parameters.fused_weights import (
    fused_name_hint,
    is_known_bare,
    looks_fused,
    stored_matrices,
)
from muonscale.optim.parameters.module_survey import ParamSite, survey
from muonscale.optim.parameters.roles import Role, assign_roles
from tests.optim.parameters import fused_cases
from tests.optim.parameters.data_flow import rows_of

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


def site(module: nn.Module, weight: Tensor) -> ParamSite:
    """Return the place of a weight in a module."""
    owners = survey(module).owners
    return next(found[0] for parameter, found in owners.items() if parameter is weight)


ENTRIES = [*FUSED, *BARE_MATRICES]
BY_HAND = {("DeepseekV4Attention", "o_a_proj"), ("XLNetRelativeAttention", "o")}
"""Entries whose product the oracle does not see, with a test of their own below."""


@pytest.mark.parametrize(("cls", "place"), [e for e in ENTRIES if e not in BY_HAND])
def test_a_row_of_the_table_is_what_the_forward_pass_does(cls: str, place: str) -> None:
    module, weight = fused_cases.weight_of(cls, place)
    layout, _ = stored_matrices(weight, site(module, weight))
    known = (FUSED | BARE_MATRICES)[cls, place]
    assert "," not in known.holds or len(layout.splits) == known.holds.count(",") + 1
    assert (layout.groups > 1) == (known.order not in ("", "stacked"))
    case = fused_cases.case_of(cls, place)
    parts, numbers = fused_cases.parts_by_data_flow(case, module, weight)
    expected = set(rows_of(view(numbers, layout)))
    if case.compare == "equal":
        assert parts == expected
        return
    small, large = (expected, parts) if case.compare == "coarser" else (parts, expected)
    homes = [[whole for whole in large if part <= whole] for part in small]
    assert all(len(home) == 1 for home in homes)
    assert len({home[0] for home in homes}) == len(large) or case.compare == "some"
    assert len(small) > 1


def test_llama_4_experts_are_transposed_and_hold_gate_and_up() -> None:
    experts, gate_up = fused_cases.weight_of("Llama4TextExperts", "gate_up_proj")
    down: Any = experts.down_proj
    found = {a.name: a.matrices for a in assign_roles(experts)}
    assert found["gate_up_proj"] == MatrixSpec(transposed=True, splits=(24, 24))
    assert found["down_proj"] == MatrixSpec(transposed=True)
    W_gate, W_up = view(gate_up, found["gate_up_proj"])
    (W_down,) = view(down, found["down_proj"])
    tokens = torch.randn(4, 5, 32)
    act: Any = experts.act_fn
    expected = [
        (act(x @ W_gate[e].T) * (x @ W_up[e].T)) @ W_down[e].T for e, x in enumerate(tokens)
    ]
    torch.testing.assert_close(experts(tokens.view(20, 32)), torch.cat(expected))


def test_kernels_of_xlnet_are_one_matrix_each_and_not_one_for_each_input() -> None:
    attention, o = fused_cases.weight_of("XLNetRelativeAttention", "o")
    layouts = {
        name: stored_matrices(attention.get_parameter(name), site(attention, weight))[0]
        for name, weight in attention.named_parameters() if name in ("q", "k", "v", "r", "o")
    }  # fmt: skip
    inward = MatrixSpec(flattened=True, transposed=True)
    assert layouts == dict.fromkeys("qkvr", inward) | {"o": MatrixSpec(flattened=True)}
    heads, h = torch.randn(7, 2, 4, 8), torch.zeros(7, 2, 32)
    post: Any = attention.post_attention
    got = post(h, heads, residual=False)
    expected = F.layer_norm(heads.flatten(2) @ view(o, layouts["o"])[0][0].T, (32,))
    norm: Any = attention.layer_norm
    torch.testing.assert_close(got, expected * norm.weight + norm.bias)


def test_the_output_projection_of_deepseek_v4_is_a_matrix_for_each_group_of_heads() -> None:
    attention, weight = fused_cases.weight_of("DeepseekV4Attention", "o_a_proj")
    layout, _ = stored_matrices(weight, site(attention, weight))
    (groups,) = view(weight, layout)
    assert groups.shape == (2, 8, 32)
    x = torch.randn(3, 2, 32)
    project: Any = attention.o_a_proj
    torch.testing.assert_close(project(x), torch.einsum("tgi,goi->tgo", x, groups))


def test_cross_attention_of_gpt_bigcode_holds_keys_and_values_alone() -> None:
    import transformers

    config = transformers.GPTBigCodeConfig(**BIG_CODE, multi_query=False, add_cross_attention=True)
    with torch.device("meta"):
        model = transformers.GPTBigCodeForCausalLM(config)
    found = {a.name: a.matrices for a in assign_roles(model)}
    cross = found["transformer.h.0.crossattention.c_attn.weight"]
    assert cross == MatrixSpec(splits=(32, 32))
    own = found["transformer.h.0.attn.c_attn.weight"]
    assert own == MatrixSpec(splits=(32, 32, 32), groups=8)


def test_a_layer_with_a_name_that_speaks_is_in_the_table() -> None:
    """Of all linear layers of the transformers that is installed."""
    import transformers

    unknown = []
    for path in sorted(Path(transformers.__file__).parent.glob("models/*/modeling_*.py")):
        classes = re.split(r"^ *class (\w+)", path.read_text("utf-8"), flags=re.M)
        for cls, text in zip(classes[1::2], classes[2::2], strict=True):
            named = set(re.findall(r"self\.(\w+) = [\w.]*(?:Linear|Conv1D)\(", text))
            unknown += [
                (cls, name) for name in sorted(named)
                if fused_name_hint(name) and (cls, name) not in FUSED and "split_size" not in text
            ]  # fmt: skip
    assert not unknown


class Block(nn.Module):
    """Layers of a class that nobody knows."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def reasons(**layers: nn.Module) -> dict[str, str]:
    block = nn.ModuleDict({"layer": Block(**layers)})
    return {
        name.removeprefix("layer.").removesuffix(".weight"): looks_fused(p, site(block, p))
        for name, p in block.named_parameters() if p.ndim == 2
    }  # fmt: skip


def test_a_name_that_speaks_is_said() -> None:
    found = reasons(
        Wqkv=nn.Linear(8, 20), kv=nn.Linear(8, 16), to_kv=nn.Linear(8, 16), attn_c_attn=nn.Linear(8, 8),
        adaLN_modulation=nn.Sequential(nn.SiLU(), nn.Linear(8, 16)), mlp_gate_up=nn.Linear(8, 16),
        Wi=nn.Linear(8, 16), w12=nn.Linear(8, 16), query_key_value=nn.Linear(8, 9),
    )  # fmt: skip
    words = {
        "Wqkv": "wqkv", "kv": "kv", "to_kv": "kv", "attn_c_attn": "c_attn",
        "adaLN_modulation.1": "adaln", "mlp_gate_up": "gate_up", "Wi": "Wi", "w12": "w12",
        "query_key_value": "query_key_value",
    }  # fmt: skip
    assert found == {
        name: f"its name contains {word}, so it may hold several" for name, word in words.items()
    }


def test_a_name_that_only_contains_such_a_word_is_not_said() -> None:
    names = (
        "wi",
        "wide",
        "kv_a_proj_with_mqa",
        "kv_b_proj",
        "wkv_a",
        "main_project",
        "begin_projection",
        "unpacked",
    )
    assert not any(reasons(**{name: nn.Linear(8, 8) for name in names}).values())


def test_three_or_six_times_as_many_rows_are_said_unless_a_layer_beside_takes_them() -> None:
    assert reasons(first=nn.Linear(8, 24), back=nn.Linear(8, 8)) == {
        "first": "its 24 rows are 3 times its columns, so it may hold several",
        "back": "",
    }
    assert reasons(shifts=nn.Linear(8, 48))["shifts"].startswith("its 48 rows are 6 times")
    assert not any(reasons(up=nn.Linear(8, 24), down=nn.Linear(24, 8)).values())
    assert not any(reasons(up=nn.Linear(8, 16), wider=nn.Linear(8, 32)).values())
    assert not any(reasons(lora_B=nn.Linear(8, 24)).values())


def test_nothing_is_said_of_what_is_known() -> None:
    import transformers

    model = build("Phi3Config", SIZES)
    assert not any(looks_fused(p, found[0]) for p, found in survey(model).owners.items())
    small = transformers.GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=9)
    gpt = transformers.GPT2Model(small)
    assert not any(looks_fused(p, found[0]) for p, found in survey(gpt).owners.items())
    zeta, weight = fused_cases.weight_of("BarkMLP", "in_proj")
    assert stored_matrices(weight, site(zeta, weight)) == (PLAIN, "")
    assert looks_fused(weight, site(zeta, weight)) == ""


def test_a_layer_in_a_wrapped_module_is_found_in_the_table() -> None:
    attention, weight = fused_cases.weight_of("LevitAttention", "queries_keys_values.linear")
    expected = stored_matrices(weight, site(attention, weight))
    attention.queries_keys_values = torch.compile(attention.queries_keys_values)
    assert expected[0].groups == 4
    assert stored_matrices(weight, site(attention, weight)) == expected


def test_a_bare_parameter_of_the_table_is_known() -> None:
    attention, q = fused_cases.weight_of("XLNetRelativeAttention", "q")
    assert is_known_bare(site(attention, q))
    assert not is_known_bare(site(attention, attention.get_parameter("r_w_bias")))


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
