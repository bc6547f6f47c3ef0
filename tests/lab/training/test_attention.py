"""Attention logits and QK-clip in one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.config.sections import TrainSection
from muonscale.lab.models.attention import attention_modules
from muonscale.lab.parallel.apply import parallelize
from muonscale.lab.parallel.forward import Parallelized
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.attention import AttentionMonitor, monitor_attention, plan_attention
from muonscale.lab.training.finish import attention_times
from muonscale.lab.training.router_balance import RouterBalance, plan_routing
from muonscale.lab.training.schedule import spans
from muonscale.lab.training.setup import build_optimizer
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.step import accumulate, train_step
from tests.lab.models.logits import build, counted, eager_logits
from tests.optim.conftest import causal_lm

B, L = 6, 9
KINDS = ["llama_grouped", "gpt2", "gemma3", "deepseek_v3"]


def ids() -> Tensor:
    """Return `[B, L + 1]` token ids, all different rows."""
    return torch.randint(0, 50, (B, L + 1), generator=torch.Generator().manual_seed(1))


def config_of(*words: str) -> Config:
    return load_config(
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


def state_of(
    model: Any, *words: str, section: dict[str, Any] | None = None
) -> tuple[TrainState, Config]:
    # Losses are compared between steps that round otherwise, which bfloat16 would spread.
    config = config_of("optimizer.ns_dtype=float32", *words)
    train = TrainSection(steps=1, **(section or {}))
    forward = parallelize(model, None, train, Processes(), torch.float32)
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    model.train()
    routing = RouterBalance(
        model, plan_routing(model, config.routing, spans(config.schedule, config.timeline))
    )
    optimizer = build_optimizer(model, config.optimizer)
    attention = monitor_attention(model, config)
    return TrainState(forward, optimizer, routing, {}, attention=attention), config


def expected_of(kind: str, monkeypatch: Any) -> list[tuple[Tensor, float, float]]:
    model = build(kind, "eager", torch.float32)
    return [counted(logits) for logits in eager_logits(model, ids()[:, :-1], monkeypatch)]


WAYS: dict[str, tuple[int, dict[str, Any]]] = {
    "whole": (B, {}),
    "micro_batches": (2, {}),
    "recomputed": (B, {"activation_checkpointing": True}),
    "both": (3, {"activation_checkpointing": True}),
}


def listened(kind: str, way: str, **more: Any) -> tuple[TrainState, AttentionMonitor]:
    micro, section = WAYS[way]
    state, _ = state_of(
        build(kind, dtype=torch.float32),
        "telemetry.attention_every=1",
        section=section | more,
    )
    attention = state.attention
    assert attention is not None
    attention.begin(0)
    accumulate(state.forward, state.routing, ids(), micro, attention=attention)
    return state, attention


def check_heard(attention: AttentionMonitor, expected: list[tuple[Tensor, float, float]]) -> None:
    layers, above, pairs = attention._reduce(Processes())
    for number, (largest, count, total) in enumerate(expected):
        torch.testing.assert_close(layers[number], largest, rtol=1e-4, atol=1e-4)
        assert float(pairs[number]) == total
        assert float(above[number]) == pytest.approx(count, abs=1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_counts_once(kind: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _state, attention = listened(kind, way)
    check_heard(attention, expected_of(kind, monkeypatch))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("way", ["micro_batches", "both"])
def test_compiled_layers_are_recorded_once_too_and_have_their_gradients(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    state, attention = listened("llama_grouped", way, compile=True)
    check_heard(attention, expected_of("llama_grouped", monkeypatch))
    plain, _ = listened("llama_grouped", "whole")
    for name, parameter in plain.model.named_parameters():
        found = state.model.get_parameter(name).grad
        torch.testing.assert_close(found, parameter.grad, rtol=1e-3, atol=1e-5, msg=name)


def test_an_evaluation_and_steps_that_are_not_due_are_not_recorded() -> None:
    state, config = state_of(
        build("llama_grouped", dtype=torch.float32), "telemetry.attention_every=3"
    )
    records = [train_step(state, ids().numpy(), config, Processes()) for _ in range(7)]
    assert [r["step"] for r in records if "attention" in r] == [3, 6]
    assert [r["step"] for r in records if "attention_ms" in r] == [3, 6]
    assert all("qk_clip" not in r for r in records)
    attention = state.attention
    assert attention is not None
    attention.begin(2)
    with state.forward.evaluation():
        state.forward.logits(ids())
    state.forward.logits(ids())
    assert attention._seen == {}


def test_a_record_has_every_layer_and_nothing_else_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    heard, config = state_of(
        build("deepseek_v3", dtype=torch.float32), "telemetry.attention_every=1"
    )
    plain, other = state_of(build("deepseek_v3", dtype=torch.float32))
    record = train_step(heard, ids().numpy(), config, Processes())
    expected = expected_of("deepseek_v3", monkeypatch)
    assert record["attention"]["max_logit"] == pytest.approx(
        [float(largest.max()) for largest, _, _ in expected], rel=1e-4
    )
    assert record["attention"]["share_above_100"] == pytest.approx(
        [above / pairs for _, above, pairs in expected], rel=1e-3
    )
    assert record["attention_ms"] > 0
    assert plain.attention is None
    train_step(plain, ids().numpy(), other, Processes())
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, heard.model.state_dict()[name]), name


def weights_of(state: TrainState) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in state.model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama_grouped", "llama_bias", "gpt2", "deepseek_v3"])
def test_qk_clip_follows_the_step_by_the_logits_of_its_batch(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it the query of the last head of layer 0 is what the step made of it, times its factor."""
    plain, config = state_of(build(kind, dtype=torch.float32))
    train_step(plain, ids().numpy(), config, Processes())
    clipped, other = state_of(build(kind, dtype=torch.float32), "optimizer.qk_clip=20")
    record = train_step(clipped, ids().numpy(), other, Processes())
    expected = expected_of(kind, monkeypatch)
    heads = torch.cat([largest for largest, _, _ in expected])
    assert record["qk_clip"]["heads"] == len(heads)
    assert record["qk_clip"]["clipped"] == int((heads > 20).sum()) > 0
    assert record["qk_clip"]["smallest"] == pytest.approx(20 / float(heads.max()), rel=1e-4)
    assert "attention" not in record
    before, after = weights_of(plain), weights_of(clipped)
    same = [name for name in before if torch.equal(before[name], after[name])]
    leaves = {name.split(".")[-2] for name in before.keys() - set(same)}
    assert (
        leaves
        == {
            "llama_grouped": {"q_proj", "k_proj"},
            "llama_bias": {"q_proj"},  # a head that shares the key needs no clip
            "gpt2": {"c_attn"},
            "deepseek_v3": {"q_proj", "kv_b_proj"},
        }[kind]
    )


def test_clipping_keeps_logits_near_the_threshold() -> None:
    """Of a batch that comes again and again, with a learning rate that changes little."""
    words = ["optimizer.qk_clip=20", "telemetry.attention_every=1", "optimizer.lr=1e-5"]
    state, config = state_of(build("llama_grouped", dtype=torch.float32), *words)
    records = [train_step(state, ids().numpy(), config, Processes()) for _ in range(4)]
    assert max(records[0]["attention"]["max_logit"]) > 100
    assert max(records[-1]["attention"]["max_logit"]) < 21
    assert sum(records[-1]["attention"]["share_above_100"]) == 0


def test_a_resumed_run_clips_and_counts_as_an_uninterrupted_one(tmp_path: Path) -> None:
    def new() -> tuple[TrainState, Config]:
        words = ["optimizer.qk_clip=20", "optimizer.lr=0.3"]
        return state_of(build("llama_grouped", dtype=torch.float32), *words)

    def steps(state: TrainState, config: Config, number: int) -> list[dict[str, Any]]:
        timed = ("tokens_per_second", "step_ms", "optimizer_ms", "attention_ms")
        records = [train_step(state, ids().numpy(), config, Processes()) for _ in range(number)]
        return [{k: v for k, v in r.items() if k not in timed} for r in records]

    whole, config = new()
    for name in ("grad_norm", "update_rms"):
        whole.spikes.last[name] = [1e-9] * 99  # every step is a spike, once there are 100
    expected = steps(whole, config, 6)
    first, _ = new()
    first.spikes.last = {name: [1e-9] * 99 for name in ("grad_norm", "update_rms")}
    found = steps(first, config, 3)
    first.save(tmp_path, Processes(), keep=1)
    second, _ = new()
    second.restore(tmp_path / "step-00000003", Processes())
    found += steps(second, config, 3)
    assert found == expected
    assert expected[-1]["spikes"] == {"grad_norm": 6, "update_rms": 6}
    assert expected[-1]["qk_clip"]["clipped"] > 0
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


def test_a_model_of_one_attention_that_is_silent_is_named() -> None:
    state, config = state_of(build("llama", dtype=torch.float32), "telemetry.attention_every=1")
    model: Any = state.model
    first = model.model.layers[0].self_attn
    former = first.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        name, model.config._attn_implementation = model.config._attn_implementation, "sdpa"
        try:
            return former(*args, **kwargs)
        finally:
            model.config._attn_implementation = name

    first.forward = forward
    with pytest.raises(ConfigError, match=r"model\.layers\.0\.self_attn"):
        train_step(state, ids().numpy(), config, Processes())


def test_what_cannot_be_recorded_or_clipped_is_refused() -> None:
    bloom = hf.AutoModelForCausalLM.from_config(
        hf.BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=50)
    )
    for word in ("telemetry.attention_every=1", "optimizer.qk_clip=100"):
        with pytest.raises(ConfigError, match="'bloom'"):
            plan_attention(bloom, config_of(word))
    with pytest.raises(ConfigError, match=r"gemma3\w*'"):
        plan_attention(causal_lm("gemma3"), config_of("optimizer.qk_clip=100"))
    assert plan_attention(causal_lm("gemma3"), config_of("telemetry.attention_every=2")).enabled
    assert not plan_attention(bloom, config_of()).enabled


@pytest.mark.parametrize(
    "word",
    ["optimizer.qk_clip=0", "optimizer.qk_clip_alpha=2", "telemetry.attention_every=0"],
)
def test_values_out_of_range_are_refused(word: str) -> None:
    with pytest.raises(ConfigError, match=word.partition("=")[0].replace(".", r"\.")):
        config_of(word)


def test_the_time_of_steps_that_were_recorded_stands_beside_the_others() -> None:
    records: list[dict[str, Any]] = [
        {"step_ms": 10.0},
        {"step_ms": 30.0, "attention_ms": 15.0},
        {"step_ms": 12.0},
        {"step_ms": 14.0},
        {"step_ms": 40.0, "attention_ms": 25.0},
    ]
    assert attention_times(records) == {
        "recorded_steps": 2,
        "seconds": 0.04,
        "step_ms": 35.0,
        "other_step_ms": 12.0,
    }
    assert attention_times(records[1:2])["other_step_ms"] is None
    assert attention_times(records[:1]) == {}


def test_modules_are_numbered_in_the_order_of_the_layers() -> None:
    names = list(attention_modules(build("gpt2")))
    assert names == ["transformer.h.0.attn", "transformer.h.1.attn"]
    watch = monitor_attention(build("gpt2"), config_of("telemetry.attention_every=2"))
    assert watch is not None and watch.facts() == {
        "layers": names,
        "every": 2,
        "tau": None,
        "alpha": 0.5,
    }


def test_a_forward_pass_without_a_watch_is_possible() -> None:
    model = build("llama", dtype=torch.float32)
    config = config_of()
    stages = spans(config.schedule, config.timeline)
    routing = RouterBalance(model, plan_routing(model, config.routing, stages))
    assert accumulate(Parallelized(model, model), routing, ids(), B).isfinite()
