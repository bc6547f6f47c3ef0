"""From the `model` section to the Hugging Face configuration of a model.

A *source* is a `model_type` with configuration fields: a preset, or a `config.json`. The user's
fields change the source. The vocabulary, the special tokens and the minimum number of positions
come from the data. For weights to start from, see `muonscale.lab.models.pretrained`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from muonscale.errors import ConfigError, nearest, shown
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.files import read_object
from muonscale.lab.models.contexts import quiet_transformers
from muonscale.lab.models.presets import PRESETS

# Fields that a recipe cannot set, and the reason.
DECIDED = {
    "vocab_size": "the tokenizer sets it (data.vocab_size)",
    "bos_token_id": "the tokenizer sets it",
    "eos_token_id": "the tokenizer sets it",
    "pad_token_id": "sequences are packed, there is no padding",
    "use_cache": "it is off in training and on in exported models",
}
# Fields of transformers 4 that transformers 5 moved into `rope_parameters`.
ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")
COUNTS, MOST_COUNT = re.compile("layers?$|experts$"), 20_000
"""Fields that count layers or experts, and their maximum: each of them is a module."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Names of the number of experts of a layer."""
MOST_SIZE = 2**40
"""Largest number of any field."""

# Transformers lists these as causal though they attend both ways ...
BIDIRECTIONAL = ("flaubert", "xlm", "xlnet")
# ... and these have `is_decoder: false` though they are causal.
CAUSAL_ANYWAY = ("gpt_neox", "gpt_neox_japanese")


def model_config(
    model: ModelSection,
    *,
    vocab_size: int | None,
    sequence_length: int,
    bos_id: int | None,
    eos_id: int | None,
) -> PreTrainedConfig:
    """Resolve the `model` section into a Hugging Face configuration.

    Args:
        model: preset, `config.json` or checkpoint, and the fields to change.
        vocab_size: size of the tokenizer's vocabulary; replaces the source's. None keeps the
            source's vocabulary and special tokens.
        sequence_length: training tokens of a sequence; positions are at least this many, exactly
            this many for a preset unless its or the user's fields say otherwise.
        bos_id: token that begins a text, in [0, vocab_size), or None.
        eos_id: token that ends a text, in [0, vocab_size), or None.

    Raises:
        ConfigError: for an unknown preset or field, a `config.json` that is missing or not of a
            causal language model, or a value that transformers refuses.
    """
    model_type, source = _read_source(model)
    cls = CONFIG_MAPPING[model_type]
    fields = _check_fields(model.fields, cls)
    source = {cls.attribute_map.get(key, key): value for key, value in source.items()}
    tree = _merge_rope(cls, source, fields, model.source) | fields
    if vocab_size is not None:
        tree |= {"vocab_size": vocab_size, "bos_token_id": bos_id, "eos_token_id": eos_id}
    tree["use_cache"] = True
    _check_sizes(tree)
    if model.weights is None:  # a checkpoint keeps its padding token and its positions
        tree["pad_token_id"] = None  # packed sequences have no padding
        positions = cls.attribute_map.get("max_position_embeddings", "max_position_embeddings")
        if positions in _own_fields(cls):
            given, source_value = fields.get(positions), tree.get(positions)
            if isinstance(given, int) and given < sequence_length:
                raise ConfigError(
                    f"model.fields: {given} positions are fewer than "
                    f"data.sequence_length={sequence_length}"
                )
            if given is None:
                least = isinstance(source_value, int)
                tree[positions] = max(source_value, sequence_length) if least else sequence_length
    config = _construct(cls, tree, model.source)
    _check_counts(config)
    _check_causal(config)
    return config


def _read_source(model: ModelSection) -> tuple[str, dict[str, Any]]:
    """Return the model_type and the fields of a source."""
    if model.preset is not None:
        if model.preset not in PRESETS:
            raise ConfigError(
                f"unknown model.preset {model.preset!r}; {nearest(model.preset, PRESETS)}"
            )
        preset = PRESETS[model.preset]
        return preset.model_type, dict(preset.fields)
    key, path = ("model.config", model.config) if model.config else ("model.weights", model.weights)
    assert path is not None
    path = path / "config.json" if path.is_dir() else path
    tree = _read_json(path, key)
    model_type = tree.pop("model_type", None)
    if not isinstance(model_type, str):
        raise ConfigError(f"{path} has no model_type; it is not a Hugging Face config.json")
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        hint = f"; {known}" if known.startswith("did you mean") else ""
        raise ConfigError(
            f"{path}: model_type {model_type!r} is not a causal language model of "
            f"transformers{hint}"
        )
    return model_type, tree


def _read_json(path: Path, key: str) -> dict[str, Any]:
    tree = read_object(path, f"{key} must be a Hugging Face config.json", ConfigError)
    if tree is None:
        raise ConfigError(f"{key}: there is no {path}; give a config.json or its folder")
    return tree


def _own_fields(cls: type[PreTrainedConfig]) -> set[str]:
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(cls)} - common


def _check_fields(fields: dict[str, Any], cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the user's fields under the names that `cls` uses for them."""
    own = _own_fields(cls)
    accepted = (own | set(cls.attribute_map)) - set(DECIDED)
    if "rope_parameters" in own:
        accepted |= set(ROPE_FIELDS)
    for name in fields:
        if name in DECIDED:
            raise ConfigError(f"model.fields.{name} cannot be set: {DECIDED[name]}")
        if name not in accepted:
            raise ConfigError(
                f"unknown field model.fields.{name} of model_type {cls.model_type!r}; "
                f"{nearest(name, accepted)}"
            )
    return {cls.attribute_map.get(name, name): value for name, value in fields.items()}


def _check_sizes(tree: dict[str, Any]) -> None:
    """Refuse numbers of which even the shapes of a model fill the memory."""
    for name, value in tree.items():
        most = MOST_COUNT if COUNTS.search(name) else MOST_SIZE
        if isinstance(value, int | float) and most < abs(value) < math.inf:
            raise ConfigError(f"model.fields.{name}={shown(value, 60)}: at most {most:,}")


def _check_counts(config: PreTrainedConfig) -> None:
    """Refuse counts with which a model can be built, and fails at its first pass."""
    values = vars(config)  # attributes of mixed layers refuse to be read
    heads, keys = (values.get(f"num_{of}_heads") for of in ("attention", "key_value"))
    if isinstance(heads, int) and isinstance(keys, int) and (keys < 1 or heads % keys):
        raise ConfigError(
            f"num_attention_heads={heads} is no multiple of num_key_value_heads={keys}: as many "
            "query heads must share each head of keys and values; change model.fields"
        )
    chosen = values.get("num_experts_per_tok")
    for name in EXPERTS:
        experts = values.get(name)
        if isinstance(chosen, int) and isinstance(experts, int) and 0 < experts < chosen:
            raise ConfigError(
                f"num_experts_per_tok={chosen} is above {name}={experts}; change model.fields"
            )


def _merge_rope(
    cls: type[PreTrainedConfig], source: dict[str, Any], fields: dict[str, Any], name: str
) -> dict[str, Any]:
    """Give the user's rotary fields precedence.

    In transformers 5 `rope_parameters`, or `rope_scaling` before it, silently overrides
    `rope_theta`.
    """
    legacy = [name for name in ROPE_FIELDS if name in fields]
    kept = {k: v for k, v in source.items() if k not in ("rope_scaling", *ROPE_FIELDS)}
    if "rope_parameters" in fields:
        if legacy:
            raise ConfigError(
                f"model.fields: put {legacy[0]} inside rope_parameters, not beside it"
            )
        return kept
    if not legacy:
        return source
    rope: Any = getattr(_construct(cls, source, name), "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(
            f"model.fields.{legacy[0]}: {cls.model_type} has rotary settings for each kind of "
            f"layer; give model.fields.rope_parameters, now {json.dumps(rope)}"
        )
    return kept | {"rope_parameters": dict(rope) | {name: fields.pop(name) for name in legacy}}


def _construct(cls: type[PreTrainedConfig], tree: dict[str, Any], name: str) -> PreTrainedConfig:
    try:
        with quiet_transformers():
            return cls(**copy.deepcopy(tree))
    except Exception as error:  # architectures raise errors of any class
        raise ConfigError(
            f"transformers refuses this {cls.model_type} configuration, {name}: {one_line(error)}; "
            "change it or model.fields"
        ) from error


def one_line(error: Exception) -> str:
    """Return the class and the message of an error on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_causal(config: PreTrainedConfig) -> None:
    kind = config.model_type
    if config.get_text_config() is not config:
        raise ConfigError(
            f"model_type {kind!r} contains several models; use its text-only type"
            + (f", {kind}_text" if f"{kind}_text" in CONFIG_MAPPING else "")
        )
    encoder = kind not in CAUSAL_ANYWAY and not getattr(config, "is_decoder", True)
    if encoder or kind in BIDIRECTIONAL or config.is_encoder_decoder:
        raise ConfigError(
            f"model_type {kind!r} is not a causal language model: it attends to later tokens; use "
            "a decoder"
        )
