"""From the `model` section to a model: its Hugging Face configuration, its weights, its size.

A *source* is a `model_type` with configuration fields: a preset, or a `config.json`. The user's
fields change the source; the vocabulary, the special tokens and the least number of positions come
from the data. Where there are weights to start from, see `muonscale.lab.models.pretrained`.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from muonscale.errors import ConfigError, nearest
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models.presets import PRESETS
from muonscale.lab.models.structure import expert_modules

# Fields a recipe may not set, and what does.
DECIDED = {
    "vocab_size": "the tokenizer sets it (data.vocab_size)",
    "bos_token_id": "the tokenizer sets it",
    "eos_token_id": "the tokenizer sets it",
    "pad_token_id": "sequences are packed, there is no padding",
    "use_cache": "it is off in training and on in exported models",
}
# Fields of transformers 4 that transformers 5 moved into `rope_parameters`.
ROPE_FIELDS = ("rope_theta", "partial_rotary_factor")
# Transformers lists these as causal though they attend both ways ...
BIDIRECTIONAL = ("flaubert", "xlm", "xlnet")
# ... and these carry `is_decoder: false` though they are causal.
CAUSAL_ANYWAY = ("gpt_neox", "gpt_neox_japanese")


GROUPED_ROWS = 8
"""Torch's grouped products take rows of whole 16 bytes: so many elements in 16 bits."""


@contextmanager
def quiet_transformers() -> Generator[None]:
    """Hide the progress bars and warnings of transformers inside the block."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def seeded_rng(seed: int, device: torch.device | str = "cpu") -> Generator[None]:
    """Seed the random numbers of the CPU and of `device` inside the block, and put them back after."""
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    index = (torch.cuda.current_device() if device.index is None else device.index) if on_gpu else 0
    with torch.random.fork_rng(devices=[index] if on_gpu else []):
        # torch.manual_seed would also seed every other GPU, which the fork does not restore.
        torch.random.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.default_generators[index].manual_seed(seed)
        yield


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
        vocab_size: size of the tokenizer's vocabulary; replaces the source's. None keeps the source's
            vocabulary and special tokens.
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
    fields = _checked_fields(model.fields, cls)
    source = {cls.attribute_map.get(key, key): value for key, value in source.items()}
    tree = _merge_rope(cls, source, fields) | fields
    if vocab_size is not None:
        tree |= {"vocab_size": vocab_size, "bos_token_id": bos_id, "eos_token_id": eos_id}
    tree["use_cache"] = True
    if model.weights is None:  # a checkpoint keeps its padding token and its positions
        tree["pad_token_id"] = None  # packed sequences have no padding
        _set_positions(tree, cls, fields, sequence_length)
    config = _construct(cls, tree)
    _check_causal(config)
    return config


def _read_source(model: ModelSection) -> tuple[str, dict[str, Any]]:
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
        raise ConfigError(
            f"{path} has no model_type; it is not a Hugging Face config.json"
            "; give the one of a model"
        )
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        known = nearest(model_type, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        hint = f"; {known}" if known.startswith("did you mean") else ""
        raise ConfigError(
            f"{path}: model_type {model_type!r} is not a causal language model of "
            f"transformers{hint}"
        )
    return model_type, tree


def _read_json(path: Path, key: str) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{key}: there is no {path}; give a config.json or its folder") from None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}: {path} cannot be read as JSON: {error}; give a Hugging Face config.json"
        ) from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{key}: {path} must hold a JSON object")
    return tree


def _own_fields(cls: type[PreTrainedConfig]) -> set[str]:
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return {field.name for field in dataclasses.fields(cls)} - common


def _checked_fields(fields: dict[str, Any], cls: type[PreTrainedConfig]) -> dict[str, Any]:
    """Return the user's fields under the names that `cls` stores them by."""
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


def _merge_rope(
    cls: type[PreTrainedConfig], source: dict[str, Any], fields: dict[str, Any]
) -> dict[str, Any]:
    """Give the user's rotary fields precedence.

    In transformers 5 `rope_parameters`, or `rope_scaling` before it, silently wins over `rope_theta`.
    """
    legacy = [name for name in ROPE_FIELDS if name in fields]
    if "rope_parameters" in fields:
        if legacy:
            raise ConfigError(
                f"model.fields: put {legacy[0]} inside rope_parameters, not beside it"
            )
        return {k: v for k, v in source.items() if k not in ("rope_scaling", *ROPE_FIELDS)}
    if not legacy:
        return source
    rope: Any = getattr(_construct(cls, source), "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        raise ConfigError(
            f"model.fields.{legacy[0]}: {cls.model_type} has rotary settings for each kind of "
            f"layer; give model.fields.rope_parameters, now {json.dumps(rope)}"
        )
    rope = dict(rope) | {name: fields.pop(name) for name in legacy}
    kept = {k: v for k, v in source.items() if k not in ("rope_scaling", *ROPE_FIELDS)}
    return kept | {"rope_parameters": rope}


def _set_positions(
    tree: dict[str, Any],
    cls: type[PreTrainedConfig],
    fields: dict[str, Any],
    sequence_length: int,
) -> None:
    positions = cls.attribute_map.get("max_position_embeddings", "max_position_embeddings")
    if positions in _own_fields(cls):
        tree[positions] = _positions(tree.get(positions), fields.get(positions), sequence_length)


def _positions(found: Any, given: Any, sequence_length: int) -> Any:
    if given is None:
        return max(found, sequence_length) if isinstance(found, int) else sequence_length
    if isinstance(given, int) and given < sequence_length:
        raise ConfigError(
            f"model.fields: {given} positions are fewer than data.sequence_length={sequence_length}"
            "; give at least so many"
        )
    return given


def _construct(cls: type[PreTrainedConfig], tree: dict[str, Any]) -> PreTrainedConfig:
    try:
        with quiet_transformers():
            return cls(**copy.deepcopy(tree))
    except Exception as error:  # every architecture raises what it likes about its values
        raise ConfigError(
            f"transformers refuses this {cls.model_type} configuration: {_one_line(error)}; "
            "give other model.fields"
        ) from error


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_causal(config: PreTrainedConfig) -> None:
    kind = config.model_type
    if config.get_text_config() is not config:
        raise ConfigError(
            f"model_type {kind!r} holds several models; take its text-only type"
            + (f", {kind}_text" if f"{kind}_text" in CONFIG_MAPPING else "")
        )
    encoder = kind not in CAUSAL_ANYWAY and not getattr(config, "is_decoder", True)
    if encoder or kind in BIDIRECTIONAL or config.is_encoder_decoder:
        raise ConfigError(
            f"model_type {kind!r} is not a causal language model: it attends to later tokens"
            "; take a decoder"
        )


def build_model(
    config: PreTrainedConfig, *, seed: int, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Return a float32 model with fresh weights, ready to train.

    The weights are drawn on the CPU, so a seed gives the same ones on every device. The global
    random number generators and `config` are left as they were. Attention is `sdpa`, and the
    key-value cache is off.

    Raises:
        ConfigError: if transformers cannot build a model of this configuration.
    """
    with seeded_rng(seed):
        model = _from_config(config, "cpu")
    return model.to(device)  # pyrefly: ignore


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of `build_model` on the meta device: shapes without storage.

    Raises:
        ConfigError: if transformers cannot build a model of this configuration.
    """
    with seeded_rng(0):
        return _from_config(config, "meta")


def _from_config(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    try:
        with quiet_transformers(), torch.device(device):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa"
            )
    except Exception as error:  # every architecture raises what it likes about its values
        raise ConfigError(
            f"transformers cannot build a {config.model_type} model of this configuration: "
            f"{_one_line(error)}"
        ) from error
    return ready_to_train(model)


def ready_to_train(model: PreTrainedModel) -> PreTrainedModel:
    """Turn off the key-value cache, and padding: its embedding row would get no gradient.

    Experts whose rows grouped products cannot take are computed one by one.
    """
    model.config.use_cache = False
    sides = [side for stack in _expert_stacks(model) for side in stack.shape[1:]]
    grouped = model.config._experts_implementation == "grouped_mm"
    if grouped and any(side % GROUPED_ROWS for side in sides):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return model


def _expert_stacks(model: PreTrainedModel) -> list[nn.Parameter]:
    modules = expert_modules(model).values()
    return [p for module in modules for p in module.parameters(recurse=False) if p.ndim == 3]
