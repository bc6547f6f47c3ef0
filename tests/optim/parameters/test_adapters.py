"""Adapters as `peft` makes them: which of their parameters are matrices, and which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from muonscale import Muon, grouping_report
from muonscale.optim.matrices.spec import PLAIN, MatrixSpec, view
from muonscale.optim.parameters.roles import Role, RoleAssignment, assign_roles
from tests.optim.compare import SetGradients, close, snapshot
from tests.optim.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning")  # peft's

Build = Callable[[str], nn.Module]
LINEARS = ["q_proj", "down_proj"]
PROMPT: dict[str, Any] = {"num_virtual_tokens": 4, "task_type": "CAUSAL_LM"}
FACTOR, TABLE, NONE = Role.HIDDEN, Role.EMBEDDING, Role.NORM
IN_OUT = MatrixSpec(transposed=True)

# The configuration of an adapter, and (role, matrices) by the container or the attribute.
ADAPTERS: dict[str, tuple[Any, dict[str, tuple[Role, MatrixSpec | None]]]] = {
    "lora": (
        lambda: peft.LoraConfig(target_modules=LINEARS),
        {"lora_A": (FACTOR, PLAIN), "lora_B": (FACTOR, PLAIN)},
    ),
    "lora of rank 1": (
        lambda: peft.LoraConfig(r=1, target_modules=LINEARS),
        {"lora_A": (FACTOR, PLAIN), "lora_B": (FACTOR, PLAIN)},
    ),
    "dora on an embedding and a head": (
        lambda: peft.LoraConfig(target_modules=["embed_tokens", "lm_head"], use_dora=True),
        {
            "lora_A": (FACTOR, PLAIN),
            "lora_B": (FACTOR, PLAIN),
            "lora_embedding_A": (TABLE, PLAIN),
            "lora_embedding_B": (TABLE, PLAIN),
            "lora_magnitude_vector": (NONE, None),
        },
    ),
    "some tokens": (
        lambda: peft.LoraConfig(target_modules=LINEARS, trainable_token_indices=[1, 2]),
        {
            "lora_A": (FACTOR, PLAIN),
            "lora_B": (FACTOR, PLAIN),
            "trainable_tokens_delta": (TABLE, PLAIN),
        },
    ),
    "adalora": (
        lambda: peft.AdaLoraConfig(target_modules=LINEARS, total_step=9),
        {"lora_A": (FACTOR, PLAIN), "lora_B": (FACTOR, PLAIN), "lora_E": (NONE, None)},
    ),
    "loha": (
        lambda: peft.LoHaConfig(target_modules=LINEARS),
        {f"hada_{part}": (FACTOR, PLAIN) for part in ("w1_a", "w1_b", "w2_a", "w2_b")},
    ),
    "gralora": (
        lambda: peft.GraloraConfig(target_modules=LINEARS),
        {"gralora_A": (FACTOR, IN_OUT), "gralora_B": (FACTOR, IN_OUT)},
    ),
    "oft": (
        lambda: peft.OFTConfig(target_modules=LINEARS, oft_block_size=4),
        {"oft_R": (NONE, None)},
    ),
    "householder": (lambda: peft.HRAConfig(target_modules=LINEARS), {"hra_u": (NONE, None)}),
    "ia3": (
        lambda: peft.IA3Config(target_modules=LINEARS, feedforward_modules=["down_proj"]),
        {"ia3_l": (NONE, None)},
    ),
    "vera": (
        lambda: peft.VeraConfig(target_modules=["q_proj"]),
        {"vera_lambda_b": (NONE, None), "vera_lambda_d": (NONE, None)},
    ),
    "vector bank": (
        lambda: peft.VBLoRAConfig(target_modules=["q_proj"], vector_length=8, num_vectors=8),
        {
            "vblora_logits_A": (NONE, None),
            "vblora_logits_B": (NONE, None),
            "vblora_vector_bank": (TABLE, PLAIN),
        },
    ),
    "layer norms": (
        lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
        {"ln_tuning_layers": (NONE, None)},
    ),
    "prompt": (lambda: peft.PromptTuningConfig(**PROMPT), {"embedding": (TABLE, PLAIN)}),
    "prefix": (lambda: peft.PrefixTuningConfig(**PROMPT), {"embedding": (TABLE, PLAIN)}),
    "p-tuning": (
        lambda: peft.PromptEncoderConfig(**PROMPT, encoder_hidden_size=12),
        {"embedding": (TABLE, PLAIN), "mlp_head": (FACTOR, PLAIN)},
    ),
    "prompts of tasks": (
        lambda: peft.MultitaskPromptTuningConfig(**PROMPT, num_tasks=3),
        {
            "embedding": (TABLE, PLAIN),
            "prefix_task_cols": (TABLE, PLAIN),
            "prefix_task_rows": (TABLE, PLAIN),
        },
    ),
}


def adapted(model: nn.Module, config: Any) -> nn.Module:
    torch.manual_seed(0)
    return peft.get_peft_model(model, config)  # type: ignore[arg-type]


def trained(model: nn.Module) -> list[RoleAssignment]:
    return [found for found in assign_roles(model) if found.parameter.requires_grad]


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_parameter_of_an_adapter_has_its_role(name: str, build_lm: Build) -> None:
    config, expected = ADAPTERS[name]
    seen = set()
    for found in trained(adapted(build_lm("llama"), config())):
        container = next(part for part in found.name.split(".") if part in expected)
        if found.parameter.ndim == 1 and expected[container][0] == FACTOR:  # a bias
            assert found.role == NONE
            continue
        assert (found.role, found.matrices) == expected[container], found.name
        seen.add(container)
    assert seen == set(expected)


def test_factors_on_stacked_experts_are_a_matrix_for_each_expert(build_lm: Build) -> None:
    experts = ["experts.gate_up_proj", "experts.down_proj"]
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=experts)
    model = adapted(build_lm("mixtral"), config)
    layers = {n: m for n, m in model.named_modules() if type(m).__name__ == "ParamWrapper"}
    assert len(layers) == 4
    by_parameter = {found.parameter: found for found in trained(model)}
    for layer in layers.values():
        A: Tensor = layer.lora_A["default"].weight  # type: ignore[index, union-attr]
        B: Tensor = layer.lora_B["default"].weight  # type: ignore[index, union-attr]
        nn.init.normal_(B)
        A_ERI = torch.cat(view(A, by_parameter[A].matrices or PLAIN))
        B_EOR = torch.cat(view(B, by_parameter[B].matrices or PLAIN))
        assert A_ERI.shape[:2] == B_EOR.mT.shape[:2] == (4, 3)
        deltas = layer.get_delta_weight("default")  # type: ignore[operator]
        for delta, A_RI, B_OR in zip(deltas, A_ERI, B_EOR, strict=True):
            close(delta, layer.scaling["default"] * B_OR @ A_RI)  # type: ignore[index]


def test_a_step_on_stacked_experts_is_that_of_each_expert_alone(
    build_lm: Build, set_gradients: SetGradients
) -> None:
    config = peft.LoraConfig(r=3, target_modules=[], target_parameters=["experts.down_proj"])
    model = adapted(build_lm("mixtral"), config)
    set_gradients(model, 0)
    before = snapshot(model)
    options: dict[str, Any] = {"lr": 0.1, "weight_decay": 0.0, "scale": "spectral"}
    Muon(model, **options, post_norm="normuon").step()
    name = next(n for n in before if n.endswith("lora_B.default.weight"))
    parameter = model.get_parameter(name)
    assert parameter.grad is not None
    for expert in range(4):
        alone = nn.Parameter(before[name][:, expert::4].clone())
        alone.grad = parameter.grad[:, expert::4].clone()
        Muon([alone], **options, post_norm="normuon").step()
        close(parameter.detach()[:, expert::4], alone.detach())


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("kind", ["llama", "qwen3_moe"])
def test_a_copy_that_is_trained_has_the_role_of_the_original(
    kind: str, enabled: bool, build_lm: Build
) -> None:
    plain = {found.name: found for found in assign_roles(build_lm(kind))}
    saved = ["lm_head", "embed_tokens", "norm", "mlp"]
    model = adapted(
        build_lm(kind), peft.LoraConfig(target_modules=["q_proj"], modules_to_save=saved)
    )
    if not enabled:
        model.base_model.disable_adapter_layers()  # type: ignore[operator, union-attr]
    copies = [found for found in assign_roles(model) if ".modules_to_save." in found.name]
    assert len(copies) > 8
    for copy in copies:
        name = copy.name.replace("modules_to_save.default.", "").replace("base_model.model.", "")
        assert copy.role == plain[name].role, copy.name
        assert copy.matrices == plain[name].matrices, copy.name


class Bare(nn.Module):
    """A language model that declares no output embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(20, 8)
        self.up = nn.Linear(8, 8)
        self.logits = nn.Linear(8, 20, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.logits(self.up(self.tokens(ids)))


def test_a_head_that_is_found_by_its_shape_is_one_as_a_copy_and_its_factors_are_matrices() -> None:
    config = peft.LoraConfig(target_modules=["up"], modules_to_save=["logits"])
    roles = {found.name: found.role for found in trained(adapted(Bare(), config))}
    assert roles["base_model.model.logits.modules_to_save.default.weight"] == Role.HEAD
    config = peft.LoraConfig(target_modules=["logits"])
    roles = {found.name: found.role for found in trained(adapted(Bare(), config))}
    assert set(roles.values()) == {Role.HIDDEN}


def test_the_classifier_that_peft_trains_as_a_copy_is_a_head() -> None:
    config = transformers.LlamaConfig(**SMALL, num_labels=3, pad_token_id=0)
    lora = peft.LoraConfig(target_modules=["q_proj"], task_type="SEQ_CLS")
    model = adapted(transformers.LlamaForSequenceClassification(config), lora)
    roles = {found.name: found.role for found in trained(model)}
    copied = "base_model.model.score.modules_to_save.default.weight"
    assert roles.pop(copied) == Role.HEAD
    assert set(roles.values()) == {Role.HIDDEN}


@pytest.mark.parametrize("copied", [False, True])
def test_what_is_known_of_a_layer_holds_under_an_adapter(copied: bool) -> None:
    """Fused weights of the model that train beside adapters, as for a second stage."""
    config = transformers.Phi3Config(**SMALL, pad_token_id=0)
    plain = {found.name: found for found in assign_roles(transformers.Phi3ForCausalLM(config))}
    fused = ["qkv_proj", "gate_up_proj"]
    lora = peft.LoraConfig(
        target_modules=["o_proj"] if copied else fused, modules_to_save=fused if copied else None
    )
    model = adapted(transformers.Phi3ForCausalLM(config), lora)
    inner = ("base_model.model.", "base_layer.", "original_module.", "modules_to_save.default.")
    names = set()
    for found in assign_roles(model):
        name = found.name
        for part in inner:
            name = name.replace(part, "")
        if name in plain:
            expected = plain[name]
            assert (found.role, found.matrices) == (expected.role, expected.matrices), found.name
            names.add(name)
    assert names == set(plain)


def test_lora_trains_and_only_its_factors_change(build_lm: Build) -> None:
    config = peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
    model = adapted(build_lm("llama"), config)
    before = snapshot(model)
    optimizer = Muon(model, lr=0.02)
    report = grouping_report(optimizer, model)
    assert report.num_matrices == sum(p.requires_grad for p in model.parameters()) == 28
    ids = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(4):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses == sorted(losses, reverse=True)
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, p in model.named_parameters() if p.requires_grad}
