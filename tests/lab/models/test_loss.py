from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from muonscale.errors import DataError
from muonscale.lab.config.sections import ModelSection
from muonscale.lab.models import loss as loss_module
from muonscale.lab.models.build import build_model
from muonscale.lab.models.config import model_config
from muonscale.lab.models.loss import bits_per_byte, summed_loss
from tests.lab.models.losses import loss_on_batches


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    section = ModelSection(preset="llama-pico", fields={"attention_dropout": 0.5})
    config = model_config(section, vocab_size=64, sequence_length=32, bos_id=0, eos_id=0)
    model = build_model(config, seed=0)
    with torch.no_grad():
        model.lm_head.weight.mul_(30)  # a loss that differs from token to token
    return model


@pytest.fixture
def batches() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    return [generator.integers(0, 64, shape) for shape in [(5, 17), (1, 3), (2, 33)]]


def test_every_token_weighs_the_same_in_uneven_batches(model, batches):
    losses = []
    model.eval()
    with torch.no_grad():
        for batch in batches:
            for row in torch.from_numpy(batch):
                log_p = model(row[None, :-1]).logits[0].double().log_softmax(-1)
                losses += [-float(log_p[i, row[i + 1]]) for i in range(len(row) - 1)]
    loss, tokens = loss_on_batches(model, batches)
    assert tokens == len(losses) == 5 * 16 + 2 + 2 * 32
    assert loss == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    batch_means = [loss_on_batches(model, [batch])[0] for batch in batches]
    assert abs(loss - sum(batch_means) / 3) > 1e-3  # weighing by batch would be seen


@pytest.mark.parametrize("training", [True, False])
def test_the_model_goes_back_to_its_mode(model, batches, training: bool):
    model.train(training)
    loss_on_batches(model, batches)
    assert model.training is training
    with pytest.raises(IndexError):
        loss_on_batches(model, [np.zeros(3, np.int64)])
    assert model.training is training


def test_evaluation_is_deterministic_and_without_dropout(model, batches):
    model.train()
    before = torch.get_rng_state()
    assert loss_on_batches(model, batches) == loss_on_batches(model, batches)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in model.parameters())


def test_read_only_arrays_are_evaluated_without_a_warning(model, batches, recwarn):
    expected = loss_on_batches(model, batches)
    for batch in batches:
        batch.flags.writeable = False
    assert loss_on_batches(model, batches) == expected
    assert not recwarn.list


def test_no_tokens_are_refused(model):
    with pytest.raises(DataError, match="there are 0 validation tokens"):
        loss_on_batches(model, [])


def test_bits_per_byte_of_a_uniform_byte_model_are_eight():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0)


@pytest.mark.parametrize("chunk", [2**24, 40, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_in_parts_has_the_values_and_gradients_of_the_whole(
    chunk: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss_module, "LOSS_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits = 5 * torch.randn(2, 7, 13, generator=generator)
    logits[0, 0] += 1000
    logits = logits.to(dtype).requires_grad_()
    targets = torch.randint(13, (2, 7), generator=generator)
    targets[1, 2:5] = -100
    exact = logits.detach().double().requires_grad_()
    expected = functional.cross_entropy(exact.flatten(0, 1), targets.flatten(), reduction="sum")
    (expected / 3).backward()
    found = summed_loss(logits, targets)
    (found / 3).backward()
    assert found.dtype == torch.float32 and found.shape == ()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert logits.grad is not None and logits.grad.dtype == dtype
    assert exact.grad is not None
    torch.testing.assert_close(logits.grad, exact.grad.to(dtype), rtol=1e-2, atol=1e-6)
    assert (logits.grad[1, 2:5] == 0).all()


def test_rows_without_a_target_have_no_loss() -> None:
    logits = torch.randn(1, 3, 5, requires_grad=True)
    found = summed_loss(logits, torch.full((1, 3), -100))
    found.backward()
    assert found.item() == 0 and logits.grad is not None and not logits.grad.any()
