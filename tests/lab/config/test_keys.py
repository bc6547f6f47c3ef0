from __future__ import annotations

import pytest

from muonscale.errors import ConfigError
from muonscale.lab.config.keys import describe_keys, find_keys
from muonscale.lab.config.load import Config


def test_every_key_has_a_meaning_and_its_default() -> None:
    keys = {key.name: key for each in find_keys().values() for key in each}
    assert all(key.meaning for key in keys.values())
    for section, field in Config.model_fields.items():
        assert {f"{section}.{name}" for name in field.annotation.model_fields} <= set(keys)  # type: ignore[union-attr]
    assert keys["train.batch_tokens"].default == "8192"
    assert keys["train.tokens"].default == "-" and keys["run.path"].default == "required"
    assert keys["train.precision"].types == ("auto", "float32", "bfloat16")
    assert keys["data.mixture.N.weight"].default == "required"


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("profile", ["profile.steps"]),
        ("train.tokens", ["train.tokens"]),
        ("batch_tokens", ["train.batch_tokens", "eval.batch_tokens"]),
    ],
)
def test_a_section_a_key_or_a_part_of_one_is_found(word: str, names: list[str]) -> None:
    found = [key.name for keys in find_keys(word).values() for key in keys]
    assert set(names) <= set(found)
    assert all(word in name for name in found)


def test_a_word_that_no_key_has_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"train\.tokens"):
        find_keys("train.tokns")


def test_lines_are_of_the_width() -> None:
    text = describe_keys("optimizer", width=60)
    assert "optimizer.momentum  a number  (default: 0.95)" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("      ")) <= 60
