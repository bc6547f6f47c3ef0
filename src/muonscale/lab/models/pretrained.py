"""A Hugging Face checkpoint as the start of a run: its configuration, weights and fingerprint."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.files import check_folder, read_text, size_and_hash
from muonscale.lab.models.build import meta_model, prepare_for_training
from muonscale.lab.models.config import model_config
from muonscale.lab.models.contexts import quiet_transformers
from muonscale.lab.models.convert import check_all_loaded

HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
"""Fields that change the meaning of the rows of a matrix, even if no shape changes."""

Shapes = dict[str, tuple[int, ...]]


def pretrained_config(
    model: ModelSection, *, tokens: int, sequence_length: int
) -> PreTrainedConfig:
    """Return the configuration of `model.weights`, with its own vocabulary and special tokens.

    Args:
        model: section with `weights`; its fields must not change any weight.
        tokens: size of the tokenizer; a padded vocabulary may have more rows.
        sequence_length: tokens of a training sequence.

    Raises:
        ConfigError: for quantized weights, a tokenizer or a sequence that is too long, and fields
            that change weights.
    """
    assert model.weights is not None
    saved, shape = (
        model_config(each, vocab_size=None, sequence_length=1, bos_id=None, eos_id=None)
        for each in (model.model_copy(update={"fields": {}}), model)
    )
    if getattr(saved, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.weights={model.weights} are quantized (quantization_config in its "
            "config.json), and cannot be trained; use a checkpoint in float32, bfloat16 or float16"
        )
    _check_fields(model, saved, shape)
    if tokens > shape.vocab_size:
        raise ConfigError(
            f"data.tokenizer has {tokens:,} tokens and model.weights={model.weights} embeddings "
            f"for {shape.vocab_size:,}: use the tokenizer of the checkpoint"
        )
    _check_positions(model.weights, shape, sequence_length)
    return shape


def _check_fields(model: ModelSection, saved: PreTrainedConfig, shape: PreTrainedConfig) -> None:
    if not model.fields:
        return
    rule = (
        f"with model.weights={model.weights}, model.fields must not change any weight; given: "
        f"{', '.join(model.fields)}"
    )
    before, after = _shapes(saved), _shapes(shape)
    for name in sorted(before.keys() | after.keys()):
        if before.get(name) != after.get(name):
            raise ConfigError(
                f"{name} has the shape {before.get(name)} in the checkpoint, and would have "
                f"{after.get(name)}: {rule}"
            )
    for name in HEADS:
        was, would = (getattr(config, name, None) for config in (saved, shape))
        if was != would:
            raise ConfigError(f"{name} is {was} in the checkpoint, and would be {would}: {rule}")


def _shapes(config: PreTrainedConfig) -> Shapes:
    """Return the shape of every parameter; tied ones are listed under the first name."""
    return {name: tuple(p.shape) for name, p in meta_model(config).named_parameters()}


def _check_positions(folder: Path, shape: PreTrainedConfig, sequence_length: int) -> None:
    positions = getattr(shape, "max_position_embeddings", None)
    if not isinstance(positions, int) or sequence_length <= positions:
        return
    longer = copy.deepcopy(shape)
    longer.max_position_embeddings = sequence_length
    advice = f"set data.sequence_length={positions} or less"
    if _shapes(longer) == _shapes(shape):
        advice += (
            f", or model.fields.max_position_embeddings={sequence_length}, with model.fields."
            "rope_parameters for that length if necessary"
        )
    raise ConfigError(
        f"data.sequence_length={sequence_length} is more than the {positions} positions that "
        f"model.weights={folder} was trained on; {advice}"
    )


def load_weights(folder: Path, shape: PreTrainedConfig) -> PreTrainedModel:
    """Return a checkpoint's model on the CPU in float32, ready to train; never from the network.

    It has the checkpoint's generation defaults.

    Args:
        folder: folder with safetensors files, in any dtype.
        shape: result of `pretrained_config`.

    Raises:
        CheckpointError: if the files are missing or damaged, lack weights of the model, or contain
            others. Weights that transformers ignores, such as rotary frequencies, are accepted.
    """
    weight_files(folder)
    try:
        check_folder(folder)
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder,
                config=copy.deepcopy(shape),
                dtype=torch.float32,
                attn_implementation="sdpa",
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
            )
    except Exception as error:  # transformers and safetensors each raise their own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the weights in {folder} cannot be loaded: {reason}") from error
    check_all_loaded(report, folder)
    if unexpected := sorted(report["unexpected_keys"]):
        raise CheckpointError(
            f"{folder} contains {len(unexpected)} weights that its model ({shape.model_type}) does "
            f"not have, such as {unexpected[0]}; they would be lost, so use a checkpoint without "
            "them"
        )
    return prepare_for_training(model)


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint.

    Raises:
        CheckpointError: if there is none, or one that the index names is missing.
    """
    if (single := folder / "model.safetensors").is_file():
        return [single]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not folder.is_dir():
            raise CheckpointError(f"model.weights={folder}: there is no such folder")
        raise CheckpointError(
            f"model.weights={folder} contains neither model.safetensors nor {index.name}; save "
            "the weights as safetensors first"
        )
    try:
        names = sorted(set(json.loads(read_text(index))["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} cannot be read: {error}") from error
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise CheckpointError(
            f"{folder} lacks {len(missing)} of its {len(names)} files of weights, such as "
            f"{missing[0]}"
        )
    return [folder / name for name in names]


def hash_files(files: list[Path]) -> dict[str, Any]:
    """Return size and SHA-256 of every file, by name."""
    return {path.name: size_and_hash(path) for path in files}
