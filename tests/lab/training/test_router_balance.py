"""Routers of models that train in one process."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from muonscale.errors import ConfigError
from muonscale.lab.config.load import load_config
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.config.sections import RoutingSection, ScheduleSection, TrainSection
from muonscale.lab.models.moe.routers import IN_FLOAT32, SCORES, find_routers, router_outputs
from muonscale.lab.models.moe.routing import affinities
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.router_balance import (
    RouterBalance,
    experts_implementation,
    plan_routing,
)
from muonscale.lab.training.schedule import spans
from muonscale.lab.training.setup import build_optimizer
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.step import accumulate, train_step
from tests.optim.conftest import causal_lm

B, L = 6, 9
STAGES = spans(ScheduleSection(), Timeline.constant(10))


def ids() -> Tensor:
    """Return `[B, L + 1]` token ids, all different rows."""
    return torch.randint(0, 50, (B, L + 1), generator=torch.Generator().manual_seed(1))


def listened(
    kind: str,
    *,
    micro: int = B,
    checkpointing: bool = False,
    compiled: bool = False,
    **section: Any,
) -> tuple[Parallelized, RouterBalance]:
    """Return a model and its routing after the passes of a step."""
    train = TrainSection(steps=1, activation_checkpointing=checkpointing, compile=compiled)
    forward = parallelize(causal_lm(kind), None, train, Processes(), torch.float32)
    forward.model.train()
    plan = plan_routing(forward.model, RoutingSection.model_validate(section), STAGES)
    routing = RouterBalance(forward.model, plan)
    accumulate(forward, routing, ids(), micro)
    return forward, routing


def routers(model: nn.Module) -> list[Any]:
    return list(find_routers(model).known.values())


@functools.cache
def by_hand(kind: str) -> tuple[list[list[int]], float]:
    """Return the loads of every layer and the auxiliary loss, with loops, of another forward pass."""
    model, heard = causal_lm(kind), []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, outputs: heard.append(outputs))
    with torch.no_grad():
        model(input_ids=ids()[:, :-1])
    loads, loss = [], 0.0
    for logits, _, chosen in heard:
        E, K = logits.shape[1], chosen.shape[1]
        loads.append([int((chosen == i).sum()) for i in range(E)])
        score = torch.sigmoid(logits) if kind == "deepseek_v3" else logits.exp()
        score = score / score.sum(1, keepdim=True)
        for sequence in score.view(B, L, E):
            f = [0.0] * E
            for token in sequence:
                for i in token.argsort(descending=True)[:K].tolist():
                    f[i] += E / (K * L)
            loss += sum(f[i] * float(sequence[:, i].mean()) for i in range(E)) / B
    return loads, loss


KINDS = ["deepseek_v3", "mixtral", "qwen3_moe", "gpt_oss"]
WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "micro_batches": {"micro": 2},
    "recomputed": {"checkpointing": True},
    "both": {"micro": 3, "checkpointing": True},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_token_counts_once(kind: str, way: str) -> None:
    _forward, routing = listened(kind, aux_loss=0.1, **WAYS[way])
    loads, loss = by_hand(kind)
    counted, _, aux = routing._reduce(Processes())
    assert counted.tolist() == loads
    assert aux == pytest.approx(0.1 * loss, rel=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # torch compiling
@pytest.mark.parametrize("checkpointing", [False, True])
def test_compiled_layers_are_recorded_once_too(checkpointing: bool) -> None:
    _, routing = listened(
        "deepseek_v3", micro=2, checkpointing=checkpointing, compiled=True, aux_loss=0.1
    )
    loads, loss = by_hand("deepseek_v3")
    counted, _, aux = routing._reduce(Processes())
    assert counted.tolist() == loads
    assert aux == pytest.approx(0.1 * loss, rel=1e-5)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_auxiliary_loss_are_those_of_one_whole_pass(kind: str, way: str) -> None:
    forward, _ = listened(kind, aux_loss=0.5, **WAYS[way])
    without, _ = listened(kind)
    expected = {n: p.grad for n, p in without.model.named_parameters()}
    model, heard = causal_lm(kind), []
    for router in routers(model):
        router.register_forward_hook(lambda module, args, outputs: heard.append(outputs))
    model(input_ids=ids()[:, :-1], use_cache=False)
    total = torch.zeros(())
    for logits, _, chosen in heard:
        score = logits.sigmoid() if kind == "deepseek_v3" else logits.softmax(-1)
        gates = (score / score.sum(-1, keepdim=True)).view(B, L, -1)
        top = gates.topk(chosen.shape[1]).indices
        f = nn.functional.one_hot(top, gates.shape[-1]).sum(2).float().mean(1)
        total = total + 0.5 * (f * gates.mean(1)).sum() / B * gates.shape[-1] / chosen.shape[1]
    total.backward()
    for name, parameter in forward.model.named_parameters():
        extra = model.get_parameter(name).grad
        whole = expected[name] if extra is None else expected[name] + extra
        torch.testing.assert_close(parameter.grad, whole, rtol=1e-4, atol=1e-6, msg=name)


def state_of(kind: str, words: list[str]) -> tuple[TrainState, Any]:
    config = load_config(
        "demo",
        [
            "train.steps=20",
            "train.tokens=null",
            f"data.sequence_length={L}",
            f"train.batch_tokens={B * L}",
            "eval.batch_tokens=9",
            *words,
        ],
    )
    model = causal_lm(kind)
    model.train()
    forward = Parallelized(model, model)
    routing = RouterBalance(
        model, plan_routing(model, config.routing, spans(config.schedule, config.timeline))
    )
    return TrainState(forward, build_optimizer(model, config.optimizer), routing, {}), config


def biases(state: TrainState) -> Tensor:
    return torch.stack([r.e_score_correction_bias.clone() for r in routers(state.model)])


@pytest.mark.parametrize("update", ["centered", "sign"])
def test_a_step_moves_the_bias_by_the_loads_of_its_batch(update: str) -> None:
    state, config = state_of("deepseek_v3", [f"routing.bias_update={update}"])
    record = train_step(state, ids().numpy(), config, Processes())
    ((loads, *others), _) = by_hand("deepseek_v3")
    assert not others
    signs = [(mean := sum(loads) / len(loads)) and (mean > n) - (mean < n) for n in loads]
    mid = sum(signs) / len(signs) if update == "centered" else 0.0
    assert biases(state)[0].tolist() == pytest.approx([1e-3 * (s - mid) for s in signs], abs=1e-9)
    figures = record["routing"]
    assert figures["bias_rate"] == 1e-3
    assert figures["max_violation"] == pytest.approx(max(loads) / (sum(loads) / 4) - 1)
    assert 0 < figures["entropy"] <= 1


STILL_AFTER_A_TENTH = {
    "name": "stages",
    "stages": [{"until": 0.1, "name": "constant"}, {"name": "linear", "bias_rate": 0}],
}


def test_the_bias_stands_still_in_a_stage_of_rate_zero() -> None:
    words = [f"schedule.{key}={json.dumps(value)}" for key, value in STILL_AFTER_A_TENTH.items()]
    state, config = state_of("deepseek_v3", words)  # 2 of 20 steps
    seen = []
    for _ in range(4):
        record = train_step(state, ids().numpy(), config, Processes())
        seen.append((record["routing"]["bias_rate"], biases(state)))
    assert [rate for rate, _ in seen] == [1e-3, 1e-3, 0, 0]
    assert not torch.equal(seen[0][1], torch.zeros_like(seen[0][1]))
    assert not torch.equal(seen[0][1], seen[1][1])
    assert torch.equal(seen[1][1], seen[2][1]) and torch.equal(seen[2][1], seen[3][1])


def test_an_evaluation_leaves_bias_and_loads_alone() -> None:
    state, _config = state_of("deepseek_v3", [])
    accumulate(state.forward, state.routing, ids(), B)
    with state.forward.evaluation():
        state.forward.logits(ids())
    state.forward.logits(ids())  # in training mode, but not a step
    assert state.routing.finish(0, Processes())["max_violation"] == pytest.approx(
        max(by_hand("deepseek_v3")[0][0]) / (B * L * 2 / 4) - 1
    )
    after = biases(state)
    with state.forward.evaluation():
        state.forward.logits(ids())
    assert torch.equal(biases(state), after)


def test_null_leaves_the_bias_as_it_is() -> None:
    state, config = state_of("deepseek_v3", ["routing.bias_rate=null"])
    record = train_step(state, ids().numpy(), config, Processes())
    assert biases(state).count_nonzero() == 0 and "bias_rate" not in record["routing"]


def test_a_model_without_experts_records_nothing() -> None:
    state, config = state_of("llama", [])
    assert "routing" not in train_step(state, ids().numpy(), config, Processes())
    assert str(state.routing) == ""
    assert experts_implementation(state.model) is None


def test_softmax_routers_are_recorded_and_have_no_bias() -> None:
    state, config = state_of("mixtral", [])
    figures = train_step(state, ids().numpy(), config, Processes())["routing"]
    assert sorted(figures) == [
        "busiest_share",
        "dead_experts",
        "entropy",
        "max_violation",
        "max_violation_worst",
        "quietest_share",
    ]


@pytest.mark.parametrize(
    ("kind", "section", "message"),
    [
        (
            "mixtral",
            {"bias_rate": 0.01},
            "bias_rate=0.01: the routers of model_type 'mixtral' have no",
        ),
        ("llama", {"bias_rate": 0.01}, "model_type 'llama' has no routed experts"),
        ("llama", {"aux_loss": 0.01}, "aux_loss=0.01: model_type 'llama' has no routed experts"),
    ],
)
def test_what_a_model_does_not_have_is_refused(
    kind: str, section: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        plan_routing(causal_lm(kind), RoutingSection.model_validate(section), STAGES)


@pytest.mark.parametrize("rate", ["-0.1", "0", "yes", "soon"])
def test_a_rate_that_is_none_is_refused_with_what_is_accepted(rate: str) -> None:
    with pytest.raises(ConfigError, match=r"routing.bias_rate=.*a number above 0, auto, null"):
        load_config("demo", [f"routing.bias_rate={rate}"])


def test_a_stage_may_not_update_a_bias_that_is_not_there() -> None:
    schedule = ScheduleSection.model_validate(STILL_AFTER_A_TENTH)
    stages = spans(schedule, Timeline.constant(20))
    with pytest.raises(
        ConfigError, match=r"schedule.stages.1.bias_rate=0: .* 'mixtral' have no bias"
    ):
        plan_routing(causal_lm("mixtral"), RoutingSection(), stages)


def minimax() -> Any:
    """Return a model whose bias lies outside of its router."""
    config = transformers.MiniMaxM2Config(
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=50,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    return transformers.AutoModelForCausalLM.from_config(config)


def test_routers_that_are_not_understood_are_named_and_left_alone() -> None:
    model = minimax()
    routing = RouterBalance(model, plan_routing(model, RoutingSection(), STAGES))
    assert "MiniMaxM2TopKRouter " in str(routing)
    assert routing.facts()["not_understood"] == ["MiniMaxM2TopKRouter"]
    accumulate(Parallelized(model, model), routing, ids(), B)
    assert routing.finish(0, Processes()) == {}
    for section in (RoutingSection(bias_rate=0.01), RoutingSection(aux_loss=0.01)):
        with pytest.raises(ConfigError, match=r"MiniMaxM2TopKRouter of model_type 'minimax_m2'"):
            plan_routing(model, section, STAGES)


class Block(nn.Module):
    """Experts that no router is known to lead to."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.Module()
        self.experts.stack = nn.Parameter(torch.zeros(4, 2, 3))
        self.experts.num_experts = 4


def test_experts_without_a_known_router_are_named_by_what_holds_them() -> None:
    assert find_routers(nn.Sequential(Block())).unknown == ("Block",)


def build_router(name: str) -> Any:
    model_type = next(kind for kind in MODULES if name.lower().startswith(kind.replace("_", "")))
    module = importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")
    torch.manual_seed(0)
    router = getattr(module, name)(CONFIG)
    nn.init.normal_(router.weight)
    return router


@pytest.mark.parametrize("name", SCORES)
def test_what_a_router_makes_of_its_logits_is_known(name: str) -> None:
    """The weights of the chosen experts are as their affinities, for every class of the table."""
    router = build_router(name)
    assert find_routers(nn.Sequential(router)).known == {"0": router}
    outputs = router(torch.randn(20, 16))
    weights, (logits, chosen) = outputs[1], router_outputs(outputs)
    gates = affinities(logits, SCORES[name]).gather(1, chosen)
    torch.testing.assert_close(
        weights / weights.sum(1, keepdim=True), gates / gates.sum(1, keepdim=True)
    )


MODULES = [
    "deepseek_v32",
    "deepseek_v3",
    "deepseek_v2",
    "dots1",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "mixtral",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
]
"""Longer names before those that they begin with."""

CONFIG: Any = SimpleNamespace(
    num_experts_per_tok=2,
    num_local_experts=8,
    num_experts=8,
    hidden_size=16,
    routed_scaling_factor=2.5,
    n_group=1,
    topk_group=1,
    norm_topk_prob=True,
    topk_method="greedy",
)


def test_experts_are_computed_by_grouped_products() -> None:
    assert experts_implementation(causal_lm("deepseek_v3")) == "grouped_mm"


def test_a_resumed_run_has_the_biases_of_an_uninterrupted_one(tmp_path: Path) -> None:
    def steps(state: TrainState, config: Any, number: int) -> None:
        for _ in range(number):
            train_step(state, ids().numpy(), config, Processes())

    whole, config = state_of("deepseek_v3", [])
    steps(whole, config, 6)
    first, _ = state_of("deepseek_v3", [])
    steps(first, config, 3)
    first.save(tmp_path, Processes(), keep=1)
    second, _ = state_of("deepseek_v3", [])
    second.restore(tmp_path / "step-00000003", Processes())
    assert torch.equal(biases(second), biases(first)) and biases(first).count_nonzero()
    steps(second, config, 3)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize("kind", ["deepseek_v3", "mixtral"])
def test_routers_that_compute_in_float32_do_so_in_bfloat16_passes(kind: str) -> None:
    train = TrainSection(steps=1)
    forward = parallelize(causal_lm(kind), None, train, Processes(), torch.bfloat16)
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    for router in routers(forward.model):
        router.register_forward_hook(
            lambda module, inputs, outputs: seen.append((module.weight, inputs[0], outputs[0]))
        )
    with torch.no_grad():
        forward.logits(ids()[:, :-1])
    assert seen
    for weight, hidden, logits in seen:
        exact = hidden.double().view(-1, hidden.shape[-1]) @ weight.double().T
        error = ((logits - exact).abs().max() / exact.abs().max()).item()
        if kind == "deepseek_v3":
            assert logits.dtype == torch.float32 and error < 1e-5
        else:  # transformers leaves it to autocast
            assert logits.dtype == torch.bfloat16 and error > 1e-4


@pytest.mark.parametrize("name", SCORES)
def test_the_list_of_float32_routers_is_that_of_transformers(name: str) -> None:
    router = build_router(name).bfloat16()
    with torch.no_grad():
        logits = router(torch.randn(50, 16).bfloat16())[0].float()
    rounded = torch.equal(logits, logits.bfloat16().float())
    assert rounded != (name in IN_FLOAT32)
