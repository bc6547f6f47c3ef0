"""The parameter groups of a configuration, and their scaling with the width of the model."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config
from muonscale.lab.config.sections import ModelSection, OptimizerSection
from muonscale.lab.models.build import meta_model
from muonscale.lab.models.config import model_config
from muonscale.optim.parameters.groups import parameter_groups
from muonscale.transfer.apply import Parametrization
from muonscale.transfer.parametrization import parametrize


def build_param_groups(model: nn.Module, section: OptimizerSection) -> list[dict[str, Any]]:
    """Return the parameter groups of a model, on any device, as `optimizer.*` defines them."""
    return parameter_groups(
        model,
        lr=section.lr,
        weight_decay=section.weight_decay,
        adamw_lr=section.adamw_lr,
        rule=section.rule,
        overrides=section.overrides,
        heads=section.heads,
        convolutions=section.convolutions,
    )


def plan_transfer(config: Config, shape: PreTrainedConfig) -> Parametrization | None:
    """Return the multipliers of a model for `transfer.base`, or None if it is not set.

    Args:
        config: the configuration of the run.
        shape: the Hugging Face configuration of its model.

    Raises:
        ConfigError: for a base that cannot be used, or a model that transfer does not support.
    """
    section = config.transfer
    if section.base is None:
        return None
    model = meta_model(shape)
    return parametrize(
        model,
        meta_model(base_shape(config, shape)),
        build_param_groups(model, config.optimizer),
        convention=section.convention,
        depth=section.depth,
        defaults=config.optimizer.model_dump(),
    )


def base_shape(config: Config, shape: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the model at base width: `shape` changed by `transfer.base`.

    Vocabulary and positions are those of `shape`.
    """
    base = config.transfer.base
    if isinstance(base, str):
        model = ModelSection(preset=base)
    else:
        model = config.model.model_copy(update={"fields": config.model.fields | (base or {})})
    try:
        return model_config(
            model,
            vocab_size=shape.vocab_size,
            sequence_length=getattr(shape, "max_position_embeddings", config.data.sequence_length),
            bos_id=shape.bos_token_id,
            eos_id=shape.eos_token_id,
        )
    except ConfigError as error:
        text = str(error).replace("model.fields", "transfer.base")
        text = text.replace("model.preset", "transfer.base")
        starts = ("transfer.base", "unknown transfer.base", "unknown field transfer.base")
        prefix = "" if text.startswith(starts) else f"transfer.base={base}: "
        raise ConfigError(prefix + text) from error
