"""What `verify` refuses, and the configurations it makes."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.parallel.topology import arrange, parse_layout
from muonscale.lab.verify.check import check_request, check_shape, layout_config, use_float32
from tests.optim.conftest import SMALL, causal_lm

CPU = torch.device("cpu")


def config(*words: str) -> Config:
    return load_config("demo", ["train.steps=10", *words])


@pytest.mark.parametrize(
    "layout", ["fsdp=4,tp=2,sp", "hsdp=2x3", "ddp=4,ep=4", "tp=2", "fsdp=6,ep=3"]
)
def test_the_processes_are_arranged_as_the_layout_says(layout: str) -> None:
    topology = parse_layout(layout)
    made = layout_config(config("parallel.tensor=8"), topology)
    assert arrange(made.parallel, topology.world, machines=1) == topology
    assert made.run.threads == 1


def test_dtypes_left_open_are_float32_and_others_are_kept() -> None:
    made = use_float32(config())
    assert (made.optimizer.ns_dtype, made.train.precision) == ("float32", "float32")
    made = use_float32(config("optimizer.ns_dtype=bfloat16", "train.precision=bfloat16"))
    assert (made.optimizer.ns_dtype, made.train.precision) == ("bfloat16", "bfloat16")


@pytest.mark.parametrize(
    ("layout", "steps", "device", "said"),
    [
        ("fsdp=1", 5, "cpu", "one process"),
        ("fsdp=2", 11, "cpu", "--steps 11 is more than the 10"),
        ("fsdp=3", 5, "cpu", "3 data-parallel ranks cannot share"),
        ("fsdp=2", 5, "cuda", "needs 2 GPUs"),
    ],
)
def test_what_cannot_run_here_is_refused(layout: str, steps: int, device: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_request(config(), parse_layout(layout), steps, torch.device(device))
    check_request(config(), parse_layout("fsdp=2"), 10, CPU)


def test_blocks_which_depend_on_the_layout_are_refused() -> None:
    with pytest.raises(ConfigError, match="block_period=1"):
        check_request(config("optimizer.block_period=2"), parse_layout("tp=2"), 5, CPU)


def test_a_process_of_torchrun_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="without torchrun"):
        check_request(config(), parse_layout("fsdp=2"), 5, CPU)


def test_dropout_is_refused_with_the_words_that_turn_it_off() -> None:
    topology = parse_layout("fsdp=2")
    with pytest.raises(ConfigError) as caught:
        check_shape(causal_lm("gpt2").config, topology)
    for name in ("attn_pdrop", "embd_pdrop", "resid_pdrop"):
        assert f"model.fields.{name}=0" in str(caught.value)
    assert "summary" not in str(caught.value)
    zeros = {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}
    check_shape(hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, **zeros), topology)
    with pytest.raises(ConfigError, match=r"model.fields.attention_dropout=0"):
        check_shape(hf.LlamaConfig(**SMALL, attention_dropout=0.1), topology)
    check_shape(hf.LlamaConfig(**SMALL), topology)


def test_a_model_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="does not divide num_attention_heads"):
        check_shape(hf.LlamaConfig(**SMALL), parse_layout("tp=4"))
