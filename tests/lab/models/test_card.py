from __future__ import annotations

import json
from typing import Any

import pytest
from huggingface_hub import ModelCard
from transformers import PreTrainedModel

from muonscale.lab.config.load import dump_config, load_config
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models.build import build_model
from muonscale.lab.models.card import model_card
from muonscale.lab.models.config import model_config

ENV = {
    "versions": {"torch": "2.13.0", "muonscale": "0.1.0"},
    "device_name": "x86_64",
    "processes": 4,
    "data": {"/home/me/corpus.txt": {"train": {"tokens": 1600}}},
    "command": [
        "/home/me/venv/bin/muonscale",
        "train",
        "/home/me/my recipe.yaml",
        "data.path=/home/me/corpus.txt",
        "run.path=../runs/mine",
        "data.cache=~/cache",
        "optimizer.overrides={router: {lr: 0.1}}",
        "--resume",
    ],
}


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    section = ModelSection(preset="llama-pico", fields={"num_hidden_layers": 1})
    shape = model_config(section, vocab_size=300, sequence_length=32, bos_id=0, eos_id=0)
    return build_model(shape, seed=0)


def config(*words: str) -> dict[str, Any]:
    return json.loads(dump_config(load_config("demo", ["run.path=/home/me/runs/mine", *words])))


def training(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "tokens": 400 * step, "loss": 5.0}


def evaluation(step: int, loss: float | None) -> dict[str, Any]:
    return {"kind": "eval", "step": step, "validation_loss": loss, "bits_per_byte": 2.5}


def test_every_part_is_there(model: PreTrainedModel) -> None:
    metrics = [training(step) for step in range(1, 9)] + [
        evaluation(1, 4.75),
        evaluation(2, 4.5),
        evaluation(6, 4.25),
    ]
    words = ["data.path=/home/me/corpus.txt", "data.tokenizer=gpt2", "train.steps=8"]
    text = model_card(config(*words), ENV, metrics, step=5, model=model)
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["muonscale", "llama", "muon"],
    }
    parameters = sum(p.numel() for p in model.parameters())
    for row in (
        "# mine",
        "after 5 steps and 2,000 training tokens",
        "`LlamaForCausalLM`",
        f"| parameters | {parameters:,} |",
        f"| without embeddings and head | {parameters - 2 * 300 * 32:,} |",
        "| layers | 1 |",
        "| heads of keys and values | 2 |",
        "| source | corpus.txt |",
        "| training tokens seen | 2,000 |",
        "| epochs | 1.25 |",
        "| tokenizer | gpt2 |",
        "| validation loss, nats per token | 4.5000 |",
        "| measured after step | 2 |",
        "| `optimizer.ns_coefficients` | jordan |",
        "| `optimizer.betas` | [0.9, 0.95] |",
        "| `schedule.name` | cosine |",
        "| `train.steps` | 8 |",
        "| processes | 4 |",
        "| torch | 2.13.0 |",
    ):
        assert row in card.text, row
    assert "experts" not in card.text and "routing" not in card.text


def test_local_folders_are_left_out_of_the_command(model: PreTrainedModel) -> None:
    words = ["data.path=/home/me/corpus.txt", "data.tokenizer=/home/me/tok.json"]
    text = model_card(config(*words), ENV, [], step=5, model=model)
    command = (
        "muonscale train 'my recipe.yaml' data.path=corpus.txt run.path=mine data.cache=cache "
        "'optimizer.overrides={router: {lr: 0.1}}' --resume"
    )
    assert f"```sh\n{command}\n```" in text
    assert "| tokenizer | tok.json |" in text
    assert "/home/me" not in text and "~" not in text


def test_what_is_not_known_is_left_out(model: PreTrainedModel) -> None:
    later = [training(9), evaluation(9, 4.0), evaluation(3, None)]
    text = model_card(config(), {}, later, step=5, model=model)
    assert "after 5 steps." in text
    assert "trained on the corpus" in text
    for word in ("None", "null", "Evaluation", "tokens seen", "Versions", "last started", "device"):
        assert word not in text, word
    assert "nan" not in text.lower().split()


def test_a_dataset_of_the_hub_is_named_in_the_front_matter(model: PreTrainedModel) -> None:
    text = model_card(config("data.source=hf:org/text:en"), {}, [], step=1, model=model)
    card = ModelCard(text)
    assert card.data.datasets == ["org/text"]
    assert "| source | hf:org/text:en |" in card.text


def test_adamw_is_not_described_by_what_muon_has(model: PreTrainedModel) -> None:
    text = model_card(config("optimizer.rule=adamw"), {}, [], step=1, model=model)
    assert ModelCard(text).data.tags == ["muonscale", "llama", "adamw"]
    assert "optimizer.betas" in text
    for key in ("momentum", "ns_steps", "scale", "rms", "post_norm"):
        assert f"optimizer.{key}" not in text
    muon = model_card(config("optimizer.post_norm=row"), {}, [], step=1, model=model)
    assert "| `optimizer.post_norm` | row |" in muon and "optimizer.scale" in muon


def test_experts_are_described(model: PreTrainedModel) -> None:
    section = ModelSection(preset="moonlight-nano")
    shape = model_config(section, vocab_size=300, sequence_length=32, bos_id=0, eos_id=0)
    mixture = build_model(shape, seed=0)
    env = {"routing": {"routers": 3}}
    text = model_card(config("model.preset=moonlight-nano"), env, [], step=1, model=mixture)
    body = sum(p.numel() for p in mixture.parameters()) - 2 * 300 * 128
    idle = 3 * (8 - 2) * 3 * 128 * 88  # three layers with six of eight experts not chosen
    assert f"| active per token | {body - idle:,} |" in text
    assert "| routed experts | 8 |" in text and "| `routing.bias_update` | centered |" in text


def test_a_mixture_is_named_corpus_by_corpus(model: PreTrainedModel) -> None:
    mixture = [
        {"source": "hf:org/web:10BT", "weight": 3},
        {"path": "/home/me/code.jsonl", "name": "code", "weight": 1},
    ]
    read = {"tokens": 1, "share": 0.75, "epochs": 1.5}
    env = {"data": {name: {"train": {"tokens": 1600}, "read": read} for name in ("web", "code")}}
    found = config(f"data.mixture={json.dumps(mixture)}")
    text = model_card(found, env, [], step=3, model=model)
    assert ModelCard(text).data.datasets == ["org/web"]
    assert "| of the whole run: code | 75.0 %, 1.50 epochs of 1,600 tokens |" in text
    assert "/home/me" not in text


def test_weights_that_it_started_from_are_named(model: PreTrainedModel) -> None:
    words = ["model.weights=/home/me/base", "data.tokenizer=/home/me/base"]
    text = model_card(config(*words), {}, [], step=3, model=model)
    assert "trained from the weights of `base`" in text and "/home/me" not in text
