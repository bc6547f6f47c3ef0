"""Models that isolate the conversations or documents packed into a row.

Position ids that restart mark their boundaries. Not all models of transformers stop
attention there. The models listed here were tested.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from muonscale.errors import ConfigError
from muonscale.lab.config.sections import DataSection

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


def check_isolates_conversations(shape: PreTrainedConfig, data: DataSection) -> None:
    """Check that conversations, and documents under a document mask, do not attend to each other.

    Raises:
        ConfigError: naming the models that isolate them.
    """
    if shape.model_type in ISOLATES_CONVERSATIONS or not (data.has_chats or data.document_mask):
        return
    key = "data.document_mask=true" if data.document_mask else "data.format=chat"
    raise ConfigError(
        f"{key}: several texts are in a row, and model_type {shape.model_type!r} is not known to "
        f"isolate them; accepted: {', '.join(ISOLATES_CONVERSATIONS)}"
    )
