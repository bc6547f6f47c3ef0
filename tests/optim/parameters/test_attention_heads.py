"""Attention divided by head, held against the forward pass and against heads stored apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from muonscale.errors import ConfigError, GroupingError
from muonscale.optim.hf_trainer import MuonFactory
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, unview, view
from muonscale.optim.muon import Muon
from muonscale.optim.parameters.attention_heads import NOT_DIVIDED
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.optim.parameters.report import GroupingRow, grouping_report

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ALL_HEADS = {**SIZES, "num_key_value_heads": 8}
NO_GROUPS = {k: v for k, v in SIZES.items() if k != "num_key_value_heads"}
LATENT = {
    **ALL_HEADS,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "first_k_dense_replace": 0,
}


def build(config: str, fields: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    config_of = getattr(transformers, config)(**fields)
    model = transformers.AutoModelForCausalLM.from_config(config_of, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return model.eval()


Slices = list[Tensor]


def rows(*ranges: tuple[int, int]) -> Callable[[Tensor], Slices]:
    return lambda W: [W[a:b] for a, b in ranges]


def columns(*ranges: tuple[int, int]) -> Callable[[Tensor], Slices]:
    return lambda W: [W[:, a:b] for a, b in ranges]


def blocks(size: int, number: int, start: int = 0, step: int = 0) -> list[tuple[int, int]]:
    step = step or size
    return [(start + i * step, start + i * step + size) for i in range(number)]


@dataclass(frozen=True)
class Case:
    """A model, and the blocks of its attention weights that are heads, as its forward code has them."""

    config: str
    fields: dict[str, Any]
    heads: dict[str, Callable[[Tensor], Slices]]
    """By what a parameter's name ends with."""


CASES = {
    "llama, grouped-query": Case(
        "LlamaConfig",
        SIZES,
        {
            "q_proj.weight": rows(*blocks(4, 8)),
            "k_proj.weight": rows(*blocks(4, 2)),
            "v_proj.weight": rows(*blocks(4, 2)),
            "o_proj.weight": columns(*blocks(4, 8)),
        },
    ),
    "gpt_neox, every head in turn": Case(
        "GPTNeoXConfig",
        NO_GROUPS,
        {
            "query_key_value.weight": rows(
                *blocks(4, 8, 0, 12), *blocks(4, 8, 4, 12), *blocks(4, 8, 8, 12)
            ),
            "attention.dense.weight": columns(*blocks(4, 8)),
        },
    ),
    "phi3, stacked": Case(
        "Phi3Config",
        SIZES,
        {
            "qkv_proj.weight": rows(*blocks(4, 8), *blocks(4, 2, 32), *blocks(4, 2, 40)),
            "o_proj.weight": columns(*blocks(4, 8)),
        },
    ),
    "deepseek_v3, latent": Case(
        "DeepseekV3Config",
        LATENT,
        {
            "q_b_proj.weight": rows(*blocks(10, 8)),
            "kv_b_proj.weight": rows(*blocks(6, 8, 0, 11), *blocks(5, 8, 6, 11)),
            "o_proj.weight": columns(*blocks(5, 8)),
        },
    ),
    "deepseek_v3, latent without a latent query": Case(
        "DeepseekV3Config",
        {**LATENT, "q_lora_rank": None},
        {
            "q_proj.weight": rows(*blocks(10, 8)),
            "kv_b_proj.weight": rows(*blocks(6, 8, 0, 11), *blocks(5, 8, 6, 11)),
            "o_proj.weight": columns(*blocks(5, 8)),
        },
    ),
    "gpt2, Conv1D": Case(
        "GPT2Config",
        {"n_embd": 32, "n_layer": 1, "n_head": 8, "vocab_size": 50, "n_positions": 32},
        {
            "c_attn.weight": columns(*blocks(4, 24)),
            "attn.c_proj.weight": rows(*blocks(4, 8)),
        },
    ),
    "falcon, groups of queries": Case(
        "FalconConfig",
        {**NO_GROUPS, "new_decoder_architecture": True, "num_kv_heads": 2},
        {
            "query_key_value.weight": rows(
                *blocks(4, 4), *blocks(4, 4, 24), (16, 20), (40, 44), (20, 24), (44, 48)
            ),
            "self_attention.dense.weight": columns(*blocks(4, 8)),
        },
    ),
    "bert, output beside": Case(
        "BertConfig",
        {**NO_GROUPS, "is_decoder": True},
        {
            "self.query.weight": rows(*blocks(4, 8)),
            "self.key.weight": rows(*blocks(4, 8)),
            "self.value.weight": rows(*blocks(4, 8)),
            "attention.output.dense.weight": columns(*blocks(4, 8)),
        },
    ),
}


def trained(model: nn.Module, steps: int = 2, **options: Any) -> tuple[Muon, dict[str, Tensor]]:
    """Return the optimizer after some steps on random gradients, and these by name and step."""
    optimizer = Muon(model, lr=0.1, weight_decay=0.3, **options)
    generator = torch.Generator().manual_seed(1)
    gradients = {
        name: torch.randn(steps, *p.shape, generator=generator)
        for name, p in model.named_parameters()
    }
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradients[name][step]
        optimizer.step()
    return optimizer, gradients


def apart(
    before: Tensor, gradients: Tensor, cut: Callable[[Tensor], Slices], **options: Any
) -> Slices:
    """Return what Muon makes of the blocks of a weight when each is a parameter."""
    parts = [nn.Parameter(part.clone()) for part in cut(before)]
    optimizer = Muon(parts, lr=0.1, weight_decay=0.3, **options)
    for gradient in gradients:
        for part, G in zip(parts, cut(gradient), strict=True):
            part.grad = G.clone()
        optimizer.step()
    return [part.detach() for part in parts]


@pytest.mark.parametrize("options", [{}, {"scale": "spectral", "post_norm": "col_row"}])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_that_of_the_heads_stored_apart(case: str, options: dict[str, Any]) -> None:
    model = build(CASES[case].config, CASES[case].fields)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer, gradients = trained(model, heads="auto", **options)
    after = dict(model.named_parameters())
    met = set()
    for group in optimizer.param_groups:
        for name in group["param_names"] if group["role"] == "hidden" else ():
            ends = [end for end in CASES[case].heads if name.endswith(end)]
            met |= set(ends)
            if not ends and group["matrices"][name] == PLAIN and after[name].ndim == 2:
                (whole,) = apart(before[name], gradients[name], lambda W: [W], **options)
                torch.testing.assert_close(after[name].detach(), whole, rtol=1e-4, atol=1e-5)
            for end in ends:
                cut = CASES[case].heads[end]
                if "Conv1D" in group["why"][name]:  # stored (in, out)
                    cut = _transposed(cut)
                expected = apart(before[name], gradients[name], cut, **options)
                for own, other in zip(cut(after[name].detach()), expected, strict=True):
                    torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)
    assert met == set(CASES[case].heads)


def _transposed(cut: Callable[[Tensor], Slices]) -> Callable[[Tensor], Slices]:
    return lambda W: [part.T for part in cut(W)]


def matrices_of(model: nn.Module, **options: Any) -> dict[str, MatrixSpec]:
    found: dict[str, MatrixSpec] = {}
    for group in parameter_groups(model, **options):
        found |= group["matrices"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_scaling_a_head_and_its_partners_back_changes_no_logit(case: str) -> None:
    """The heads of q and k, and of v and o, belong together in the forward pass itself."""
    model = build(CASES[case].config, CASES[case].fields)
    specs = matrices_of(model, heads="auto")
    parameters = dict(model.named_parameters())
    parts: dict[str, tuple[Tensor, MatrixSpec, int]] = {}
    for name, spec in specs.items():
        place = name.split(".")[-2]
        if spec.heads == 1:
            continue
        for index, kind in enumerate(_kinds(place, len(spec.splits))):
            parts[kind] = parameters[name], spec, index
    tokens = torch.arange(1, 13).view(1, 12)
    with torch.no_grad():
        expected = model(tokens).logits
        for one, other in (("q", "k"), ("v", "o")):
            numbers = {kind: _number_of(*parts[kind]) for kind in (one, other)}
            shared = min(numbers.values())
            nope = CASES[case].fields.get("qk_nope_head_dim")
            _scale(parts[one], 0, numbers[one] // shared, 2.0, nope if one == "q" else None)
            unscaled = model(tokens).logits
            assert not torch.allclose(unscaled, expected, rtol=1e-3, atol=1e-3)
            _scale(parts[other], 0, numbers[other] // shared, 0.5, None)
            torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-3, atol=1e-3)


def _kinds(place: str, splits: int) -> str:
    if place == "kv_b_proj":
        return "kv"
    if splits == 3:
        return "qkv"
    names = {"q_proj": "q", "q_b_proj": "q", "query": "q", "k_proj": "k", "key": "k"}
    return (names | {"v_proj": "v", "value": "v"}).get(place, "o")


def _number_of(weight: Tensor, spec: MatrixSpec, index: int) -> int:
    return len(view(weight, spec)[index])


def _scale(
    part: tuple[Tensor, MatrixSpec, int], first: int, count: int, factor: float, top: int | None
) -> None:
    """Scale some heads of a weight, or their first rows."""
    weight, spec, index = part
    batches = [batch.clone() for batch in view(weight, spec)]
    batches[index][first : first + count, :top] *= factor
    weight.copy_(unview(batches, spec, weight.shape))


@pytest.mark.parametrize("kdim", [16, 12], ids=["one weight", "apart"])
def test_torchs_attention_is_divided(kdim: int) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, kdim=kdim, vdim=kdim, bias=False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, gradients = trained(model, heads="auto")
    assert len(before) == (2 if kdim == 16 else 4)
    for name, parameter in model.named_parameters():
        cut = rows(*blocks(4, len(parameter) // 4))
        if name == "out_proj.weight":
            cut = columns(*blocks(4, 4))
        expected = apart(before[name], gradients[name], cut)
        for own, other in zip(cut(parameter.detach()), expected, strict=True):
            torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-5)


def report(model: nn.Module, **options: Any) -> dict[str, GroupingRow]:
    groups = parameter_groups(model, **options)
    return {row.name: row for row in grouping_report(groups, model).rows}


def on_meta(config: str, fields: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        config_of = getattr(transformers, config)(**fields)
        return transformers.AutoModelForCausalLM.from_config(config_of)


DELTA = {
    **SIZES,
    "head_dim": 8,
    "layer_types": ["linear_attention"],
    "linear_num_value_heads": 8,
    "linear_num_key_heads": 4,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 6,
}


def test_a_delta_net_has_heads_of_keys_and_of_values() -> None:
    rows_of = report(on_meta("Qwen3_5TextConfig", DELTA), heads="auto")
    holds = {name.split("layers.0.")[-1]: row.holds for name, row in rows_of.items()}
    assert holds["linear_attn.in_proj_qkv.weight"] == ((4, 4, 32), (4, 4, 32), (8, 6, 32))
    assert holds["linear_attn.out_proj.weight"] == ((8, 32, 6),)
    assert holds["linear_attn.in_proj_a.weight"] == ((1, 8, 32),)


GLM_5 = ("GlmMoeDsaConfig", {**LATENT, "index_n_heads": 2, "index_head_dim": 8, "index_topk": 4})


@pytest.mark.parametrize("config", [GLM_5, ("DeepseekV4Config", {"num_hidden_layers": 4})])
def test_the_indexer_of_sparse_attention_stays_whole(config: tuple[str, dict[str, Any]]) -> None:
    rows_of = report(on_meta(*config), heads="auto")
    indexers = [row for name, row in rows_of.items() if ".indexer." in name and row.holds]
    assert any(row.name.split(".")[-2] in ("wq_b", "q_b_proj") for row in indexers)
    whole = report(on_meta(*config))
    assert all(row.holds == whole[row.name].holds for row in indexers)
    assert not any(NOT_DIVIDED in row.why for row in indexers)


def test_glm_5_has_a_matrix_for_each_head_of_its_up_projections() -> None:
    rows_of = report(on_meta(*GLM_5), heads="auto")
    ups = [row for name, row in rows_of.items() if name.endswith("kv_b_proj.weight")]
    assert all(row.holds == ((8, 6, 16), (8, 5, 16)) for row in ups)


class Own(nn.Module):
    """Attention of one's own, with the number of heads only."""

    def __init__(self, **more: int) -> None:
        super().__init__()
        vars(self).update(more)
        self.wq, self.wk = nn.Linear(16, 16, bias=False), nn.Linear(16, 8, bias=False)
        self.wv, self.wo = nn.Linear(16, 8, bias=False), nn.Linear(16, 16, bias=False)


class Fused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n_head = 4
        self.c_attn, self.c_proj = nn.Linear(16, 32, bias=False), nn.Linear(16, 16, bias=False)


def test_a_class_of_ones_own_is_read_by_the_number_of_its_heads() -> None:
    found = report(nn.ModuleDict({"attn": Own(n_heads=4)}), heads="auto")
    holds = {name.split(".")[1]: row.holds for name, row in found.items()}
    assert holds == {
        "wq": ((4, 4, 16),),
        "wk": ((2, 4, 16),),
        "wv": ((2, 4, 16),),
        "wo": ((4, 16, 4),),
    }


def test_values_may_be_wider_than_queries() -> None:
    model = nn.ModuleDict({"attn": Own(n_heads=4)})
    attn = model["attn"]
    attn.wk, attn.wv = nn.Linear(16, 16, bias=False), nn.Linear(16, 24, bias=False)
    attn.wo = nn.Linear(24, 16, bias=False)
    found = report(model, heads="auto")
    assert found["attn.wv.weight"].holds == ((4, 6, 16),)
    assert found["attn.wo.weight"].holds == ((4, 16, 6),)


@pytest.mark.parametrize(
    "sizes", [{}, {"n_heads": 3}, {"head_dim": 5}, {"n_heads": 8, "head_dim": 4}]
)
def test_heads_that_are_not_found_leave_the_weight_whole_and_it_is_said(
    sizes: dict[str, int],
) -> None:
    model = nn.ModuleDict({"attn": Own(**sizes)})
    with pytest.warns(UserWarning, match=r"attn\.w.*heads not found"):
        found = report(model, heads="auto")
    query = found["attn.wq.weight"]
    assert query.holds == ((1, 16, 16),)
    assert NOT_DIVIDED in query.why
    with pytest.raises(GroupingError, match=r"attn\.wq\.weight"):
        parameter_groups(model, overrides={"attn.*": {"heads": "auto"}})


def test_a_fused_projection_needs_its_splits() -> None:
    model = nn.ModuleDict({"attn": Fused()})
    splits = {"attn.c_attn.weight": {"matrices": {"splits": [16, 8, 8]}}}
    with pytest.warns(UserWarning, match=r"attn\.c_attn\.weight.*splits"):
        assert report(model, heads="auto")["attn.c_attn.weight"].matrices == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = report(model, heads="auto", overrides=splits)
    assert found["attn.c_attn.weight"].holds == ((4, 4, 16), (2, 4, 16), (2, 4, 16))
    assert found["attn.c_proj.weight"].holds == ((4, 16, 4),)
    inside = {"attn.c_attn.weight": {"matrices": {"splits": [16, 8, 8], "heads": "auto"}}}
    alone = report(model, overrides=inside)
    assert alone["attn.c_attn.weight"].holds == found["attn.c_attn.weight"].holds
    assert alone["attn.c_proj.weight"].matrices == 1


def test_an_override_chooses_what_is_divided() -> None:
    model = on_meta("LlamaConfig", SIZES)
    some = report(model, overrides={"*.q_proj.weight": {"heads": "auto"}})
    numbers = {n.split(".")[-2]: row.matrices for n, row in some.items() if "self_attn" in n}
    assert numbers == {"q_proj": 8, "k_proj": 1, "v_proj": 1, "o_proj": 1}
    without = report(model, heads="auto", overrides={"*.o_proj.weight": {"heads": "whole"}})
    numbers = {n.split(".")[-2]: row.matrices for n, row in without.items() if "self_attn" in n}
    assert numbers == {"q_proj": 8, "k_proj": 2, "v_proj": 2, "o_proj": 1}
    by_number = {"*.q_proj.weight": {"matrices": {"heads": 2}}}
    given = report(model, heads="auto", overrides=by_number)
    assert given["model.layers.0.self_attn.q_proj.weight"].holds == ((2, 16, 32),)
    by_role = report(model, overrides={"hidden": {"heads": "auto"}})
    whole = report(model, heads="auto")
    assert {n: r.holds for n, r in by_role.items()} == {n: r.holds for n, r in whole.items()}


def test_an_override_that_matches_no_attention_is_refused() -> None:
    model = on_meta("LlamaConfig", SIZES)
    with pytest.raises(GroupingError, match=r"mlp.*down_proj|mlp.*gate_proj"):
        parameter_groups(model, overrides={"*.mlp.*": {"heads": "auto"}})


def test_a_model_without_attention_says_so() -> None:
    with pytest.warns(UserWarning, match="divides none"):
        parameter_groups(nn.Sequential(nn.Linear(4, 4)), heads="auto")


def test_whole_is_the_default_and_changes_nothing() -> None:
    model = on_meta("DeepseekV3Config", LATENT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert matrices_of(model) == matrices_of(model, heads="whole")
        assert matrices_of(model, rule="adamw", heads="auto") == matrices_of(model)


@pytest.mark.parametrize("make", [Muon, parameter_groups, MuonFactory()])
def test_other_words_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError, match=r"heads.*8"):
        make(on_meta("LlamaConfig", SIZES), heads=8)
    with pytest.raises(ConfigError, match="heads='auto'"):
        Muon(parameter_groups(on_meta("LlamaConfig", SIZES)), heads="auto")


def test_a_compiled_model_and_a_wrapped_projection_are_seen_through() -> None:
    model = nn.ModuleDict({"attn": Own(n_heads=4)})
    model["attn"].wq = torch.compile(model["attn"].wq)
    model["attn"].wo = nn.ModuleList([model["attn"].wo, nn.Dropout()])
    found = report(torch.compile(model), heads="auto")
    assert found["attn.wq.weight"].holds == ((4, 4, 16),)
    assert found["attn.wo.0.weight"].holds == ((4, 16, 4),)
