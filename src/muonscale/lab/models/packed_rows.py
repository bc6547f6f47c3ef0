"""Models that isolate the conversations packed into a row.

Position ids that restart mark the boundaries of conversations. Not all models of transformers stop
attention there. The models listed here were tested.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError

ISOLATES_CONVERSATIONS = (
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
"""Values of model_type. A conversation in a row has the logits that it has alone."""


def check_isolates_conversations(shape: PreTrainedConfig) -> None:
    """Check that the conversations of a row do not attend to each other.

    Raises:
        ConfigError: naming the models that isolate them.
    """
    if shape.model_type not in ISOLATES_CONVERSATIONS:
        raise ConfigError(
            f"data.format=chat packs several conversations into a row, and model_type "
            f"{shape.model_type!r} is not known to isolate them; accepted: "
            f"{', '.join(ISOLATES_CONVERSATIONS)}"
        )
