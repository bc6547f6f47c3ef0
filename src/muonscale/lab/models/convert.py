"""Save and load models as standard Hugging Face checkpoints.

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
from muonscale.lab.files import check_folder, free_space, sync_folder, sync_tree
from muonscale.lab.models.contexts import quiet_transformers

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
SHARD_SIZE = "5GB"
"""Maximum size of a file of weights; a larger tensor has its own file."""
MAKE_ROOM = "remove the cause, or give another folder"
"""What to do if a folder cannot be written."""


def save_hf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str | None = None,
    max_shard_size: str = SHARD_SIZE,
    advice: str = MAKE_ROOM,
) -> None:
    """Write a model and its tokenizer as a Hugging Face checkpoint.

    The files are written to a hidden folder beside `folder`, which is then renamed: a reader sees a
    complete checkpoint or none. An earlier checkpoint there is replaced. The model is not changed.
    The key-value cache, off in training, is on in the files.

    Args:
        model: model on the CPU; its weights are written in their own dtypes.
        tokenizer: its tokenizer.
        folder: target folder.
        card: text of README.md, or None.
        max_shard_size: maximum size of a file, such as `5GB`; several files get an index.
        advice: what to do if it cannot be written, for the error.

    Raises:
        CheckpointError: if `folder` contains anything but a checkpoint, or cannot be written.
    """
    check_target(folder)
    try:
        with _replace(folder.absolute()) as fresh:
            with quiet_transformers():
                model.save_pretrained(fresh, max_shard_size=max_shard_size)
                model.generation_config.save_pretrained(fresh)
            for weights in fresh.glob(
                "*.safetensors"
            ):  # save_pretrained gives only the owner access
                weights.chmod((fresh / "config.json").stat().st_mode)
            _edit(fresh / "config.json", _add_old_names)
            _edit(fresh / "generation_config.json", _set_generation_defaults)
            _write_tokenizer(tokenizer, fresh)
            if card is not None:
                (fresh / "README.md").write_text(card, encoding="utf-8")
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own
        raise _unwritten("the model", folder, error, advice) from error


def check_target(folder: Path) -> None:
    """Check that a checkpoint may be written to a folder.

    Raises:
        CheckpointError: if it exists, is not empty, and is not a checkpoint.
    """
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {"a file"}
    if names and ("config.json" not in names or names.isdisjoint(WEIGHTS)):
        raise CheckpointError(
            f"{folder} exists and is not an exported model, and is not overwritten; give a new or "
            "an empty folder"
        )


def save_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, advice: str = MAKE_ROOM
) -> None:
    """Write a tokenizer without a model, replacing an existing one; `advice` as for `save_hf`.

    Raises:
        CheckpointError: if it cannot be written.
    """
    try:
        with _replace(folder.absolute()) as fresh:
            _write_tokenizer(tokenizer, fresh)
    except Exception as error:  # as in save_hf
        raise _unwritten("the tokenizer", folder, error, advice) from error


def _unwritten(what: str, folder: Path, error: Exception, advice: str) -> CheckpointError:
    place = next(path for path in folder.absolute().parents if path.exists())
    reason = " ".join(str(error).split()) or type(error).__name__
    return CheckpointError(
        f"{what} cannot be written to {folder}: {reason} ({free_space(place)}); {advice}"
    )


@contextmanager
def _replace(folder: Path) -> Generator[Path]:
    """Yield a hidden folder beside `folder`; sync and rename it to `folder` after the block."""
    fresh = folder.with_name(f".{folder.name}.{os.getpid()}.new")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        sync_tree(fresh)
        old = fresh.with_suffix(".old")
        if folder.exists():
            folder.rename(old)  # a folder with files cannot be renamed over
        fresh.rename(folder)
        sync_folder(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)


def _write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    with quiet_transformers():
        tokenizer.save_pretrained(folder)
    _edit(folder / "tokenizer_config.json", _use_old_tokenizer_class)


def _edit(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    tree = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _add_old_names(config: dict[str, Any]) -> dict[str, Any]:
    """Add transformers 4's names of renamed fields, and turn the cache on."""
    config["use_cache"] = True
    if "dtype" in config:
        config["torch_dtype"] = config["dtype"]
    rope = config.get("rope_parameters") or {}
    if "full_attention" in rope:  # Gemma 3 has one set for each kind of layer
        config["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
        rope = rope["full_attention"]
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            config[name] = rope[name]
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = rope
    return config


def _set_generation_defaults(generation: dict[str, Any]) -> dict[str, Any]:
    generation.pop("_from_model_config", None)
    generation["use_cache"] = True
    eos = generation.get("eos_token_id")
    if generation.get("pad_token_id") is None and eos is not None:
        generation["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    return generation


def _use_old_tokenizer_class(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """Use the class name of transformers 4, which transformers 5 also supports."""
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
    return tokenizer


def load_hf(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer from a Hugging Face checkpoint folder, never from the network.

    Returns:
        The model on the CPU, in the dtype it was saved in, in evaluation mode, and the tokenizer.

    Raises:
        CheckpointError: if the folder is missing, is not a checkpoint, or lacks weights.
    """
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not a Hugging Face checkpoint: it has no config.json; give a run "
            "folder, or a folder that export wrote"
        )
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        check_folder(folder)
        with quiet_transformers():
            model, report = AutoModelForCausalLM.from_pretrained(
                folder, attn_implementation="sdpa", output_loading_info=True, **options
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # transformers, safetensors and tokenizers each raise their own
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{folder} cannot be loaded as a checkpoint: {reason}") from error
    check_all_loaded(report, folder)
    assert tokenizer is not None
    return model, tokenizer


def check_all_loaded(report: dict[str, Any], folder: Path) -> None:
    """Check that no weights were missing: transformers initializes them randomly and only warns.

    Args:
        report: the loading info of transformers.
        folder: folder of the checkpoint.

    Raises:
        CheckpointError: if any are missing.
    """
    if missing := sorted(report["missing_keys"]) + sorted(map(str, report["mismatched_keys"])):
        raise CheckpointError(
            f"{folder} lacks {len(missing)} weights of its model, such as {missing[0]}"
        )
