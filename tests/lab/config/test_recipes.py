from __future__ import annotations

import re
from pathlib import Path

import pytest

from muonscale.lab.config.load import load_config, recipe_names, recipe_summary
from muonscale.lab.config.run_length import Timeline
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.presets import PRESETS
from muonscale.lab.targets import inspect, resolve_target
from muonscale.lab.training.dry_run import dry_run
from muonscale.lab.training.router_balance import plan_routing
from muonscale.lab.training.schedule import check_schedule, multiplier, spans
from muonscale.optim.presets import preset

ROOT = Path(__file__).parents[3]
NANO = ["gpt-nano", "gemma-nano", "moonlight-nano"]

# arXiv 2502.16982, Table 2: tokens in billions, learning rate, sequences of 8192 to a batch
LADDER = {
    "moonlight-399m": (8.92, 9.503e-4, 96),
    "moonlight-545m": (14.04, 9.143e-4, 128),
    "moonlight-822m": (20.76, 8.825e-4, 160),
    "moonlight-1.1b": (28.54, 8.561e-4, 192),
    "moonlight-1.5b": (38.91, 8.305e-4, 256),
}
# arXiv 2602.21545 and K1seki221/MuonPlus: tokens in billions, tokens of a step, context, learning
# rate, decay, normalisation
MUON_PLUS = {
    "muon-plus-gpt-small": (3.0, 2**20, 2048, 0.01, 0.1, "col_row"),
    "muon-plus-gpt-base": (7.2, 2**21, 4096, 0.005, 0.1, "row_col"),
    "muon-plus-gpt-base-t200": (72, 2**21, 4096, 0.005, 0.1, "row_col"),
    "muon-plus-llama-60m": (1.1, 2**19, 1024, 0.04, 0.05, "row_col"),
    "muon-plus-llama-130m": (2.2, 2**19, 1024, 0.02, 0.1, "col_row"),
    "muon-plus-llama-350m": (6.4, 2**21, 4096, 0.04, 0.1, "col_row"),
    "muon-plus-llama-350m-t200": (72, 2**21, 4096, 0.04, 0.1, "col_row"),
}
# arXiv 2505.02222, section 2: tokens in billions
ESSENTIAL = {"100m": 10, "500m": 25, "1b": 50, "2b": 50, "4b": 50}


def options(name: str) -> dict[str, object]:
    return load_config(name).optimizer.model_dump()


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_is_whole(name: str) -> None:
    config = load_config(name)
    assert config.model.preset in PRESETS and not config.model.fields
    assert config.run.path == Path("runs") / name
    check_schedule(config)
    assert config.train.batch_tokens % (config.train.micro_batch_tokens or 1) == 0
    _, shape = resolve_target(name, [])
    published = PRESETS[config.model.preset].fields.get("vocab_size")
    assert shape.vocab_size == config.data.vocab_size == (published or 1024)
    positions = PRESETS[config.model.preset].fields
    limit = positions.get("max_position_embeddings", positions.get("n_positions", 256))
    assert config.data.sequence_length <= limit
    if config.data.source is not None and config.data.source.startswith("hf:"):
        # enough text for one epoch, at five bytes to a token
        bytes_of_text = config.data.max_bytes
        assert bytes_of_text is not None and config.train.tokens is not None
        assert 5 * config.train.tokens <= bytes_of_text


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder_is_trained_as_in_the_paper(name: str) -> None:
    tokens, lr, sequences = LADDER[name]
    config = load_config(name)
    assert config.model.preset == name.replace("moonlight-", "moonlight-dense-")
    assert config.train.tokens == round(tokens * 1e9)
    assert config.optimizer.lr == lr and config.schedule.name == "cosine"
    assert (config.data.sequence_length, config.timeline.batch_at(0)) == (8192, sequences)
    assert preset("moonlight").items() <= options(name).items()


@pytest.mark.parametrize("name", MUON_PLUS)
def test_muon_plus_is_trained_as_in_its_repository(name: str) -> None:
    tokens, batch, length, lr, decay, norm = MUON_PLUS[name]
    config = load_config(name)
    assert config.train.tokens == round(tokens * 1e9)
    assert (config.train.batch_tokens, config.data.sequence_length) == (batch, length)
    assert config.timeline.batch_at(0) == 512
    assert preset("muon_plus_repo") | {
        "lr": lr,
        "weight_decay": decay,
        "post_norm": norm,
        "clip": "all",
        "max_grad_norm": 1.0,
    } == {key: options(name)[key] for key in [*preset("muon_plus_repo"), *_OF_THE_RUN]}


THOUSAND = Timeline.constant(1000)
_OF_THE_RUN = ("lr", "weight_decay", "clip", "max_grad_norm")


def test_muon_plus_falls_as_the_paper_says() -> None:
    gpt, llama = load_config("muon-plus-gpt-small"), load_config("muon-plus-llama-60m")
    at = [multiplier(gpt.schedule, round(part * 1000), THOUSAND) for part in (0, 0.39, 0.7)]
    assert at == pytest.approx([1, 1, 0.55])  # constant for 40 %, then linear to 0.1
    assert multiplier(llama.schedule, 100, THOUSAND) == 1 > multiplier(llama.schedule, 99, THOUSAND)
    assert multiplier(llama.schedule, 999, THOUSAND) < 1e-4


def test_muon_plus_takes_the_fused_queries_keys_and_values_for_one_matrix() -> None:
    rows = {row.name: row for row in inspect("muon-plus-gpt-small").groups.rows}
    assert rows["transformer.h.0.attn.c_attn.weight"].holds == ((1, 3 * 768, 768),)
    plain = {row.name: row for row in inspect("gpt-small").groups.rows}
    assert plain["transformer.h.0.attn.c_attn.weight"].holds == ((1, 768, 768),) * 3


@pytest.mark.parametrize("size", ESSENTIAL)
def test_essentials_models_are_trained_as_in_the_paper(size: str) -> None:
    name = f"essential-{size}-dclm"
    config = load_config(name)
    assert config.model.preset == f"essential-{size}"
    assert config.train.tokens == ESSENTIAL[size] * 10**9
    assert config.data.sequence_length == 8192
    # Moonlight's law, arXiv 2502.16982, Table 9, for C = 6 N D with N the size in the name
    number, unit = float(size[:-1]), {"m": 1e6, "b": 1e9}[size[-1]]
    law = 0.0127339 * (6 * number * unit * config.train.tokens) ** -0.0574752
    assert config.optimizer.lr == pytest.approx(law, rel=0.04)
    assert (config.schedule.name, config.schedule.final) == ("cosine", 0.1)
    assert preset("essential").items() <= options(name).items()


def test_moonlight_is_trained_in_the_papers_three_stages() -> None:
    config = load_config("moonlight")
    timeline, peak = config.timeline, config.optimizer.lr
    first, second, third = spans(config.schedule, timeline)
    assert [timeline.tokens_before(span.end) / 1e9 for span in (first, second, third)] == [
        pytest.approx(tokens, rel=0.02) for tokens in (33, 5200, 5700)
    ]
    rates = {step: peak * multiplier(config.schedule, step, timeline) for step in
             (0, 1999, 2000, second.end - 1, second.end + 100, third.end - 1)}  # fmt: skip
    assert list(rates.values()) == [
        pytest.approx(rate, rel=2e-3)
        for rate in (4.2e-4 / 2001, 4.2e-4, 4.2e-4, 4.2e-5, 1e-4, 1e-4 / 14_801)
    ]
    # batches of 2048 and 4096 sequences of 8192; the published checkpoints have 12 thousand steps of
    # the first, and 42 thousand at 1.2 trillion tokens
    assert config.data.sequence_length == 8192
    assert (timeline.batch_at(11_900), timeline.batch_at(12_000)) == (2048, 4096)
    assert timeline.step_at(1.2e12) == pytest.approx(42_000, rel=0.01)
    assert config.optimizer.weight_decay == 0.1
    plan = plan_routing(
        meta_model(resolve_target("moonlight", [])[1]), config.routing, [first, second, third]
    )
    assert [plan.rate_at(step) for step in (0, second.end - 1, second.end)] == [1e-3, 1e-3, 0]
    assert config.routing.bias_update == "centered"


def test_the_miniature_has_moonlights_stages() -> None:
    large, small = load_config("moonlight"), load_config("moonlight-nano-stages")
    for one, two in zip(large.schedule.stages, small.schedule.stages, strict=True):
        assert (one.name, one.final, one.bias_rate) == (two.name, two.final, two.bias_rate)
        assert one.peak == pytest.approx(two.peak, rel=1e-3)
    assert len(small.timeline.phases) == len(large.timeline.phases) == 2


@pytest.mark.parametrize("name", NANO)
def test_a_name_of_two_things_is_the_recipe_that_trains_the_preset(name: str) -> None:
    config, shape = resolve_target(name, [])
    assert config == load_config(name)
    assert shape.hidden_size == 128
    assert {row.lr for row in inspect(name).groups.rows} == {config.optimizer.lr}


def test_no_other_name_is_of_two_things() -> None:
    shared = set(recipe_names()) & set(PRESETS)
    assert shared == set(NANO)
    assert all(load_config(name).model.preset == name for name in shared)


def test_a_preset_keeps_its_vocabulary_unless_another_is_given() -> None:
    assert resolve_target("gpt-small", [])[1].vocab_size == 50257
    assert resolve_target("gpt-small", ["data.vocab_size=300"])[1].vocab_size == 300
    assert resolve_target("llama-nano", [])[1].vocab_size == 1024


def test_a_summary_is_the_first_paragraph_of_the_comment() -> None:
    said = recipe_summary("moonlight-399m")
    assert said.endswith("Table 2).") and "Not the paper's" not in said


def test_the_table_of_the_documentation_has_every_recipe() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    rows = [
        line for line in text.splitlines() if re.match(r"\| `[^`]+` \| `", line)
    ]  # a preset's second column is not code
    assert rows == [documented(name) for name in recipe_names()]


def documented(name: str) -> str:
    config = load_config(name)
    sources = [str(part.source).removeprefix("hf:") for part in config.data.corpora]
    source = " + ".join(sources)
    batch = config.timeline.described_batches
    return (
        f"| `{name}` | `{config.model.preset}` | {source} | {config.train.tokens:,} | "
        f"{batch} | {config.optimizer.lr:g} | "
        f"{config.optimizer.weight_decay:g} | {config.schedule.name} |"
    )


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_dry_runs(name: str) -> None:
    text = dry_run(load_config(name))
    assert "FLOPs" in text and "AdamW:" in text
