"""LoRA adapters of a model, made by the `peft` package: added in place, merged into a plain model.

LoRA (Hu et al., arXiv 2106.09685) freezes the weights of a model and adds to a linear layer W the
product (alpha / rank) B A of two trained matrices; B starts at 0. The model remains one of
transformers, whose adapted layers are those of peft.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import AdapterSection
from muonscale.lab.models.build import build_model
from muonscale.lab.models.config import one_line
from muonscale.lab.models.contexts import seed_rng

if TYPE_CHECKING:
    from peft import LoraConfig

NAME = "default"
"""What peft calls the adapter."""


def _lora_config(section: AdapterSection) -> LoraConfig:
    """Return peft's configuration of the adapter.

    Raises:
        ConfigError: if peft is not installed.
    """
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ConfigError(
            f"adapter.rank={section.rank} needs the package peft: pip install 'muonscale[lora]'"
        ) from error
    assert section.rank is not None
    return LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha or 2 * section.rank,  # pyrefly: ignore [bad-argument-type]
        lora_dropout=section.dropout,
        target_modules=section.targets or "all-linear",
        task_type="CAUSAL_LM",
    )


def add_adapter(model: PreTrainedModel, section: AdapterSection, seed: int) -> None:
    """Freeze a model, on any device, and add trained factors to its layers; nothing without a rank.

    Raises:
        ConfigError: if peft is not installed, or the model has none of the layers.
    """
    if section.rank is None:
        return
    config = _lora_config(section)
    from peft import inject_adapter_in_model

    try:
        with seed_rng(seed):
            inject_adapter_in_model(config, model, NAME)
    except ValueError as error:
        raise ConfigError(f"adapter.targets={section.targets}: {one_line(error)}") from error


def copy_adapter(source: PreTrainedModel, model: PreTrainedModel) -> None:
    """Add the adapter of another model to a model, untrained; nothing if it has none."""
    if is_adapted(source):
        from peft import inject_adapter_in_model

        inject_adapter_in_model(copy.deepcopy(source.peft_config[NAME]), model, NAME)  # pyrefly: ignore


def _layers(model: PreTrainedModel) -> dict[str, Any]:
    """Return the adapted layers by name."""
    from peft.tuners.lora import LoraLayer

    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLayer)}


def is_adapted(model: PreTrainedModel) -> bool:
    """Return whether a model has an adapter."""
    return getattr(model, "peft_config", None) is not None


@torch.no_grad()
def merge_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return a plain model with the products added to its weights; a plain one is returned itself.

    Args:
        model: an adapted model on the CPU or one device, not sharded; it is not changed.
    """
    if not is_adapted(model):
        return model
    merged = build_model(model.config, seed=0)
    merged.generation_config = model.generation_config
    layers = _layers(model)
    state = {}
    for key, value in model.state_dict().items():
        if ".lora_" in key:
            continue
        name, _, leaf = key.rpartition(".base_layer.")
        if name in layers and leaf == "weight":
            value = value + layers[name].get_delta_weight(NAME).to(value.dtype)
        state[f"{name}.{leaf}" if name else key] = value
    merged.load_state_dict(state)
    return merged


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Write the adapter of a model in the format of peft, for `PeftModel.from_pretrained`."""
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=NAME)
    whole = {f"base_model.model.{key}": value.contiguous().cpu() for key, value in state.items()}
    save_file(whole, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    model.peft_config[NAME].save_pretrained(str(folder))  # pyrefly: ignore
