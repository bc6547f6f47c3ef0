"""Recipes, overrides, studies and tables that are nearly right, or not at all."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from muonscale.lab.config.load import load_config, recipe_names
from muonscale.lab.config.read import read_yaml
from muonscale.lab.studies.kinds import load_study, study_names
from tests.fuzz.outcome import command, refused_or
from tests.fuzz.strategies import ODD_TEXT, SCALARS, VALUES, damaged, damaged_bytes, places
from tests.fuzz.tiers import tiers

RECIPES = resources.files("muonscale") / "recipes"
TEXTS = {name: (RECIPES / f"{name}.yaml").read_text("utf-8") for name in recipe_names()}
TREES = {name: read_yaml(text) for name, text in TEXTS.items()}
STUDIES = {n: (RECIPES / "studies" / f"{n}.yaml").read_text("utf-8") for n in study_names()}
SMALL = ["demo", "gpt-nano", "moonlight-nano-stages", "gemma-nano"]
# Every key there is, so that overrides meet all of them.
FULL = json.loads(load_config("moonlight-nano-stages").model_dump_json())
KEYS = sorted({".".join(map(str, place)) for place in places(FULL) if len(place) > 1})


def dump(tree: Any) -> bytes:
    return yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")


@tiers(few=40, many=1000)
def test_recipes_resolve_or_are_refused(tried: settings, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"

    @tried
    @given(st.sampled_from(sorted(TREES)).flatmap(lambda name: damaged(TREES[name])))
    def check(tree: Any) -> None:
        path.write_bytes(dump(tree))
        refused_or(lambda: load_config(str(path)))

    check()


@tiers(few=40, many=700)
def test_bytes_in_place_of_a_recipe(tried: settings, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    texts = st.sampled_from([*TEXTS.values(), *STUDIES.values()]).map(str.encode)
    tags = st.sampled_from(
        ["int", "float", "bool", "timestamp", "binary", "set", "omap", "python/none"]
    )
    tagged = st.builds(lambda t, v: f"run: !!{t} {v}".encode("utf-8", "replace"), tags, ODD_TEXT)
    dates = st.sampled_from(
        [b"run: 2001-99-99", b"run: {path: 0b, seed: 0x}", b"a: &a [*a]", b"<<: 5"]
    )

    @tried
    @given(st.one_of(texts.flatmap(damaged_bytes), st.binary(max_size=60), tagged, dates))
    def check(content: bytes) -> None:
        path.write_bytes(content)
        refused_or(lambda: load_config(str(path)))
        refused_or(lambda: load_study(str(path)))

    check()


@tiers(few=40, many=1000)
def test_overrides_are_taken_or_refused(tried: settings) -> None:
    value = st.one_of(VALUES.map(lambda v: json.dumps(v)), ODD_TEXT, st.text(max_size=10))
    key = st.one_of(
        st.sampled_from(KEYS), st.text(max_size=10), st.sampled_from(KEYS).map(lambda k: k + ".")
    )

    @tried
    @given(st.sampled_from(SMALL), st.lists(st.tuples(key, value), min_size=1, max_size=3))
    def check(recipe: str, words: list[tuple[str, str]]) -> None:
        refused_or(lambda: load_config(recipe, [f"{key}={value}" for key, value in words]))

    check()


SECTION_KEYS = [key for key in KEYS if not key.startswith(("model.fields", "run.path"))]
# Shapes that take minutes to build even without memory are no mistakes to catch.
FIELDS = [
    "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "rope_theta",
    "rope_parameters", "hidden_act", "tie_word_embeddings", "head_dim", "initializer_range", "vocab_size",
    "rms_norm_eps", "attention_dropout", "dtype", "model_type", "pad_token_id", "max_position_embeddings",
]  # fmt: skip


@tiers(few=6, many=150)
def test_a_dry_run_says_or_refuses(tried: settings, tmp_path: Path) -> None:
    path = tmp_path / "recipe.json"
    base = json.loads(load_config("moonlight-nano-stages").model_dump_json())
    base["data"] |= {"source": "python-reference"}
    pico = json.loads(load_config("demo", ["model.preset=llama-pico"]).model_dump_json())
    small = st.one_of(SCALARS, st.integers(1, 512), st.floats(0, 1))
    field = st.tuples(st.sampled_from(["model.fields." + name for name in FIELDS]), small)
    other = st.tuples(st.sampled_from(SECTION_KEYS), small)
    changes = st.lists(st.one_of(field, other, other), min_size=1, max_size=2)

    @tried
    @given(st.sampled_from([base, pico]), changes)
    def check(tree: Any, changed: list[tuple[str, Any]]) -> None:
        path.write_text(json.dumps(tree), encoding="utf-8")
        words = [f"{key}={json.dumps(value)}" for key, value in changed]
        found = command("train", path, *words, f"run.path={tmp_path / 'run'}", "--dry-run")
        assert found.out or found.err
        assert not (tmp_path / "run").exists()

    check()


@tiers(few=20, many=300)
def test_studies_resolve_or_are_refused(tried: settings, tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    trees = {name: read_yaml(text) for name, text in STUDIES.items()}

    @tried
    @given(st.sampled_from(sorted(trees)).flatmap(lambda name: damaged(trees[name])))
    def check(tree: Any) -> None:
        path.write_bytes(dump(tree))
        refused_or(lambda: load_study(str(path)))

    check()


TABLE = "optimizer,parameters,tokens,flops,loss,batch,steps\n" + "".join(
    f"{rule},{n},{d},{6 * n * d},{1 + (n * d) ** -0.08 + 0.001 * k},{b},{s}\n"
    for rule in ("muon", "adamw")
    for k, (n, d, b, s) in enumerate(
        [(1e5, 1e6, 512, 900), (2e5, 3e6, 1024, 500), (4e5, 9e6, 2048, 300), (9e5, 2e7, 4096, 190),
         (2e6, 5e7, 8192, 150)]
    )
)  # fmt: skip


@tiers(few=10, many=100)
def test_tables_are_fitted_or_refused(tried: settings, tmp_path: Path) -> None:
    head, *body = [line.split(",") for line in TABLE.splitlines()]
    rows = [dict(zip(head, [c[0], *map(float, c[1:])], strict=True)) for c in body]
    lines = damaged(rows).map(
        lambda rows: (
            "\n".join(json.dumps(row) for row in rows).encode() if isinstance(rows, list) else b""
        )
    )
    csv = damaged_bytes(TABLE.encode())

    @tried
    @given(
        st.sampled_from(["scaling", "batch"]),
        st.one_of(st.tuples(st.just("csv"), csv), st.tuples(st.just("jsonl"), lines),
                  st.tuples(st.sampled_from(["jsonl", "tsv"]), csv)),
    )  # fmt: skip
    def check(verb: str, table: tuple[str, bytes]) -> None:
        path = tmp_path / f"table.{table[0]}"
        path.write_bytes(table[1])
        command("fit", verb, path, "--resamples", 100)

    check()


@pytest.mark.parametrize(
    "text", ["run: !!bool maybe", "run: !!timestamp now", "run: 2001-99-99", "[" * 9000]
)
def test_yaml_that_its_reader_trips_over_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    error = refused_or(lambda: load_config(str(path)))
    assert error is not None and "not valid YAML" in str(error)
