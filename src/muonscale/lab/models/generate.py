"""Text from a model, through transformers' `generate`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.models.build import quiet_transformers, seeded_rng
from muonscale.lab.models.loss import evaluating


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
) -> str:
    """Return the prompt and the text the model writes after it.

    The text ends after `tokens` tokens or at the end-of-text token. Where it outgrows the model's
    positions, the model goes on from the last half of them, so that every token is predicted from
    at least that much of the text. Only the options given here apply, not the checkpoint's own
    defaults for generation. Training is not disturbed: the random number generators and the
    model are afterwards what they were.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: how the text begins; empty for a new text, after the end-of-text token.
        tokens: the most tokens to write, at least 0.
        temperature: divides the logits; 0 always takes the likeliest token.
        top_k: draw from this many likeliest tokens, or from all if None.
        seed: of the draws.

    Raises:
        ConfigError: if the prompt is longer than the model's positions, an option is out of range,
            or the prompt is empty and the tokenizer has no end-of-text token.
        CheckpointError: if the tokenizer is another model's, or the logits are not finite.
    """
    if tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise ConfigError(
            f"tokens={tokens}, temperature={temperature}, top_k={top_k}: "
            "tokens and temperature must be at least 0, top_k at least 1"
        )
    ids, end = _first_ids(tokenizer, prompt), tokenizer.eos_token_id
    options = GenerationConfig(
        do_sample=temperature > 0,
        eos_token_id=end,
        pad_token_id=0 if end is None else end,
        use_cache=True,
        **({"temperature": temperature, "top_k": top_k or 0} if temperature > 0 else {}),
    )
    try:
        with (
            quiet_transformers(),
            evaluating(model),
            _without_defaults(model),
            seeded_rng(seed, model.device),
        ):
            ids = _continue(model, ids, tokens, options)
    except RuntimeError as error:  # torch draws from no distribution that holds a NaN
        raise CheckpointError(
            f"no token can be drawn after the prompt of {len(ids)} tokens: {error}; the weights may be "
            "damaged or diverged, so take another checkpoint, or temperature 0"
        ) from error
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    return text


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Generator[None]:
    """Set the checkpoint's own options aside, such as a top_p, which generate() takes for those not given."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _first_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ConfigError(f"the prompt {prompt!a} is not UTF-8 text; give it as such")
    if prompt:
        return tokenizer.encode(prompt, add_special_tokens=False)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the prompt is {prompt!r}, and the tokenizer has no end-of-text token to start from; give one"
        )
    return [tokenizer.eos_token_id]


@torch.inference_mode()
def _continue(
    model: PreTrainedModel, ids: list[int], tokens: int, options: GenerationConfig
) -> list[int]:
    positions = getattr(model.config, "max_position_embeddings", None) or len(ids) + tokens
    if len(ids) > positions:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, more than the model's {positions} positions; "
            "give a shorter one"
        )
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    rows = weight.shape[0]
    if max(ids) >= rows:
        raise CheckpointError(
            f"the tokenizer gives token {max(ids)}, and the model has embeddings for {rows}: they are "
            "not of one checkpoint; give a folder in which they belong together"
        )
    wanted = len(ids) + tokens
    window = ids
    while len(ids) < wanted:
        if len(window) == positions:
            window = window[-max(1, positions // 2) :]
        options.max_new_tokens = min(wanted - len(ids), positions - len(window))
        context = torch.tensor([window], device=model.device)
        output = model.generate(  # pyrefly: ignore
            context, attention_mask=torch.ones_like(context), generation_config=options
        )
        written = output[0, len(window) :].tolist()
        ids, window = ids + written, window + written
        if written[-1] == options.eos_token_id:
            break
    return ids
