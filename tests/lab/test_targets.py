from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.targets import inspect

MOONLIGHT = Path(__file__).parents[1] / "fixtures" / "moonlight-16b"


def test_moonlight_has_the_published_number_of_parameters() -> None:
    seen = inspect(str(MOONLIGHT))
    # Liu et al., arXiv 2502.16982, table 3: 15.29B parameters, embeddings not counted
    assert round(seen.size.without_embeddings / 1e9, 2) == 15.29
    assert seen.size.total - seen.size.without_embeddings == 2 * 163840 * 2048
    # every layer q, kv_a, kv_b, o; a dense MLP; then a router, 3 shared and 3 per expert
    assert seen.groups.num_matrices == 27 * 4 + 3 + 26 * (1 + 3 + 64 * 3)
    experts = 26 * 64
    shapes = seen.groups.matrix_shapes()
    assert shapes.count((1408, 2048)) == 2 * experts and shapes.count((2048, 1408)) == experts
    roles = {(row.role, row.rule) for row in seen.groups.rows}
    assert roles == {
        ("hidden", "muon"),
        ("router", "muon"),
        ("embedding", "adamw"),
        ("head", "adamw"),
        ("norm", "adamw"),
    }
    assert "model.layers.{1..26}.mlp.experts.gate_up_proj" in seen.text()
    assert len(seen.text().splitlines()) < 30


@pytest.mark.slow
def test_moonlight_is_inspected_without_its_memory() -> None:
    """Sixteen billion float32 parameters and their momentum would be 128 GB."""

    def limits() -> None:
        resource.setrlimit(resource.RLIMIT_DATA, (2 * 2**30, 2 * 2**30))

    words = [sys.executable, "-m", "muonscale", "inspect", str(MOONLIGHT), "--json"]
    answer = subprocess.run(words, capture_output=True, text=True, preexec_fn=limits)
    assert answer.returncode == 0, answer.stderr
    tree = json.loads(answer.stdout)
    assert tree["matrices"] == 5207
    assert tree["rules"]["muon"]["parameters"] == 15_288_893_440


def test_a_preset_a_recipe_and_its_file_are_the_same_model(tmp_path: Path) -> None:
    from muonscale.lab.config.load import dump_config, load_config

    config = load_config("demo", ["model.preset=llama-pico", f"run.path={tmp_path}"])
    (tmp_path / "config.json").write_text(dump_config(config))
    targets = {
        "llama-pico": ["optimizer.lr=0.02"],
        "demo": ["model.preset=llama-pico"],
        str(tmp_path): [],
        str(tmp_path / "config.json"): [],
    }
    first, *others = [inspect(target, words).groups for target, words in targets.items()]
    assert all(other == first for other in others)
    assert first.num_matrices == 14


def test_the_vocabulary_of_a_hugging_face_configuration_is_kept(tmp_path: Path) -> None:
    fields = {"model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 77}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    for target in (tmp_path, tmp_path / "config.json"):
        rows = {row.name: row for row in inspect(str(target)).groups.rows}
        assert rows["transformer.wte.weight"].shape == (77, 16)
        assert rows["transformer.h.0.attn.c_attn.weight"].holds == ((1, 16, 16),) * 3
    changed = inspect(str(tmp_path), ["model.fields.n_layer=3", "optimizer.rule=adamw"])
    assert changed.groups.num_matrices == 0
    assert any("h.2." in row.name for row in changed.groups.rows)


def test_overrides_are_for_one_call() -> None:
    def vocabulary(*overrides: str) -> int:
        rows = {row.name: row for row in inspect("llama-pico", overrides).groups.rows}
        return rows["lm_head.weight"].shape[0]

    usual = vocabulary()
    assert vocabulary("data.vocab_size=300") == 300
    assert vocabulary() == usual == 1024


@pytest.mark.parametrize(
    ("preset", "attention"),
    [
        # latent attention, and a mixture of experts: 4 heads of 32 + 16 rows of q, 32 + 32 of kv
        ("moonlight-nano", {"q_proj": ((4, 48, 128),), "kv_a_proj_with_mqa": ((1, 80, 128),),
                            "kv_b_proj": ((4, 32, 64), (4, 32, 64)), "o_proj": ((4, 128, 32),)}),
        ("gemma-nano", {"q_proj": ((4, 32, 128),), "k_proj": ((2, 32, 128),),
                        "v_proj": ((2, 32, 128),), "o_proj": ((4, 128, 32),)}),
        ("gpt-nano", {"c_attn": ((4, 32, 128),) * 3, "c_proj": ((4, 128, 32),)}),
    ],
)  # fmt: skip
def test_heads_are_matrices_where_the_configuration_says_so(
    preset: str, attention: dict[str, tuple[tuple[int, int, int], ...]]
) -> None:
    whole, divided = inspect(preset), inspect(preset, ["optimizer.heads=auto"])
    for before, row in zip(whole.groups.rows, divided.groups.rows, strict=True):
        place = row.name.split(".")[-2]
        if "attn" in row.name and row.holds:
            assert row.holds == attention[place]
            assert before.holds != row.holds or place == "kv_a_proj_with_mqa"
        else:
            assert row == before
    assert "by head" in divided.text()
    assert divided.groups.num_matrices == sum(row.matrices for row in divided.groups.rows)


def test_transfer_refuses_heads_as_matrices() -> None:
    base = (
        "{hidden_size: 64, num_attention_heads: 2, num_key_value_heads: 2, intermediate_size: 176}"
    )
    with pytest.raises(ConfigError, match=r"q_proj\.weight.*heads"):
        inspect("llama-nano", ["optimizer.heads=auto", f"transfer.base={base}"])


def test_bare_parameters_are_what_their_code_says(tmp_path: Path) -> None:
    fields = {
        "model_type": "recurrent_gemma", "hidden_size": 32, "num_hidden_layers": 3,
        "num_attention_heads": 4, "lru_width": 32, "intermediate_size": 64, "vocab_size": 50,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(fields))
    found = inspect(str(tmp_path)).groups
    gates = [row for row in found.rows if row.name.endswith("_gate_weight")]
    assert gates and {row.rule for row in gates} == {"muon"}
    assert not found.guesses


@pytest.mark.parametrize(
    ("target", "said"), [("lama-nano", "did you mean llama-nano"), ("dmo", "did you mean demo")]
)
def test_a_model_that_is_none_is_refused_with_the_nearest_name(target: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        inspect(target)


def test_a_file_that_describes_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(ConfigError, match="nothing"):
        inspect(str(tmp_path))
    (tmp_path / "config.json").write_text('{"hidden_size": 8}')
    with pytest.raises(ConfigError, match="hidden_size"):
        inspect(str(tmp_path))
