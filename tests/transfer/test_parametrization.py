from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from muonscale import Muon, grouping_report, parameter_groups, parametrize
from muonscale.errors import ConfigError
from muonscale.transfer.constants import KNOWN, ForwardConstants
from muonscale.transfer.multipliers import Multipliers

EXPERTS = {"num_experts_per_tok": 2, "num_key_value_heads": 2}
EXTRA: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"head_dim": 8, "num_experts": 4, "moe_intermediate_size": 16},
}


def tiny_model(kind: str, m: int = 1, device: str = "meta", **fields: Any) -> nn.Module:
    """Return a model that is m times as wide as the narrowest, with m times the heads."""
    cls = CONFIG_MAPPING[kind]
    if kind == "gpt2":
        shape: dict[str, Any] = {"n_embd": 32 * m, "n_layer": 2, "n_head": 4 * m}
    else:
        shape = {
            "hidden_size": 32 * m,
            "num_hidden_layers": 2,
            "num_attention_heads": 4 * m,
            "num_key_value_heads": 2 * m,
            "intermediate_size": 48 * m,
        }
    if kind == "gpt_neox":
        del shape["num_key_value_heads"]
    if kind == "deepseek_v3":
        shape |= {"kv_lora_rank": 16, "q_lora_rank": 16, "moe_intermediate_size": 16 * m}
        shape |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8}
        shape |= {"num_key_value_heads": 4 * m, "n_routed_experts": 4, "num_experts_per_tok": 2}
        shape |= {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
    tokens = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    shape |= EXTRA.get(kind, {})
    if kind == "qwen3_moe":
        shape["moe_intermediate_size"] = 16 * m
    with torch.device(device):
        return AutoModelForCausalLM.from_config(
            cls(**{**shape, **tokens, "vocab_size": 320, **fields})
        )


def parametrized(kind: str, m: int = 4, overrides: dict | None = None, **options: Any):
    model = tiny_model(kind, m)
    groups = parameter_groups(model, lr=1.0, overrides=overrides)
    return parametrize(model, tiny_model(kind), groups, **options)


def of(found: Multipliers) -> tuple[float, float, float | None, float]:
    return (found.init, found.lr, found.weight_decay, found.eps)


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_at_the_base_every_multiplier_is_one(kind: str) -> None:
    for depth in ("none", "complete_p"):
        for row in parametrized(kind, 1, depth=depth).rows.values():
            assert row.multipliers == Multipliers(), row


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_what_the_architectures_declare_is_so(kind: str) -> None:
    """Weights are drawn alike at every width, and the modules that are folded into are there."""
    torch.manual_seed(0)
    narrow, wide = tiny_model(kind, device="cpu"), tiny_model(kind, 4, device="cpu")
    for (name, one), other in zip(narrow.named_parameters(), wide.parameters(), strict=True):
        if one.ndim >= 2:
            assert (other.std() / one.std()).item() == pytest.approx(1, rel=0.15), name
        else:
            assert one.unique().tolist() == other.unique().tolist(), name
    constants = KNOWN[kind]
    gain = narrow.get_submodule(constants.final_norm).weight
    assert bool((gain == (0 if constants.offset_gains else 1)).all())
    table = narrow.get_input_embeddings()
    ids = torch.arange(5)
    expected = 32**0.5 if constants.scaled_embedding else 1.0
    ratio = table(ids).norm() / table.weight[ids].norm()
    assert ratio.item() == pytest.approx(expected, rel=1e-5)
    ends = [row for row in _deep(kind) if "end of a residual branch" in row.why]
    assert len(ends) % 8 == 0 and ends  # two branches in each of four layers, with biases, experts


def _deep(kind: str) -> list:
    fields = {"n_layer": 4} if kind == "gpt2" else {"num_hidden_layers": 4}
    if kind == "deepseek_v3":
        fields["first_k_dense_replace"] = 4
    shallow = {"first_k_dense_replace": 2} if kind == "deepseek_v3" else {}
    model = tiny_model(kind, **fields)
    groups = parameter_groups(model, lr=1.0)
    base = tiny_model(kind, **shallow)
    return list(parametrize(model, base, groups, depth="complete_p").rows.values())


def test_a_mixture_of_experts_with_latent_attention() -> None:
    rows = parametrized("deepseek_v3", defaults={"scale": "rms"}).rows
    layer = "model.layers.1."
    expected = {
        "model.embed_tokens.weight": (1, 1, 1, 1 / 4),
        "lm_head.weight": (1 / 4, 1 / 4, 4, 1),
        "model.norm.weight": (1, 1, 1, 1 / 4),
        f"{layer}self_attn.q_a_proj.weight": (1 / 4, None, None, 1),  # to a rank that stays
        f"{layer}self_attn.q_a_layernorm.weight": (1, 1, 1, 1),
        f"{layer}self_attn.kv_b_proj.weight": (1, None, None, 1),  # from one
        f"{layer}self_attn.o_proj.weight": (1 / 2, 1 / 2, 2, 1),
        f"{layer}mlp.gate.weight": (1 / 4, 1 / 4, 4, 1),
        f"{layer}mlp.experts.gate_up_proj": (1 / 2, 1 / 2, 2, 1),
        f"{layer}mlp.experts.down_proj": (1 / 2, 1 / 2, 2, 1),
        f"{layer}mlp.shared_experts.down_proj.weight": (1 / 2, 1 / 2, 2, 1),
        f"{layer}input_layernorm.weight": (1, 1, 1, 1 / 4),
    }
    for name, values in expected.items():
        found = of(rows[name].multipliers)
        for value, wanted in zip(found, values, strict=True):
            assert wanted is None or value == wanted, name
    # [16, 128] from [16, 32]: 1/2 by out/in, and an update of RMS 0.2 is 2 times as long
    assert rows[f"{layer}self_attn.q_a_proj.weight"].multipliers.lr == 1 / 4
    # [64 to 256, 16]: 2 by out/in, and an update 2 times as long
    assert rows[f"{layer}self_attn.kv_b_proj.weight"].multipliers.lr == 1


def test_fused_projections_and_a_router_on_adamw() -> None:
    rows = parametrized("phi3").rows
    assert of(rows["model.layers.0.self_attn.qkv_proj.weight"].multipliers) == (1 / 2, 1 / 2, 2, 1)
    rows = parametrized("mixtral", overrides={"router": {"rule": "adamw"}}).rows
    assert of(rows["model.layers.0.mlp.gate.weight"].multipliers) == (1 / 4, 1 / 4, 4, 1)
    rows = parametrized("gpt2", convention="adam_table").rows
    assert of(rows["transformer.h.0.attn.c_attn.weight"].multipliers) == (1 / 2, 1 / 4, 1, 1)
    assert of(rows["transformer.ln_f.bias"].multipliers) == (1 / 4, 1 / 4, 4, 4)


def test_a_compiled_model_is_the_model() -> None:
    longer = {"head_dim": 16}
    model, base = tiny_model("llama", 2, **longer), tiny_model("llama")
    groups = parameter_groups(model, lr=1.0)
    expected = parametrize(model, base, groups).rows
    assert "scores" in expected["model.layers.1.self_attn.q_proj.weight"].why
    assert parametrize(torch.compile(model), base, groups).rows == expected


def test_groups_are_divided_by_their_multipliers() -> None:
    model = tiny_model("gpt2", 4, "cpu")
    before = parameter_groups(model, lr=0.5, weight_decay=0.1)
    transfer = parametrize(model, tiny_model("gpt2"), before, defaults={"scale": "none"})
    optimizer = Muon(transfer.groups(before), scale="none")
    report = grouping_report(optimizer.param_groups, model)  # each parameter is in one group
    rows = {row.name: row for row in report.rows}
    assert rows["transformer.ln_f.weight"].lr == 0.125
    assert rows["transformer.ln_f.weight"].weight_decay == pytest.approx(0.4)
    assert rows["transformer.h.1.mlp.c_fc.weight"].lr == 0.5
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names) and {"hidden", "norm", "norm#2"} <= set(names)
    eps = {n: g["eps"] for g in optimizer.param_groups for n in g["param_names"]}
    assert eps["transformer.wte.weight"] == pytest.approx(1e-8 / 4)
    assert eps["transformer.ln_f.weight"] == pytest.approx(1e-8)
    for group in optimizer.param_groups:  # the steps are those the multipliers were computed for
        assert set(group["matrices"]) <= set(group["param_names"]) and group["scale"] == "none"
    assert all(set(g["why"]) == set(g["param_names"]) for g in optimizer.param_groups)


def test_the_standard_convention_changes_nothing() -> None:
    model = tiny_model("gemma3_text", 4, "cpu")
    weights = {name: p.clone() for name, p in model.named_parameters()}
    groups = parameter_groups(model, lr=0.3, weight_decay=0.1)
    transfer = parametrize(model, tiny_model("gemma3_text"), groups, convention="standard")
    transfer.scale_weights_(model)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
    made = transfer.groups(groups)
    keys = ("name", "lr", "weight_decay", "param_names")
    assert [[g[k] for k in keys] for g in made] == [[g[k] for k in keys] for g in groups]


def test_frozen_weights_are_drawn_for_the_width_too() -> None:
    torch.manual_seed(0)
    model = tiny_model("llama", 4, "cpu")
    model.lm_head.weight.requires_grad_(False)
    drawn = model.lm_head.weight.std()
    transfer = parametrize(model, tiny_model("llama"), parameter_groups(model, lr=1.0))
    transfer.scale_weights_(model)
    assert (model.lm_head.weight.std() / drawn).item() == pytest.approx(1 / 4)


class Own(nn.Module):
    def __init__(self, width: int, experts: int = 3, kept: int = 5) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.stack = nn.Parameter(torch.zeros(experts, width, width))
        self.down = nn.Linear(width, kept)
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, 50, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        x = torch.matmul(x[:, None], self.stack.mT).mean(1)
        return self.head(self.norm(x + self.down(x).mean(-1, keepdim=True)))


def own(width: int = 64, base: int = 16, overrides: dict | None = None, **options: Any):
    model = Own(width)
    groups = parameter_groups(model, lr=1.0, overrides=overrides)
    constants = ForwardConstants(final_norm="norm")
    return parametrize(model, Own(base), groups, constants=constants, **options)


def test_a_model_of_ones_own() -> None:
    rows = own().rows
    assert of(rows["layers.0.weight"].multipliers) == (1 / 2, 1 / 2, 2, 1)
    assert of(rows["layers.0.bias"].multipliers) == (1, 1, 1, 1 / 4)
    assert of(rows["down.bias"].multipliers) == (1, 1, 1, 1)
    assert of(rows["head.weight"].multipliers) == (1 / 4, 1 / 4, 4, 1)


def refused(said: str, kind: str, fields: dict, base: dict, **options: Any) -> None:
    model = tiny_model(kind, **fields)
    groups = parameter_groups(model, lr=1.0)
    with pytest.raises(ConfigError, match=said):
        parametrize(model, tiny_model(kind, **base), groups, **options)


def test_what_is_not_understood_is_named() -> None:
    llama = ("llama", {})
    refused("spectral", *llama, {}, convention="spectrl")
    refused("complete_p", *llama, {}, depth="completep")
    refused("vocab_size.* 320.* 321", *llama, {"vocab_size": 321})
    refused("initializer_range", *llama, {"initializer_range": 0.1})
    refused("num_local_experts", "mixtral", {}, {"num_local_experts": 2})
    refused(" opt", "opt", {"word_embed_proj_dim": 32}, {"word_embed_proj_dim": 32})
    # queries grow and keys do not, in one parameter
    fields = {"hidden_size": 64, "num_attention_heads": 8}
    refused("qkv_proj.weight", "phi3", fields, {})
    # longer heads with queries, keys and values in one parameter
    refused("h.0.attn .*16.* 8", "gpt2", {"n_embd": 64, "n_head": 4}, {})


def test_what_is_not_understood_of_ones_own_is_named() -> None:
    with pytest.raises(ConfigError, match="Own"):
        parametrize(Own(8), Own(4), parameter_groups(Own(8), lr=1.0))
    with pytest.raises(ConfigError, match=r"layers\.0\.weight.*override"):
        own(overrides={"layers.0.weight": {"matrices": {"heads": 4}}})
    with pytest.raises(ConfigError, match="num_hidden_layers"):
        own(depth="complete_p")
    model, constants = Own(8), ForwardConstants(final_norm="norm")
    groups = parameter_groups(model, lr=1.0)
    with pytest.raises(ConfigError, match=r"stack .*3, 8, 8.*2, 4, 4"):
        parametrize(model, Own(4, experts=2), groups, constants=constants)
    smaller = Own(4)
    del smaller.down
    with pytest.raises(ConfigError, match=r"down\.weight"):
        parametrize(model, smaller, groups, constants=constants)
    transfer = parametrize(model, Own(4), groups, constants=constants)
    with pytest.raises(ConfigError, match=r"down\.(bias|weight)"):
        transfer.scale_weights_(smaller)
    with pytest.raises(ConfigError, match=r"0\.(bias|weight)"):
        transfer.groups(parameter_groups(nn.Sequential(nn.Linear(8, 8)), lr=1.0))
    model.head.weight = model.embedding.weight
    with pytest.raises(ConfigError, match="'final'"):
        groups = parameter_groups(model, lr=1.0)
        base = Own(4)
        base.head.weight = base.embedding.weight
        parametrize(model, base, groups, constants=ForwardConstants(final_norm="final"))


def test_decay_of_a_gain_that_is_stored_less_one_is_refused() -> None:
    model = tiny_model("gemma3_text", 4)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
    transfer = parametrize(model, tiny_model("gemma3_text"), groups)
    with pytest.raises(ConfigError, match=r"model.norm.weight .*weight_decay: 0"):
        transfer.groups(groups)
    overrides = {"model.norm.weight": {"weight_decay": 0.0}}
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, overrides=overrides)
    decays = {n: g["weight_decay"] for g in transfer.groups(groups) for n in g["param_names"]}
    assert decays["model.norm.weight"] == 0 and decays["model.embed_tokens.weight"] > 0.1
