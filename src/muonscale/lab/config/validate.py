"""Validation of a configuration, with errors that name the key, the value and what is accepted."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from muonscale.errors import ConfigError, nearest, shown

ModelT = TypeVar("ModelT", bound=BaseModel)

_QUANTIZED = (
    "frozen weights are not quantized (QLoRA); train an adapter on whole weights with adapter.rank, "
    "sharded by parallel.data=fsdp, and quantize the export"
)
_INFILLING = (
    "text is not rearranged for fill-in-the-middle; write the rearranged documents with their "
    "special tokens into files, and train on them with data.path and data.tokenizer"
)
_CUT = (
    "no layers and no sequences are spread over devices one after the other; use parallel.data, "
    "parallel.tensor with parallel.sequence, and train.activation_checkpointing"
)
LEFT_OUT = {
    **dict.fromkeys(
        ("quantize", "quantization", "bits", "load_in_4bit", "load_in_8bit"), _QUANTIZED
    ),
    **dict.fromkeys(("fim", "fim_rate", "fim_spm_rate"), _INFILLING),
    **dict.fromkeys(("pipeline", "context"), _CUT),
}
"""Keys of other trainers for what this one does not do: the reason, and what to do instead."""


def validate(model: type[ModelT], tree: dict[str, Any]) -> ModelT:
    """Return a configuration from its keys and values.

    Raises:
        ConfigError: for an unknown or missing key, or a value that is not accepted.
    """
    _refuse_odd_text(tree)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise ConfigError("\n".join(_sentence(model, item) for item in error.errors())) from None


def _refuse_odd_text(tree: Any, key: str = "") -> None:
    """Refuse a NUL and half a surrogate pair, which no file, path or console can hold."""
    if isinstance(tree, str) and ("\0" in tree or any("\ud800" <= c <= "\udfff" for c in tree)):
        raise ConfigError(f"{key or 'a key'}={shown(tree)} contains a NUL or a lone surrogate")
    prefix = f"{key}." if key else ""
    if isinstance(tree, dict):
        for name, value in tree.items():
            _refuse_odd_text(name)
            _refuse_odd_text(value, f"{prefix}{name}")
    elif isinstance(tree, list):
        for number, value in enumerate(tree):
            _refuse_odd_text(value, f"{prefix}{number}")


def _sentence(model: type[BaseModel], item: Any) -> str:
    """Turn one error of pydantic into a sentence."""
    *parents, leaf = (str(part) for part in item["loc"]) if item["loc"] else ("",)
    key = ".".join([*parents, leaf])
    message, whole = item["msg"].removeprefix("Value error, "), model
    match item["type"]:
        case "extra_forbidden":
            for name in parents:  # the rest are numbers of items, or names in a mapping
                if name in model.model_fields:
                    model = section_in(model.model_fields[name].annotation) or model
            elsewhere = [
                f"{name}.{leaf}"
                for name, field in whole.model_fields.items()
                if parents and leaf in keys_in(field.annotation)
            ]
            hint = f"did you mean {' or '.join(elsewhere)}?" if elsewhere else ""
            left_out = LEFT_OUT.get(leaf) if parents else None
            return f"unknown key {key}; {hint or left_out or nearest(leaf, model.model_fields)}"
        case "missing":
            return f"{key} is required; give it in the recipe or as {key}=VALUE"
        case "value_error":
            return message
    return f"{key}={shown(item['input'])}: {message}"


def keys_in(annotation: Any) -> list[str]:
    """Return the keys of the section in an annotation; none if there is no section in it."""
    section = section_in(annotation)
    return [] if section is None else list(section.model_fields)


def section_in(annotation: Any) -> type[BaseModel] | None:
    """Return the section in an annotation such as `Section`, `list[Section] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := section_in(part))), None)
