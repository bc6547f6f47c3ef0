from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.config.load import (
    Config,
    dump_config,
    load_config,
    recipe_names,
    recipe_summary,
    resolve_config,
)


def test_overrides_replace_the_recipes_values() -> None:
    config = load_config("demo", ["optimizer.lr=1e-3", "train.batch_tokens=512", "run.seed=7"])
    assert (config.optimizer.lr, config.train.batch_tokens, config.run.seed) == (1e-3, 512, 7)


def test_a_dumped_configuration_is_a_recipe_that_gives_it_back(tmp_path: Path) -> None:
    config = load_config("demo", ["optimizer.max_grad_norm=null", "model.fields.hidden_size=64"])
    path = tmp_path / "again.json"
    path.write_text(dump_config(config))
    assert load_config(str(path)) == config
    assert load_config(str(path)).optimizer.max_grad_norm is None


@pytest.mark.parametrize(
    "override",
    ["optimizer.lr=true", "run.seed=false", "train.steps=true", "checkpoint.keep=true"],
)
def test_a_flag_is_no_number(override: str) -> None:
    with pytest.raises(ConfigError, match=override.split("=")[0]):
        load_config("demo", [override])


def test_an_alternative_key_replaces_the_recipes() -> None:
    config = load_config("demo", ["data.path=my.txt", "train.steps=3", "model.config=x.json"])
    assert config.data.source is None and config.data.path == "my.txt"
    assert config.train.tokens is None and config.steps == 3
    assert config.model.preset is None


def test_weights_replace_the_recipes_model_and_need_their_tokenizer() -> None:
    config = load_config("demo", ["model.weights=folder", "data.tokenizer=folder"])
    assert config.model.preset is None and config.model.source == "folder"
    tree = json.loads(dump_config(config))
    for other in ("model.preset=llama-pico", "model.config=x.json"):
        again = resolve_config(json.loads(json.dumps(tree)), [other])
        assert again.model.weights is None and again.model.source == other.split("=")[1]
    with pytest.raises(ConfigError, match=r"needs data\.tokenizer.*data\.tokenizer=folder"):
        load_config("demo", ["model.weights=folder"])


def test_a_run_folder_is_a_recipe_with_its_own_path(tmp_path: Path) -> None:
    config = load_config("demo", ["run.path=somewhere/else"])
    (tmp_path / "config.json").write_text(dump_config(config))
    assert load_config(str(tmp_path)).run.path == tmp_path


def test_a_shipped_name_wins_over_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "demo").mkdir()
    monkeypatch.chdir(tmp_path)
    assert load_config("demo").model.preset == "llama-nano"


def test_tokens_are_rounded_up_to_whole_steps() -> None:
    config = load_config("demo", ["train.tokens=1025", "train.batch_tokens=512"])
    assert config.steps == 3
    assert config.timeline.batch_at(0) == 2


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_is_valid_and_says_what_it_is(name: str) -> None:
    assert isinstance(load_config(name), Config)
    assert len(recipe_summary(name)) > 20


BAD = [
    ("dmo", [], ["'dmo'", "demo"]),
    ("missing.yaml", [], ["missing.yaml"]),
    ("demo", ["trian.steps=1"], ["trian", "train"]),
    ("demo", ["train.stesp=1"], ["train.stesp", "steps"]),
    ("demo", ["train.steps=abc"], ["train.steps='abc'", "integer"]),
    ("demo", ["train.steps=0"], ["train.steps=0", "greater than 0"]),
    ("demo", ["optimizer.lr=.inf"], ["optimizer.lr=inf", "finite"]),
    ("demo", ["optimizer.lr=.nan"], ["optimizer.lr=nan"]),
    ("demo", ["optimizer.rule=sgd"], ["optimizer.rule is 'sgd'", "adamw, muon"]),
    ("demo", ["optimizer.momentum=1"], ["optimizer.momentum is 1", "x < 1"]),
    ("demo", ["optimizer.betas=[0.9]"], ["optimizer.betas"]),
    ("demo", ["data.source=a", "data.path=b"], ["data.source", "data.path"]),
    ("demo", ["train.steps=3", "train.tokens=9"], ["train.steps", "train.tokens"]),
    ("demo", ["model.config=a", "model.weights=b"], ["model.config and model.weights exclude"]),
    ("demo", ["model.preset=null"], ["model.preset, model.config, model.weights"]),
    ("demo", ["optimizer.state_format=torch"], ["state_format=torch", "optimizer.state"]),
    ("demo", ["data.source=null"], ["data.source", "data.path"]),
    ("demo", ["train.batch_tokens=100"], ["train.batch_tokens=100", "256"]),
    ("demo", ["steps=3"], ["'steps=3'", "section.key=value"]),
    ("demo", ["train.steps"], ["'train.steps'", "section.key=value"]),
    ("demo", ["train.steps=[1"], ["train.steps=[1", "YAML"]),
    ("demo", ["run.path.x=1"], ["run.path.x"]),
    ("demo", ["run.path=a\nb"], ["line breaks", "'a b'", r"""run.path='"a\nb"'"""]),
    ("demo", ["run.path='a\nb'"], ["line breaks"]),
    ("demo", ["run.path=a "], ["spaces", "'a'"]),
    ("demo", ["run.path=runs/a #1"], ["comments", "'runs/a'"]),
]


@pytest.mark.parametrize(("recipe", "overrides", "words"), BAD)
def test_bad_input_is_named_with_what_is_accepted(
    recipe: str, overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(recipe, overrides)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize("text", ["[1, 2]", "run: 3", "run: {path: a", "\x00"])
def test_a_recipe_file_of_another_shape_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml"):
        load_config(str(path))


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps([1]))
    with pytest.raises(ConfigError, match=re.escape(str(tmp_path))):
        load_config(str(tmp_path))


def test_of_two_overrides_of_a_key_the_last_one_counts() -> None:
    words = ["train.steps=20", "train.steps=null", "train.tokens=8192", "run.seed=1", "run.seed=2"]
    config = load_config("demo", words)
    assert (config.train.steps, config.train.tokens, config.run.seed) == (None, 8192, 2)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("10B", 10**10),
        ("1m", 10**6),
        ("512k", 512_000),
        ("0.5M", 500_000),
        ("512Ki", 2**19),
        ("1.5 G", 1_500_000_000),
    ],
)
def test_numbers_may_have_a_suffix(text: str, number: int) -> None:
    assert load_config("demo", [f"train.tokens={text}"]).train.tokens == number
    marks = load_config("demo", [f"checkpoint.marks=[0.5, {text}]"]).checkpoint.marks
    assert marks == [0.5, number]


@pytest.mark.parametrize("text", ["10X", "0.1k3", "k", "1.5k5", "-1k"])
def test_a_number_with_another_suffix_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"train.tokens={text!r}")):
        load_config("demo", [f"train.tokens={text}"])
    with pytest.raises(ConfigError, match=r"train\.tokens=0\.1: .*fractional part"):
        load_config("demo", ["train.tokens=0.0001k"])


def test_dtypes_have_short_names() -> None:
    words = ["train.precision=bf16", "optimizer.ns_dtype=fp32", "optimizer.comm_dtype=bf16"]
    config = load_config("demo", words)
    optimizer = config.optimizer
    assert config.train.precision == "bfloat16"
    assert (optimizer.ns_dtype, optimizer.comm_dtype) == ("float32", "bfloat16")
    with pytest.raises(ConfigError, match=r"train\.precision='fp16'"):
        load_config("demo", ["train.precision=fp16"])


def test_files_of_text_are_told_from_recipes(tmp_path: Path) -> None:
    (tmp_path / "my text.md").write_text("x")
    for path in (tmp_path / "my text.md", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(shlex.quote(f"data.path={path}"))):
            load_config(str(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no folder of a run"):
        load_config(str(tmp_path / "empty"))


def test_a_pattern_of_files_is_text() -> None:
    assert load_config("demo", ["data.path=*.txt"]).data.path == "*.txt"


def test_a_long_list_of_names_is_cut() -> None:
    with pytest.raises(ConfigError, match=r"accepted: demo, .* and \d+ more"):
        load_config("qqqq")


@pytest.mark.parametrize("path", ["a\nb", " a ", "runs/a #1", "-x", "a: b", "é", "'", "{a}"])
def test_a_path_in_double_quotes_is_kept_exactly(path: str) -> None:
    assert str(load_config("demo", [f"run.path={json.dumps(path)}"]).run.path) == path


@pytest.mark.parametrize(
    ("key", "said"),
    {
        "adapter.quantize": "adapter.rank",
        "adapter.load_in_4bit": "adapter.rank",
        "data.fim_rate": "data.path",
        "parallel.pipeline": "parallel.tensor",
        "parallel.context": "parallel.sequence",
    }.items(),
)
def test_what_is_left_out_is_refused_with_what_to_do_instead(key: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [f"{key}=2"])
    assert key in str(caught.value) and said in str(caught.value)
