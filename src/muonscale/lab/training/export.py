"""From a checkpoint of a run to a Hugging Face folder, in one process, without the optimizer's state."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
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

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.data.tokenizer import open_tokenizer
from muonscale.lab.models.build import build_model, quiet_transformers
from muonscale.lab.models.card import model_card
from muonscale.lab.models.convert import SHARD_SIZE, check_place, save_hf
from muonscale.lab.models.moe.routers import BIAS
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.checkpoint import (
    find_damage,
    folder_name,
    load_facts,
    load_tensors,
    saved_steps,
    whole_checkpoint,
)
from muonscale.lab.training.setup import model_facts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
"""What parameters may be exported in."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was exported, and where to."""

    step: int
    """Optimizer steps after which the checkpoint was saved."""
    folder: Path


def export(
    run: RunFolder,
    step: int | None,
    folder: Path,
    *,
    dtype: str = "float32",
    max_shard_size: str = SHARD_SIZE,
    report: Callable[[str], None],
) -> Exported:
    """Write a checkpoint of a run as a Hugging Face folder with tokenizer and model card.

    The run may be going on meanwhile, and may have been trained by any number of processes.

    Args:
        run: the run folder; it is only read.
        step: which checkpoint; the newest whole one when None.
        folder: where to; see `save_hf`.
        dtype: of the parameters: `float32`, as trained, or `bfloat16`, which rounds every parameter
            but the biases of routers; those, and buffers, stay in float32.
        max_shard_size: largest file of weights, such as `5GB`.
        report: told of every damaged checkpoint that is passed over.

    Raises:
        CheckpointError: for a folder that is not a run or lacks a part, a checkpoint that is missing
            or damaged, or a place that may not be written to.
        ConfigError: for another dtype or size.
    """
    _check_options(dtype, max_shard_size)
    run.saved_config()  # refuses a folder that is no run
    check_place(folder)
    checkpoint = find_checkpoint(run, step, report)
    facts = load_facts(checkpoint)
    tokenizer = run_tokenizer(run)
    model = checkpoint_model(checkpoint, facts, DTYPES[dtype])
    card = _card(run, facts["step"], model)
    save_hf(model, tokenizer, folder, card=card, max_shard_size=max_shard_size)
    return Exported(step=facts["step"], folder=folder)


def _card(run: RunFolder, step: int, model: PreTrainedModel) -> str:
    config, env = run.saved_config(), run.environment()
    try:
        return model_card(config, env, run.read_metrics(), step=step, model=model)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"no model card can be made of config.json, env.json and metrics.jsonl in {run.path} "
            f"({type(error).__name__}: {error}); restore the one that is damaged, or remove env.json"
        ) from error


def _check_options(dtype: str, max_shard_size: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: accepted are {', '.join(DTYPES)}")
    try:
        split_torch_state_dict_into_shards({}, max_shard_size=max_shard_size)
    except ValueError as error:
        raise ConfigError(
            f"--max-shard-size {max_shard_size}: accepted is a number with KB, MB, GB or TB, such as 5GB"
        ) from error


def find_checkpoint(run: RunFolder, step: int | None, report: Callable[[str], None]) -> Path:
    """Return the folder of a whole checkpoint: of a step, or the newest.

    Raises:
        CheckpointError: if there is none, with the steps there are; or if it is damaged.
    """
    root = run.checkpoints
    there = sorted(saved_steps(root))
    if not there:
        raise CheckpointError(
            f"run {run.path} has no checkpoints yet; "
            f"make some with: muonscale train {run.path} --resume"
        )
    if step is None:
        newest = whole_checkpoint(root, report)
        assert newest is not None
        return newest
    if step not in there:
        raise CheckpointError(
            f"run {run.path} has no checkpoint of step {step}; it has those of {_listed(there)}"
            "; give one of these, or none for the newest"
        )
    checkpoint = root / folder_name(step)
    if damage := find_damage(checkpoint):
        raise CheckpointError(
            f"checkpoint {checkpoint} is damaged ({damage}); steps there are: {_listed(there)}"
            "; give another"
        )
    return checkpoint


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps))


def run_tokenizer(run: RunFolder) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a run: its own, or that of its finished model, which is the same.

    Raises:
        CheckpointError: if the run has neither.
    """
    return open_tokenizer(tokenizer_folder(run))


def tokenizer_folder(run: RunFolder) -> Path:
    """Return where the tokenizer of a run is.

    Raises:
        CheckpointError: as `run_tokenizer`.
    """
    for folder in (run.tokenizer, run.model):
        if (folder / "tokenizer.json").is_file():
            return folder
    raise CheckpointError(
        f"run {run.path} has no folder `tokenizer`; write it with: "
        f"muonscale train {run.path} --resume"
    )


def shape_of(facts: dict[str, Any], checkpoint: Path) -> PreTrainedConfig:
    """Return the configuration of a checkpoint's model from what `model_facts` had said of it.

    Raises:
        CheckpointError: where this version of transformers understands it otherwise.
    """
    try:
        with quiet_transformers():
            shape = CONFIG_MAPPING[facts["model_type"]].from_dict(copy.deepcopy(facts))
        again = json.loads(json.dumps(model_facts(shape)))
    except Exception as error:  # every architecture raises what it likes about its values
        raise CheckpointError(
            f"checkpoint {checkpoint} has a model that transformers refuses here: {error}"
            "; use the version in env.json of the run"
        ) from error
    changed = sorted(k for k in facts.keys() | again.keys() if facts.get(k) != again.get(k))
    if changed:
        raise CheckpointError(
            f"checkpoint {checkpoint} has a model that this version of transformers reads otherwise "
            f"({', '.join(changed)}); use the version in env.json of the run"
        )
    return shape


def checkpoint_model(
    checkpoint: Path, facts: dict[str, Any], dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Return the model of a checkpoint on the CPU.

    Args:
        checkpoint: folder of a whole checkpoint.
        facts: what was saved beside it.
        dtype: of its parameters; see `unfilled_model`.

    Raises:
        CheckpointError: as `shape_of`, or if a tensor is missing.
    """
    model = unfilled_model(shape_of(facts["model"], checkpoint), dtype)
    load_tensors(checkpoint, {"model": model.state_dict()}, Processes())
    return model


def unfilled_model(shape: PreTrainedConfig, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Return a model on the CPU whose weights are yet to be written.

    No weight is drawn, and memory is taken when they are written. Tied weights are one, and buffers
    that no checkpoint holds, such as rotary frequencies, have their values.

    Args:
        shape: the model's configuration.
        dtype: of its parameters, except biases of routers, which order experts and lose their order
            when they are rounded. What transformers itself would keep in float32 differs between its
            versions and does not count.
    """
    with no_init_weights():
        model = build_model(shape, seed=0)
    model.tie_weights()
    for name, parameter in model.named_parameters():
        if not name.endswith(BIAS):
            parameter.data = torch.empty_like(parameter, dtype=dtype)
    return model
