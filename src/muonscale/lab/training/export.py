"""Export a checkpoint of a run to a Hugging Face folder, in one process."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from transformers import (
    CONFIG_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.initialization import no_init_weights

from muonscale.errors import CheckpointError, ConfigError, command_line
from muonscale.lab.config.sections import AdapterSection
from muonscale.lab.data.tokenizer import open_tokenizer
from muonscale.lab.models.adapter import add_adapter, merge_adapter
from muonscale.lab.models.build import build_model
from muonscale.lab.models.card import model_card
from muonscale.lab.models.contexts import quiet_transformers
from muonscale.lab.models.convert import SHARD_SIZE, check_target, save_hf
from muonscale.lab.models.moe.routers import BIAS
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.checkpoint import (
    find_damage,
    folder_name,
    load_facts,
    load_tensors,
    newest_intact_checkpoint,
    saved_steps,
)
from muonscale.lab.training.setup import model_facts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""Dtypes that parameters can be exported in."""


def export(
    run: RunFolder,
    step: int | None,
    folder: Path,
    *,
    dtype: str = "float32",
    max_shard_size: str = SHARD_SIZE,
    average: bool = False,
    report: Callable[[str], None],
) -> int:
    """Write a checkpoint of a run as a Hugging Face folder with tokenizer and model card.

    The run may still be training, on any number of processes.

    Args:
        run: the run folder; it is only read.
        step: step of the checkpoint; the newest complete one by default.
        folder: target folder; see `save_hf`.
        dtype: dtype of the parameters: `float32`, as trained, or `bfloat16`, which rounds all
            parameters except router biases. Those and buffers stay in float32.
        max_shard_size: largest file of weights, such as `5GB`.
        average: write the average of the weights (`train.average`) in place of the weights.
        report: called for every damaged checkpoint that is skipped.

    Returns:
        The optimizer steps of the checkpoint.

    Raises:
        CheckpointError: for a folder that is not a run or lacks a part, a checkpoint that is
            missing or damaged, or a folder that must not be overwritten.
        ConfigError: for another dtype or size.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: accepted: {', '.join(DTYPES)}")
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(
            f"--max-shard-size {max_shard_size}: accepted: a number with KB, MB, GB or TB, such as "
            "5GB"
        ) from error
    config = run.saved_config()  # refuses a folder that is not a run
    check_target(folder)
    checkpoint = find_checkpoint(run, step, report)
    facts = load_facts(checkpoint)
    if average and not facts.get("averaged"):
        raise CheckpointError(
            f"checkpoint {checkpoint} has no average of the weights; train with train.average=ema, "
            "and export a step after train.average_from"
        )
    tokenizer = run_tokenizer(run)
    model = checkpoint_model(checkpoint, facts, DTYPES[dtype], average=average)
    env = run.environment()
    try:
        card = model_card(
            config, env, run.read_metrics(), step=facts["step"], model=model, averaged=average
        )
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"no model card can be made from config.json, env.json and metrics.jsonl in {run.path} "
            f"({type(error).__name__}: {error}); restore the one that is damaged, or remove "
            "env.json"
        ) from error
    save_hf(model, tokenizer, folder, card=card, max_shard_size=max_shard_size)
    return facts["step"]


def find_checkpoint(run: RunFolder, step: int | None, report: Callable[[str], None]) -> Path:
    """Return the folder of a complete checkpoint: of a step, or the newest.

    Raises:
        CheckpointError: if there is none, with the existing steps; or if it is damaged.
    """
    root = run.checkpoints
    steps = sorted(saved_steps(root))
    if not steps:
        raise CheckpointError(
            f"run {run.path} has no checkpoints yet; "
            f"make some with: {command_line('train', run.path, '--resume')}"
        )
    if step is None:
        newest = newest_intact_checkpoint(root, report)
        assert newest is not None
        return newest
    listed = ", ".join(map(str, steps))
    if step not in steps:
        raise CheckpointError(
            f"run {run.path} has no checkpoint of step {step}; it has those of {listed}"
        )
    checkpoint = root / folder_name(step)
    if damage := find_damage(checkpoint):
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged ({damage}); the run has checkpoints of {listed}"
        )
    return checkpoint


def run_tokenizer(run: RunFolder) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a run, from its own folder or that of its finished model.

    Raises:
        CheckpointError: if the run has neither.
    """
    return open_tokenizer(tokenizer_folder(run))


def tokenizer_folder(run: RunFolder) -> Path:
    """Return the folder of a run's tokenizer.

    Raises:
        CheckpointError: as `run_tokenizer`.
    """
    for folder in (run.tokenizer, run.model):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise CheckpointError(
        f"run {run.path} has no folder `tokenizer`; write it with: "
        f"{command_line('train', run.path, '--resume')}"
    )


def shape_of(facts: dict[str, Any], checkpoint: Path) -> PreTrainedConfig:
    """Return the configuration of a checkpoint's model from its `model_facts`.

    Raises:
        CheckpointError: if this version of transformers reads it differently.
    """
    try:
        with quiet_transformers():
            shape = CONFIG_MAPPING[facts["model_type"]].from_dict(copy.deepcopy(facts))
        again = json.loads(json.dumps(model_facts(shape)))
    except Exception as error:  # architectures raise errors of any class
        raise CheckpointError(
            f"this version of transformers refuses the model of checkpoint {checkpoint}: {error}; "
            "use the version in env.json of the run"
        ) from error
    changed = sorted(k for k in facts.keys() | again.keys() if facts.get(k) != again.get(k))
    if changed:
        raise CheckpointError(
            f"this version of transformers reads the model of checkpoint {checkpoint} differently "
            f"({', '.join(changed)}); use the version in env.json of the run"
        )
    return shape


def checkpoint_model(
    checkpoint: Path,
    facts: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    *,
    average: bool = False,
) -> PreTrainedModel:
    """Return the model of a checkpoint on the CPU; an adapter is merged into it.

    Args:
        checkpoint: folder of a complete checkpoint.
        facts: its `facts.json`.
        dtype: dtype of its parameters; see `unfilled_model`.
        average: take the average of the weights, of the parameters that were trained.

    Raises:
        CheckpointError: as `shape_of`, or if a tensor is missing.
    """
    adapter = facts.get("adapter")
    model = unfilled_model(
        shape_of(facts["model"], checkpoint), torch.float32 if adapter else dtype
    )
    if adapter:
        add_adapter(model, AdapterSection(**adapter), seed=0)
    load_tensors(checkpoint, {"model": model.state_dict()}, Processes())
    if average:
        parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        load_tensors(checkpoint, {"average": parameters}, Processes())
    if adapter:
        model = merge_adapter(model)
        for name, parameter in model.named_parameters():
            if not name.endswith(BIAS):
                parameter.data = parameter.data.to(dtype)
    return model


def unfilled_model(shape: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model on the CPU with uninitialized weights.

    Tied weights are shared. Buffers that checkpoints do not contain, such as rotary frequencies,
    have their values. Memory is allocated when the weights are written.

    Args:
        shape: the model's configuration.
        dtype: dtype of its parameters, except router biases: rounding them would change the order
            of experts. The parameters that transformers keeps in float32 differ between its
            versions and are not exempt.
    """
    with no_init_weights():
        model = build_model(shape, seed=0)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if not name.endswith(BIAS):
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    return model
