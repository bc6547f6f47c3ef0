"""Models in and out as standard Hugging Face checkpoints.

An export is a folder of safetensors weights, `config.json`, `generation_config.json`, the
tokenizer's files and a model card, which transformers 4 and 5 load without this package.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from muonscale.errors import CheckpointError
from muonscale.lab.models.build import quiet_transformers

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SHARD_SIZE = "5GB"
"""Largest file of weights, unless one tensor is larger."""


def save_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str | None = None,
    max_shard_size: str = SHARD_SIZE,
) -> None:
    """Write a model and its tokenizer as a Hugging Face checkpoint.

    The files are written to a hidden folder beside `folder`, which is then renamed: a reader sees a
    whole checkpoint or none. An earlier checkpoint there is replaced. The model is not changed;
    the key-value cache, off in training, is on in the files.

    Args:
        model: on the CPU; its weights are written in their own dtypes.
        tokenizer: its tokenizer.
        folder: where to.
        card: text of README.md, or none.
        max_shard_size: largest file of weights, such as `5GB`; more than one file has an index.

    Raises:
        CheckpointError: if `folder` holds something else than a checkpoint, or cannot be written.
    """
    check_place(folder)
    try:
        with _replaced(folder.absolute()) as fresh:
            _write(model, tokenizer, fresh, max_shard_size)
            if card is not None:
                (fresh / "README.md").write_text(card, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(
            f"the model cannot be written to {folder}: {error}"
            "; choose a folder with room that you may write to"
        ) from error


def check_place(folder: Path) -> None:
    """Refuse a folder that a checkpoint may not be written to.

    Raises:
        CheckpointError: if it exists, is not empty, and is not a checkpoint.
    """
    if folder.exists() and not _replaceable(folder):
        raise CheckpointError(
            f"{folder} exists and is not an exported model; it is left as it is. "
            "Give a new or an empty folder."
        )


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write a tokenizer alone, in place of one that is there.

    Raises:
        CheckpointError: if it cannot be written.
    """
    try:
        with _replaced(folder.absolute()) as fresh:
            _write_tokenizer(tokenizer, fresh)
    except OSError as error:
        raise CheckpointError(
            f"the tokenizer cannot be written to {folder}: {error}"
            "; choose a folder with room that you may write to"
        ) from error


@contextmanager
def _replaced(folder: Path) -> Generator[Path]:
    """Yield a hidden folder beside another one, whose place it takes if the block ends well."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        _replace(fresh, folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _replaceable(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    names = {path.name for path in folder.iterdir()}
    return not names or ("config.json" in names and not names.isdisjoint(WEIGHTS))


def _replace(fresh: Path, folder: Path) -> None:
    old = fresh.with_suffix(".old")
    if folder.exists():
        folder.rename(old)  # a folder with files cannot be renamed over
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, max_shard_size: str
) -> None:
    with quiet_transformers():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        model.generation_config.save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):  # written for the owner alone
        weights.chmod((folder / "config.json").stat().st_mode)
    _edit(folder / "config.json", _both_spellings)
    _edit(folder / "generation_config.json", _generation_defaults)
    _write_tokenizer(tokenizer, folder)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", _known_tokenizer_class)


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    tree = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _both_spellings(config: dict[str, Any]) -> dict[str, Any]:
    """Add transformers 4's names of the fields that transformers 5 renamed, and turn the cache on."""
    config["use_cache"] = True
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma 3: one set for each kind of layer
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            config[name] = rope[name]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    return config


def _generation_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    generation.pop("_from_model_config", None)
    generation["use_cache"] = True
    eos = generation.get("eos_token_id")
    if generation.get("pad_token_id") is None and eos is not None:
        generation["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return generation


def _known_tokenizer_class(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Name the class of transformers 4, which transformers 5 also knows."""
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    return tokenizer


def load_hf(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a Hugging Face checkpoint folder, never from the network.

    Returns:
        The model on the CPU, in the dtype it was saved in, in evaluation mode, and the tokenizer.

    Raises:
        CheckpointError: if the folder is missing, is not a checkpoint, or lacks some weights.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not a Hugging Face checkpoint: it has no config.json"
            "; give a run folder, or a folder that export wrote"
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="sdpa", output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{folder} cannot be loaded as a checkpoint: {reason}"
            "; give one that export wrote, or transformers' save_pretrained"
        ) from error
    refuse_missing(report, folder)
    assert tokenizer is not None
    return model, tokenizer


def refuse_missing(report: dict[str, Any], folder: Path) -> None:
    """Refuse a checkpoint that lacks weights: transformers fills in random numbers and only warns.

    Args:
        report: what transformers says of loading it.
        folder: of the checkpoint.

    Raises:
        CheckpointError: if any are missing.
    """
    if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of its model, such as {missing[0]}"
            "; give a folder with all of them"
        )
