from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast

from muonscale.errors import CheckpointError, ConfigError
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models.build import build_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.generate import _Stream, generate_text

POSITIONS = 16
SAMPLED = {"temperature": 1.0, "top_k": None}
GREEDY = {"temperature": 0.0, "top_k": None, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One word per id: w1 to w49, and the end of text, 0."""
    vocab = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 50)}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<|endoftext|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|endoftext|>")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    section = ModelSection(preset="llama-pico", fields={"attention_dropout": 0.5})
    config = model_config(section, vocab_size=50, sequence_length=POSITIONS, bos_id=0, eos_id=0)
    model = build_model(config, seed=3)
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
        model.lm_head.weight[0] = 0  # hardly ever the end of the text
        for name, p in model.named_parameters():
            if "_proj" in name:
                p.mul_(10)  # a text that does not repeat itself
    return model


def greedy_by_hand(model: PreTrainedModel, ids: list[int], tokens: int) -> list[int]:
    model.eval()
    window = list(ids)
    for _ in range(tokens):
        if len(window) == POSITIONS:
            window = window[-POSITIONS // 2 :]
        with torch.no_grad():
            best = int(model(torch.tensor([window])).logits[0, -1].argmax())
        ids, window = [*ids, best], [*window, best]
        if best == 0:
            break
    return ids


def as_text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids if i != 0)


def test_greedy_text_is_the_argmax_of_every_step(model, tokenizer):
    ids = greedy_by_hand(model, [7, 8, 9], 10)
    assert len(set(ids)) > 6
    assert generate_text(model, tokenizer, "w7 w8 w9", tokens=10, **GREEDY) == as_text(ids)


def test_text_longer_than_the_positions_goes_on_from_half_of_them(model, tokenizer):
    ids = greedy_by_hand(model, [7, 8, 9], 45)
    assert len(ids) > 3 * POSITIONS - 1
    assert generate_text(model, tokenizer, "w7 w8 w9", tokens=45, **GREEDY) == as_text(ids)


def test_a_prompt_of_all_positions_is_continued_and_a_longer_one_refused(model, tokenizer):
    prompt = list(range(1, POSITIONS + 1))
    expected = as_text(greedy_by_hand(model, prompt, 3))
    assert generate_text(model, tokenizer, as_text(prompt), tokens=3, **GREEDY) == expected
    with pytest.raises(ConfigError, match="17 tokens, more than the model's 16 positions"):
        generate_text(model, tokenizer, as_text([*prompt, 1]), tokens=3, **GREEDY)


def test_an_empty_prompt_starts_from_the_end_of_text(model, tokenizer):
    expected = as_text(greedy_by_hand(model, [0], 8))
    assert expected
    assert generate_text(model, tokenizer, "", tokens=8, **GREEDY) == expected


def test_an_empty_prompt_without_an_end_of_text_is_refused(model):
    inner = Tokenizer(models.WordLevel({"w1": 0}, unk_token="w1"))
    with pytest.raises(ConfigError, match=r"the tokenizer has no end-of-text"):
        generate_text(
            model, PreTrainedTokenizerFast(tokenizer_object=inner), "", tokens=1, **GREEDY
        )


def test_the_text_ends_at_the_end_of_text(model, tokenizer):
    weight = model.lm_head.weight
    before = weight.detach().clone()
    ids = greedy_by_hand(model, [7, 8, 9], 4)
    try:
        with torch.no_grad():
            weight[[0, ids[5]]] = weight[[ids[5], 0]]  # the third word becomes the end of text
        assert generate_text(model, tokenizer, "w7 w8 w9", tokens=9, **GREEDY) == as_text(ids[:5])
    finally:
        with torch.no_grad():
            weight.copy_(before)


def test_a_seed_decides_the_sample(model, tokenizer):
    texts = [generate_text(model, tokenizer, "w7", tokens=12, seed=s, **SAMPLED) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_leaves_the_generators_and_the_model_alone(model, tokenizer):
    model.train()
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    generate_text(model, tokenizer, "w7", tokens=12, seed=1, **SAMPLED)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]
    assert random.getstate() == before[2]
    assert model.training
    assert model.config.use_cache is False


def test_one_likeliest_token_is_greedy_at_any_temperature(model, tokenizer):
    greedy = generate_text(model, tokenizer, "w7", tokens=9, **GREEDY)
    assert (
        generate_text(model, tokenizer, "w7", tokens=9, temperature=5.0, top_k=1, seed=0) == greedy
    )


def test_without_top_k_all_tokens_are_drawn_whatever_the_defaults():
    """The default top_k of transformers is 50, and checkpoints bring more of their own."""
    config = model_config(
        ModelSection(preset="llama-pico"), vocab_size=400, sequence_length=512, bos_id=0, eos_id=0
    )
    vocab = {f"w{i}": i for i in range(400)}
    words = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocab, unk_token="w1"))
    )
    flat = build_model(config, seed=0)
    with torch.no_grad():
        flat.model.embed_tokens.weight.fill_(1)  # the same logits after every token
    own = flat.generation_config = GenerationConfig(top_p=0.1)
    text = generate_text(flat, words, "w7", tokens=300, temperature=1.0, top_k=None, seed=0)
    assert len(set(text.split())) > 100
    assert flat.generation_config is own


def test_no_tokens_give_back_the_prompt(model, tokenizer):
    assert generate_text(model, tokenizer, "w7 w8", tokens=0, **GREEDY) == "w7 w8"


def test_generating_prints_nothing(model, tokenizer, capfd):
    generate_text(model, tokenizer, "w7", tokens=30, seed=1, **SAMPLED)
    generate_text(model, tokenizer, "w7", tokens=30, **GREEDY)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("bad", [{"tokens": -1}, {"temperature": -0.1}, {"top_k": 0}])
def test_options_out_of_range_are_refused(model, tokenizer, bad: dict):
    options = {"tokens": 4, "temperature": 1.0, "top_k": 5, "seed": 0} | bad
    with pytest.raises(ConfigError, match=next(f"{k}={v}" for k, v in bad.items())):
        generate_text(model, tokenizer, "w7", **options)


def test_weights_that_are_not_finite_are_refused(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    broken = build_model(model.config, seed=0)
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match=r"prompt of 1 tokens"):
        generate_text(broken, tokenizer, "w1", tokens=2, seed=0, **SAMPLED)


def test_a_tokenizer_of_another_model_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    section = ModelSection(preset="llama-pico")
    config = model_config(section, vocab_size=20, sequence_length=POSITIONS, bos_id=0, eos_id=0)
    with pytest.raises(CheckpointError, match="token 33, and the model has embeddings for 20"):
        generate_text(build_model(config, seed=0), tokenizer, "w33", tokens=2, **GREEDY)


def test_text_is_shown_piece_by_piece(model, tokenizer):
    """45 tokens are more than the positions, so that the model goes on from a part of them."""
    pieces: list[str] = []
    text = generate_text(model, tokenizer, "w7 w8", tokens=45, **GREEDY, show=pieces.append)
    assert pieces[0] == "w7 w8" and "".join(pieces) == text
    assert len(pieces) >= 45 and all(len(piece) < 6 for piece in pieces)


def test_half_a_character_waits_for_its_other_half(model):
    """A letter of four bytes, one token each, is shown when it is whole."""
    letters = [f"<0x{byte:02X}>" for byte in "\U0001f600".encode()]
    inner = Tokenizer(models.BPE({"a": 0} | {t: n for n, t in enumerate(letters, 1)}, []))
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    words = PreTrainedTokenizerFast(tokenizer_object=inner)
    pieces: list[str] = []
    stream = _Stream(words, [0], pieces.append)
    stream.put(torch.tensor([[0]]))
    for token in (1, 2, 3, 4):
        stream.put(torch.tensor([token]))
    assert pieces == ["a", "\U0001f600"]


def test_top_p_keeps_the_likely_tokens(model, tokenizer):
    greedy = generate_text(model, tokenizer, "w7", tokens=9, **GREEDY)
    wide = {"temperature": 5.0, "top_k": None, "seed": 0}
    assert generate_text(model, tokenizer, "w7", tokens=9, top_p=1e-6, **wide) == greedy
    assert generate_text(model, tokenizer, "w7", tokens=9, **wide) != greedy
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"top_p={wrong}"):
            generate_text(model, tokenizer, "w7", tokens=9, top_p=wrong, **wide)
