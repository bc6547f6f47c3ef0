"""Which models keep the conversations of a row apart.

Transformers derives from position ids that begin again where attention has to stop, but some models
take such ids and do not look at them for that. Here are those that were seen to.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError

KEEPS_APART = (
    "deepseek_v2",
    "deepseek_v3",
    "dots1",
    "gemma",
    "gemma3_text",
    "glm4",
    "glm4_moe",
    "gpt2",
    "gpt_neox",
    "granite",
    "granitemoe",
    "llama",
    "ministral",
    "mistral",
    "mixtral",
    "olmo",
    "olmo2",
    "olmo3",
    "olmoe",
    "phi",
    "phi3",
    "qwen2",
    "qwen2_moe",
    "qwen3",
    "qwen3_moe",
    "smollm3",
    "stablelm",
    "starcoder2",
)
"""By model_type: in a row of several, every conversation has the logits that it has alone."""


def check_keeps_apart(shape: PreTrainedConfig) -> None:
    """Refuse a model that might see one conversation in the middle of another.

    Raises:
        ConfigError: naming the models that do not.
    """
    if shape.model_type not in KEEPS_APART:
        raise ConfigError(
            f"data.format=chat: a row holds several conversations, and model_type "
            f"{shape.model_type!r} is not known to keep them apart; accepted: {', '.join(KEEPS_APART)}"
        )
