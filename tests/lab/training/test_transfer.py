"""Transfer in a run: from `transfer.*` to weights, groups and reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from muonscale.errors import ConfigError
from muonscale.lab.config.load import load_config
from muonscale.lab.models.build import build_model
from muonscale.lab.targets import inspect
from muonscale.lab.training.dry_run import planned_shape
from muonscale.lab.training.param_groups import base_shape, plan_transfer
from tests.conftest import Muonscale

NARROW = (
    "transfer.base={hidden_size: 8, num_attention_heads: 1, num_key_value_heads: 1, "
    "intermediate_size: 22}"
)
GROWN = ["model.fields.num_key_value_heads=4", NARROW]
SAME = "transfer.base={hidden_size: 32}"


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_the_base_itself_and_the_standard_train_bit_identically_to_none(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [word for word in tiny if not word.startswith("run.path")]
    options = {
        "none": [],
        "base": [SAME],
        "standard": [NARROW, "transfer.convention=standard"],
        "wider": [NARROW],
    }
    for name, given in options.items():
        answer = muonscale("train", *words, "train.steps=4", *given, f"run.path={tmp_path / name}")
        assert answer.code == 0, answer.err
    assert json.loads((tmp_path / "none" / "env.json").read_text())["transfer"] is None
    assert (
        weights(tmp_path / "base") == weights(tmp_path / "standard") == weights(tmp_path / "none")
    )
    assert weights(tmp_path / "wider") != weights(tmp_path / "none")


def test_a_wider_run_has_the_weights_and_the_groups_of_its_width(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    answer = muonscale("train", *tiny, *GROWN, "optimizer.lr=0.01", "schedule.name=constant")
    assert answer.code == 0, answer.err
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    last = [json.loads(line) for line in lines if '"kind": "train"' in line][-1]["lr"]
    assert last["hidden"] == pytest.approx(0.005)  # scale=rms, four times as wide
    assert last["head"] == pytest.approx(0.0025) and last["embedding"] == pytest.approx(0.01)
    assert load_file(tmp_path / "run" / "model" / "model.safetensors")
    transfer = json.loads((tmp_path / "run" / "env.json").read_text())["transfer"]
    assert (transfer["convention"], transfer["depth"]) == ("spectral", "none")
    rows = {row["name"]: row for row in transfer["rows"]}
    assert rows["lm_head.weight"]["multipliers"]["lr"] == 0.25
    assert rows["model.layers.0.mlp.up_proj.weight"]["multipliers"]["lr"] == 0.5


def test_a_resumed_run_goes_on_as_it_was(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, *GROWN, "checkpoint.keep=5"]
    assert muonscale("train", *words).code == 0
    expected = weights(tmp_path / "run")
    checkpoints = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for late in checkpoints[1:]:
        late.rename(tmp_path / late.name)
    (tmp_path / "run" / "result.json").unlink()
    answer = muonscale("train", *words, "--resume")
    assert answer.code == 0, answer.err
    assert weights(tmp_path / "run") == expected


def test_the_first_weights_are_those_without_transfer_times_their_multipliers(
    tmp_path: Path,
) -> None:
    words = [f"run.path={tmp_path}", "model.preset=llama-pico", "data.vocab_size=300", *GROWN]
    config = load_config("demo", words)
    shape = planned_shape(config)
    transfer = plan_transfer(config, shape)
    assert transfer is not None
    drawn = build_model(shape, seed=config.run.seed)
    expected = {name: p.clone() for name, p in drawn.named_parameters()}
    transfer.scale_weights_(drawn)
    factors = {"q_proj": 1 / 2, "down_proj": 1 / 2, "lm_head": 1 / 4, "embed": 1, "norm": 1}
    for name, parameter in drawn.named_parameters():
        factor = next((f for part, f in factors.items() if part in name), 1 / 2)
        torch.testing.assert_close(parameter, expected[name] * factor)


def test_multipliers_show_before_a_run(muonscale: Muonscale, tiny: list[str]) -> None:
    answer = muonscale("train", "--dry-run", *tiny, *GROWN)
    assert answer.code == 0, answer.err
    for text in ("model.layers.{0..1}.self_attn.q_proj.weight", "8x8", "transfer: spectral"):
        assert text in answer.out
    assert "transfer:" not in muonscale("train", "--dry-run", *tiny).out
    seen = inspect("llama-pico", GROWN)
    assert "folded in" in seen.text()
    rows = {row["name"]: row for row in json.loads(seen.json())["transfer"]["rows"]}
    assert rows["lm_head.weight"]["multipliers"]["lr"] == 0.25
    assert rows["lm_head.weight"]["base"][1] == 8
    assert json.loads(inspect("llama-pico").json())["transfer"] is None
    seen = inspect("llama-pico", [*GROWN, "optimizer.lr=0.4"])
    head = next(row for row in seen.groups.rows if row.role == "head")
    assert head.lr == pytest.approx(0.1)


def test_the_base_is_a_preset_or_fields() -> None:
    config = load_config(
        "demo", ["run.path=here", "model.preset=llama-nano", "transfer.base=llama-pico"]
    )
    shape = planned_shape(config)
    narrow = base_shape(config, shape)
    assert (narrow.hidden_size, narrow.vocab_size) == (32, shape.vocab_size)
    assert narrow.max_position_embeddings == shape.max_position_embeddings


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("{hiden_size: 8}", r"transfer\.base\.hiden_size.*did you mean hidden_size"),
        ("{vocab_size: 8}", r"transfer\.base\.vocab_size cannot be set"),
        ("{rms_norm_eps: 0.1}", "rms_norm_eps is 1e-06, .*0.1"),
        ("llama-pic", "transfer.base 'llama-pic'; did you mean llama-pico"),
        ("gpt-nano", "at the base width"),
        ("{hidden_size: 30}", "transfer.base="),
    ],
)
def test_a_base_that_cannot_be_used_is_named(base: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        inspect("llama-pico", [f"transfer.base={base}"])


def test_weights_that_are_loaded_are_not_scaled(tmp_path: Path) -> None:
    words = [f"run.path={tmp_path}", f"model.weights={tmp_path}", f"data.tokenizer={tmp_path}"]
    with pytest.raises(ConfigError, match=r"transfer\.base .* these are trained"):
        load_config("demo", [*words, SAME])
    load_config("demo", words)
