"""Memory that runs out in a step."""

from __future__ import annotations

import pytest
import torch

from muonscale.errors import MuonscaleError
from muonscale.lab.config.load import load_config
from muonscale.lab.training.out_of_memory import explain_out_of_memory


def test_keys_that_lower_memory_are_named_with_their_values() -> None:
    config = load_config("demo", ["train.micro_batch_tokens=1024", "data.sequence_length=128"])
    with pytest.raises(MuonscaleError) as error, explain_out_of_memory(config):
        torch.empty(2**48, dtype=torch.uint8)
    assert "can't allocate memory" in str(error.value)
    for word in ("train.micro_batch_tokens below 1,024", "train.activation_checkpointing=true"):
        assert word in str(error.value)
    assert "data.sequence_length below 128" in str(error.value)


def test_what_is_done_already_is_not_advised() -> None:
    words = ["train.micro_batch_tokens=128", "data.sequence_length=128"]
    config = load_config("demo", [*words, "train.activation_checkpointing=true"])
    with pytest.raises(MuonscaleError) as error, explain_out_of_memory(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")
    assert "CUDA out of memory" in str(error.value) and "More" not in str(error.value)
    assert "micro_batch_tokens" not in str(error.value)
    assert "activation_checkpointing" not in str(error.value)


def test_other_errors_stay_as_they_are() -> None:
    config = load_config("demo", [])
    with pytest.raises(RuntimeError, match="shape") as error, explain_out_of_memory(config):
        raise RuntimeError("shape")
    assert not isinstance(error.value, MuonscaleError)
