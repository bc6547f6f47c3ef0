"""Configurations at other widths."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
from transformers import CONFIG_MAPPING, GPT2Config, LlamaConfig, PreTrainedConfig

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.widen import (
    KNOWN,
    fields_at,
    widened_fields,
    width_of,
    width_step,
)
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.transfer import constants
from muonscale.transfer.parametrization import parametrize

NANO = ["llama-nano", "gpt-nano", "gemma-nano", "moonlight-nano"]


def shape_of(preset: str, **fields: Any) -> PreTrainedConfig:
    section = ModelSection(preset=preset, fields=fields)
    return model_config(section, vocab_size=300, sequence_length=32, bos_id=0, eos_id=0)


@pytest.mark.parametrize("preset", NANO)
@pytest.mark.parametrize("grow", ["heads", "head_dim"])
def test_the_fields_give_a_model_of_the_width_as_overrides_and_as_a_configuration(
    preset: str, grow: Any
) -> None:
    shape = shape_of(preset)
    for width in (2 * width_step(shape, grow), 256):
        wide = shape_of(preset, **fields_at(shape, width, grow))
        assert width_of(wide) == width
        meta_model(wide)
    same = shape_of(preset, **fields_at(shape, width_of(shape), grow))
    assert same.to_dict() == shape.to_dict()
    assert widened_fields(shape, 2, grow) == fields_at(shape, 256, grow)
    assert widened_fields(shape, 0.5, grow) == widened_fields(shape, Fraction(1, 2), grow)


@pytest.mark.parametrize("preset", NANO)
def test_every_side_of_every_matrix_grows_or_is_fixed_by_something_else(preset: str) -> None:
    shape = shape_of(preset)
    narrow, wide = (
        dict(meta_model(shape_of(preset, **fields_at(shape, w))).named_parameters())
        for w in (128, 256)
    )
    fixed = {300, 32, 8, 1}  # vocabulary, positions, experts
    latent = {64 + 16: 128 + 16}  # MLA: a latent vector and a key of rotary size
    for name, parameter in wide.items():
        for old, new in zip(narrow[name].shape, parameter.shape, strict=True):
            one_head = "_norm.weight" in name and old == new == 32
            assert (
                new == 2 * old
                or (new == old and old in fixed)
                or one_head
                or (latent.get(old) == new)
            ), (name, old, new)


@pytest.mark.parametrize("preset", [name for name in NANO if name != "gpt-nano"])
def test_transfer_takes_a_model_and_its_wide_twin_either_way_of_growing(preset: str) -> None:
    shape = shape_of(preset)
    for grow in ("heads", "head_dim"):
        model, base = (
            meta_model(shape_of(preset, **fields_at(shape, width, grow)))  # type: ignore[arg-type]
            for width in (256, 64)
        )
        transfer = parametrize(model, base, parameter_groups(model, lr=1.0, weight_decay=0.0))
        assert any(row.multipliers.lr != 1 for row in transfer.rows.values())


def test_the_same_architectures_are_known_to_transfer() -> None:
    assert KNOWN.keys() == constants.KNOWN.keys()


@pytest.mark.parametrize("kind", sorted(KNOWN))
def test_all_fields_are_of_the_configuration(kind: str) -> None:
    config, known = CONFIG_MAPPING[kind](), KNOWN[kind]
    there = config.to_dict()
    for name in (known.width, *known.heads, *known.scores):
        assert isinstance(there[name], int)
    for name in known.sizes:
        assert name in there
    wide = CONFIG_MAPPING[kind](**fields_at(config, 2 * width_of(config)))
    assert getattr(wide, known.heads[0]) == 2 * getattr(config, known.heads[0])


@pytest.mark.parametrize(
    ("preset", "width", "grow", "said"),
    [
        (
            "llama-nano",
            48,
            "heads",
            r"cannot have the width 48 .*num_attention_heads would be 1\.5",
        ),
        ("llama-nano", 50, "heads", r"intermediate_size would be 137\.5; .* multiples of 32"),
        ("gemma-nano", 32, "heads", r"num_key_value_heads would be 0\.5; .* multiples of 64"),
        ("moonlight-nano", 8, "head_dim", r"multiples of 16"),
        ("llama-nano", 0, "heads", r"cannot have the width 0"),
    ],
)
def test_a_width_that_cannot_be_is_refused_with_those_that_can(
    preset: str, width: int, grow: Any, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        fields_at(shape_of(preset), width, grow)


def test_rotary_heads_stay_even_and_others_need_not() -> None:
    assert width_step(LlamaConfig(hidden_size=96, num_attention_heads=4), "head_dim") == 24
    narrow = LlamaConfig(hidden_size=96, num_attention_heads=4, intermediate_size=96)
    assert width_step(narrow, "head_dim") == 8  # heads of 2
    assert width_step(GPT2Config(n_embd=96, n_head=4), "head_dim") == 4  # heads of 1


def test_what_is_not_known_is_refused_by_name() -> None:
    config = CONFIG_MAPPING["gpt_bigcode"]()
    with pytest.raises(ConfigError, match=r"model_type 'gpt_bigcode' .*accepted: deepseek_v3"):
        width_step(config)
    with pytest.raises(ConfigError, match=r"grow is 'head_dims'.*head_dim"):
        width_step(shape_of("llama-nano"), "head_dims")  # type: ignore[arg-type]
