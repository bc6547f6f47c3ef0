"""Generate text with transformers' `generate`."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.models.contexts import evaluation_mode, quiet_transformers, seed_rng


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float = 1.0,
    seed: int,
    show: Callable[[str], None] | None = None,
) -> str:
    """Return the prompt and its continuation by the model.

    The text ends after `tokens` tokens or at the end-of-text token. When it exceeds the model's
    positions, the model continues from the last half of them, so that every token is predicted from
    at least that much of the text. The checkpoint's own generation defaults are ignored. The random
    number generators and the model do not change.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        prompt: beginning of the text; if empty, the text begins after an end-of-text token.
        tokens: maximum number of new tokens, at least 0.
        temperature: divides the logits; 0 always selects the most likely token.
        top_k: sample from this many most likely tokens, or from all if None.
        top_p: sample from the most likely tokens whose probabilities sum to this, above 0.
        seed: seed of the samples.
        show: called with the prompt, then with each new piece of the text; all together are what is
            returned.

    Raises:
        ConfigError: if the prompt is longer than the model's positions, an option is out of range,
            or the prompt is empty and the tokenizer has no end-of-text token.
        CheckpointError: if the tokenizer is another model's, or the logits are not finite.
    """
    wrong_k = top_k is not None and top_k < 1
    if tokens < 0 or temperature < 0 or wrong_k or not 0 < top_p <= 1:
        raise ConfigError(
            f"tokens={tokens}, temperature={temperature}, top_k={top_k}, top_p={top_p}: tokens and "
            "temperature must be at least 0, top_k at least 1, top_p above 0 and at most 1"
        )
    ids, end = _first_ids(tokenizer, prompt), tokenizer.eos_token_id
    options = GenerationConfig(
        do_sample=temperature > 0,
        eos_token_id=end,
        pad_token_id=0 if end is None else end,
        use_cache=True,
        **(
            {"temperature": temperature, "top_k": top_k or 0, "top_p": top_p}
            if temperature > 0
            else {}
        ),
    )
    stream = None if show is None else _Stream(tokenizer, ids, show)
    try:
        with (
            quiet_transformers(),
            evaluation_mode(model),
            _without_defaults(model),
            seed_rng(seed, model.device),
        ):
            ids = _continue(model, ids, tokens, options, stream)
    except RuntimeError as error:  # torch cannot sample from a distribution that contains a NaN
        raise CheckpointError(
            f"no token can be sampled after the prompt of {len(ids)} tokens: {error}; the weights "
            "may be damaged or diverged: try another checkpoint, or temperature 0"
        ) from error
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert isinstance(text, str)
    if stream is not None:
        stream.finish(text)
    return text


def message_prompt(tokenizer: PreTrainedTokenizerBase, message: str) -> str:
    """Return a user's message in the chat template, up to where the assistant begins.

    Raises:
        ConfigError: if the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"{tokenizer.name_or_path or 'the tokenizer'} has no chat template: it was not trained on "
            "chats; leave out --chat"
        )
    turn = {"role": "user", "content": message}
    text = tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


class _Stream:
    """A streamer of transformers that shows text as soon as its characters are whole."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, ids: list[int], show: Callable[[str], None]
    ) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._ids, self._shown = list(ids), ""
        self._show_more()
        self._waits_for_prompt = True

    def put(self, tokens: torch.Tensor) -> None:
        """Take the prompt, which each call of `generate` begins with, or the next token."""
        if not self._waits_for_prompt:
            self._ids += tokens.flatten().tolist()
            self._show_more()
        self._waits_for_prompt = False

    def end(self) -> None:
        """End a call of `generate`."""
        self._waits_for_prompt = True

    def _show_more(self) -> None:
        text = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        assert isinstance(text, str)
        if not text.endswith("\ufffd") or not self._shown:  # half of a character
            self.finish(text)

    def finish(self, text: str) -> None:
        """Show what is new in the text so far."""
        if text.startswith(self._shown):
            self._show(text[len(self._shown) :])
            self._shown = text


@contextmanager
def _without_defaults(model: PreTrainedModel) -> Generator[None]:
    """Remove the checkpoint's own options, such as top_p, which generate() takes as defaults."""
    defaults = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = defaults


def _first_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise ConfigError(f"the prompt {prompt!a} is not UTF-8 text")
    if prompt:
        return tokenizer.encode(prompt, add_special_tokens=False)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"the prompt {prompt!r} is empty, and the tokenizer has no end-of-text token to start "
            "from"
        )
    return [tokenizer.eos_token_id]


@torch.inference_mode()
def _continue(
    model: PreTrainedModel,
    ids: list[int],
    tokens: int,
    options: GenerationConfig,
    stream: _Stream | None,
) -> list[int]:
    positions = getattr(model.config, "max_position_embeddings", None) or len(ids) + tokens
    if len(ids) > positions:
        raise ConfigError(
            f"the prompt has {len(ids)} tokens, more than the model's {positions} positions"
        )
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    rows = weight.shape[0]
    if max(ids) >= rows:
        raise CheckpointError(
            f"the tokenizer returns token {max(ids)}, and the model has embeddings for {rows}: "
            "they are not from the same checkpoint"
        )
    wanted = len(ids) + tokens
    window = ids
    while len(ids) < wanted:
        if len(window) == positions:
            window = window[-max(1, positions // 2) :]
        options.max_new_tokens = min(wanted - len(ids), positions - len(window))
        context = torch.tensor([window], device=model.device)
        output = model.generate(  # pyrefly: ignore
            context,
            attention_mask=torch.ones_like(context),
            generation_config=options,
            streamer=stream,
        )
        written = output[0, len(window) :].tolist()
        ids, window = ids + written, window + written
        if written[-1] == options.eos_token_id:
            break
    return ids
