"""A URL where a path is wanted is refused, and no folder named `s3:` is made."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

from muonscale.cli.app import app
from muonscale.cli.arguments import read_path
from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.config.validate import section_in
from muonscale.lab.data.cache import cache_folder
from tests.conftest import Muonscale

URLS = ("s3://bucket/a", "gs://bucket/a", "hf://user/a", "memory://a", "file:///a")


def holds_paths(annotation: Any) -> bool:
    return annotation is Path or any(map(holds_paths, get_args(annotation)))


def path_keys(section: type[BaseModel] = Config, prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        if holds_paths(field.annotation):
            yield prefix + name
        elif (inner := section_in(field.annotation)) is not None and not prefix:
            yield from path_keys(inner, f"{name}.")


KEYS = [*path_keys(), "data.tokenizer"]


def test_the_keys_are_found() -> None:
    assert {"run.path", "data.cache", "model.weights", "eval.tasks_path"} <= set(KEYS)


@pytest.mark.parametrize("url", URLS)
@pytest.mark.parametrize("key", KEYS)
def test_a_key_that_is_a_path_refuses_a_url(key: str, url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [f"{key}={url}", "data.tokenizer=gpt2"][: 1 + (key != KEYS[-1])])
    assert all(word in str(caught.value) for word in (key, url, "data.path"))


@pytest.mark.parametrize(
    "words",
    [
        "train {}",
        "train demo run.path={} train.steps=2",
        "train {}@3 --extend train.tokens=1M run.path=x",
        "import {}",
        "import x --state {}",
        "prepare data.source=python-stdlib data.cache={}",
        "inspect {}",
        "plan {}",
        "plan llama-pico --figure {}",
        "coordcheck llama-pico --out {}",
        "study run telescope-nano path={}",
        "study status {}",
        "study plan {}",
        "report {}",
        "report x --out {}",
        "fit scaling {}",
        "fit scaling x.csv --report {}",
        "generate {} x",
        "eval {}",
        "eval x --out {}",
        "export {} x",
        "export x {}",
    ],
)
def test_a_verb_refuses_a_url(
    words: str, muonscale: Muonscale, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    answer = muonscale(*words.format(URLS[0]).split())
    assert (
        answer.code == 2 and URLS[0] in answer.err and "data.path" in answer.err.replace("\n", " ")
    )
    assert not list(tmp_path.iterdir())


def test_every_path_of_a_verb_is_read_by_one_function() -> None:
    def parameters(command: Any) -> Iterator[Any]:
        yield from command.params
        for other in getattr(command, "commands", {}).values():
            yield from parameters(other)

    plain = [
        parameter.name
        for parameter in parameters(typer.main.get_command(app))
        if (found := getattr(parameter, "type_descriptor", None)) is not None
        and holds_paths(found.annotation)
        and found.parameter_info.parser is not read_path
    ]
    assert not plain


def test_the_variable_of_the_cache_refuses_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MUONSCALE_CACHE", URLS[0])
    with pytest.raises(ConfigError, match="MUONSCALE_CACHE s3://"):
        cache_folder(None)


def test_a_folder_whose_name_ends_in_a_colon_is_a_path() -> None:
    assert load_config("demo", ["run.path=./s3:/a"]).run.path == Path("./s3:/a")
