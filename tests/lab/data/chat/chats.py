"""Conversations, tokenizers and templates for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "rivers"]
MARKERS = ["<|start|>", "<|end|>"]

CHATML = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""Does not mark the assistant's words."""

MARKED = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}<|end|>{% endgeneration %}"
    "{% else %}{{ m['content'] }}<|end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""Writes the same, and marks them."""


def characters_tokenizer(folder: Path, template: str | None = None) -> str:
    """Save a tokenizer with a token for every byte and return its folder.

    It has an end of text, a beginning of text of its own, and two tokens that mark turns.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<|endoftext|>", "<|begin|>", *MARKERS]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*specials, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|endoftext|>", bos_token="<|begin|>"
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(str(folder))
    return str(folder)


def turns(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    """Return a conversation in which user and assistant take turns."""
    roles = ["user", "assistant"] * len(contents)
    said = [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]
    return said if system is None else [{"role": "system", "content": system}, *said]


def conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return conversations of one to three exchanges, all different."""
    rng = np.random.default_rng(seed)
    found = []
    for number in range(count):
        said = []
        for _ in range(rng.integers(1, 4)):
            question = " ".join(rng.choice(WORDS, rng.integers(1, 4)))
            said += [f"{number} {question}?", question[::-1]]
        found.append(turns(*said, system="Answer." if number % 5 == 0 else None))
    return found


def write_chats(path: Path, chats: list[Any], field: str = "messages") -> Path:
    """Write conversations as JSONL and return the path."""
    path.write_text("".join(json.dumps({field: chat}) + "\n" for chat in chats), encoding="utf-8")
    return path
