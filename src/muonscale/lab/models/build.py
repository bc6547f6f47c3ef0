"""Models with fresh weights, ready to train, and their shapes on the meta device."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.models.config import one_line
from muonscale.lab.models.contexts import quiet_transformers, seed_rng
from muonscale.lab.models.structure import expert_modules

GROUPED_ROWS = 8
"""Torch's grouped products need rows of a multiple of 16 bytes: 8 elements in 16 bits."""


def build_model(
    config: PreTrainedConfig, *, seed: int, device: torch.device | str = "cpu"
) -> PreTrainedModel:
    """Return a float32 model with fresh weights, ready to train.

    The weights are initialized on the CPU, so that a seed gives the same ones on every device. The
    global random number generators and `config` do not change. Attention is `sdpa`, and the
    key-value cache is off.

    Raises:
        ConfigError: if transformers cannot build a model of this configuration.
    """
    with seed_rng(seed):
        model = _from_config(config, "cpu")
    return model.to(device)  # pyrefly: ignore


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """Return the model of `build_model` on the meta device: shapes without storage.

    Raises:
        ConfigError: if transformers cannot build a model of this configuration.
    """
    with seed_rng(0):
        return _from_config(config, "meta")


def _from_config(config: PreTrainedConfig, device: str) -> PreTrainedModel:
    try:
        with quiet_transformers(), torch.device(device):
            model = AutoModelForCausalLM.from_config(
                copy.deepcopy(config), dtype=torch.float32, attn_implementation="sdpa"
            )
    except Exception as error:  # architectures raise errors of any class
        raise ConfigError(
            f"transformers cannot build a {config.model_type} model of this configuration: "
            f"{one_line(error)}"
        ) from error
    return prepare_for_training(model)


def prepare_for_training(model: PreTrainedModel) -> PreTrainedModel:
    """Turn off the key-value cache, and padding: its embedding row would get no gradient.

    Experts whose shapes grouped products do not support are computed one by one.
    """
    model.config.use_cache = False
    sides = [
        side
        for module in expert_modules(model).values()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim == 3
        for side in parameter.shape[1:]
    ]
    grouped = model.config._experts_implementation == "grouped_mm"
    if grouped and any(side % GROUPED_ROWS for side in sides):
        model.set_experts_implementation("eager")
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None
    return model
