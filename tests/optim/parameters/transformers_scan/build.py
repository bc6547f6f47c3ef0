"""Every model class of the installed transformers that builds on the meta device."""

from __future__ import annotations

import contextlib
import copy
import signal
from collections.abc import Iterator
from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

MAPPINGS = [
    "CAUSAL_LM",
    "IMAGE_TEXT_TO_TEXT",
    "MULTIMODAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "SPEECH_SEQ_2_SEQ",
    "MASKED_LM",
    "PRETRAINING",
    "IMAGE_CLASSIFICATION",
    "CTC",
    "AUDIO_CLASSIFICATION",
]
"""Auto mappings whose classes are built; of a model type in none of them, the plain model is."""
DEPTHS = {
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "encoder_layers",
    "decoder_layers",
    "num_decoder_layers",
    "num_encoder_layers",
    "num_hidden_layers_text",
    "depth",
}
KINDS = {"layer_types", "mlp_layer_types", "layers_block_type", "block_types", "attention_types"}
LAYERS = 4


def model_classes(mappings: list[str] = MAPPINGS) -> list[tuple[str, str]]:
    """Return (model type, class name) of the classes to build."""
    pairs: dict[tuple[str, str], None] = {}
    for mapping in mappings:
        for kind, names in _mapping(f"MODEL_FOR_{mapping}_MAPPING_NAMES"):
            for name in [names] if isinstance(names, str) else names:
                pairs[kind, name] = None
    if mappings is MAPPINGS:
        seen = {kind for kind, _ in pairs}
        for kind, names in _mapping("MODEL_MAPPING_NAMES"):
            for name in [names] if isinstance(names, str) else names:
                if kind not in seen:
                    pairs[kind, name] = None
    return list(pairs)


def _mapping(name: str) -> list[tuple[str, Any]]:
    return list(getattr(modeling_auto, name, {}).items())


def build(model_type: str, name: str, seconds: int = 60, **changes: Any) -> nn.Module:
    """Return a model of the default configuration on the meta device, with few layers if it can.

    Raises whatever transformers raises where the default configuration makes no model.
    """
    cls = getattr(transformers, name)
    config = CONFIG_MAPPING[model_type]()
    for key, value in changes.items():
        setattr(config, key, value)
    with time_limit(seconds):
        try:
            return _on_meta(cls, _shortened(config))
        except TimeoutError:
            raise
        except Exception:  # a model that needs its own number of layers
            return _on_meta(cls, config)


def _on_meta(cls: Any, config: Any) -> nn.Module:
    with torch.device("meta"):
        return cls(config)


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raise `TimeoutError` in what runs longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not built within {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _shortened(config: Any) -> Any:
    config = copy.deepcopy(config)
    _shorten(config)
    return config


def _shorten(config: Any) -> None:
    for key, value in list(vars(config).items()):
        with contextlib.suppress(Exception):  # some fields are computed
            if hasattr(value, "model_type"):
                _shorten(value)
            elif key in DEPTHS and isinstance(value, int) and value > LAYERS:
                setattr(config, key, LAYERS)
            elif key in KINDS and isinstance(value, list) and len(value) > LAYERS:
                setattr(config, key, _one_of_each(value))


def _one_of_each(kinds: list[Any]) -> list[Any]:
    """Return `LAYERS` kinds of layers: one of each first, in the order of the model."""
    chosen = list(range(LAYERS))
    for kind in dict.fromkeys(map(str, kinds)):
        here = [str(kinds[i]) for i in chosen]
        if kind not in here:
            double = [i for i in reversed(range(LAYERS)) if here.count(here[i]) > 1]
            if double:
                chosen[double[0]] = list(map(str, kinds)).index(kind)
    return [kinds[i] for i in sorted(chosen)]
