"""Hugging Face Trainer and Accelerate, which replace, wrap and reload what they are given."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from muonscale import Muon, MuonFactory, parameter_groups
from muonscale.errors import GroupingError


class Words(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = (torch.arange(16) * (index + 1)) % 50
        return {"input_ids": ids, "labels": ids}


def run(build_lm, folder: Path, resume: str | None = None, **options: Any) -> nn.Module:
    model = build_lm("llama")
    optimizer = Muon(parameter_groups(model, lr=1e-2), **options)
    schedule = hf.get_scheduler("cosine", optimizer, num_warmup_steps=2, num_training_steps=8)
    arguments = hf.TrainingArguments(
        str(folder), max_steps=8, per_device_train_batch_size=4, save_steps=4, report_to=[],
        use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = hf.Trainer(model, arguments, train_dataset=Words(), optimizers=(optimizer, schedule))
    trainer.train(resume_from_checkpoint=resume)
    assert optimizer.stats()["matrices"] == 14
    return model


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, marks=pytest.mark.slow),
        {"post_norm": "normuon", "decay": "independent"},
    ],
)
def test_the_trainer_runs_it_and_resumes_bit_for_bit(build_lm, tmp_path: Path, options) -> None:
    whole = run(build_lm, tmp_path, **options)
    resumed = run(build_lm, tmp_path, resume=str(tmp_path / "checkpoint-4"), **options)
    for mine, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_accelerate_prepares_clips_and_steps_it(build_lm) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = build_lm("llama")
    model, optimizer = accelerator.prepare(model, Muon(parameter_groups(model, lr=1e-2)))
    ids = torch.arange(48).view(2, 24)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


def made_by_the_trainer(build_lm, folder: Path, kind: Any) -> torch.optim.Optimizer:
    arguments = hf.TrainingArguments(str(folder), report_to=[], use_cpu=True)
    chosen = kind, {"lr": 1e-2, "weight_decay": 0.3}
    return hf.Trainer(
        build_lm("llama"), arguments, optimizer_cls_and_kwargs=chosen
    ).create_optimizer()


def test_a_factory_gets_the_model_from_the_trainer(build_lm, tmp_path: Path) -> None:
    optimizer = made_by_the_trainer(build_lm, tmp_path, MuonFactory)
    expected = parameter_groups(build_lm("llama"), lr=1e-2, weight_decay=0.3)
    keys = "name", "rule", "param_names", "lr", "weight_decay"
    found = [[group[key] for key in keys] for group in optimizer.param_groups]
    assert found == [[group[key] for key in keys] for group in expected]


def test_a_factory_passes_the_options_of_both_on(build_lm) -> None:
    optimizer = MuonFactory()(
        build_lm("llama"), lr=1e-2, overrides={"head": {"lr": 1e-3}}, post_norm="row", rms=0.3
    )
    rates = {group["name"]: (group["lr"], group["rms"]) for group in optimizer.param_groups}
    assert rates["head"] == (1e-3, 0.3)
    assert rates["hidden"] == (1e-2, 0.3)
    assert optimizer.param_groups[0]["post_norm"] == "row"


def test_groups_by_decay_that_the_trainer_makes_are_refused(build_lm, tmp_path: Path) -> None:
    with pytest.raises(GroupingError, match=r"2 groups were given and none has a `rule`.*Factory"):
        made_by_the_trainer(build_lm, tmp_path, Muon)


def test_groups_by_decay_of_matrices_alone_are_refused_too() -> None:
    """Nothing else would stop an embedding from being orthogonalised."""
    table, matrix = nn.Embedding(9, 4).weight, nn.Linear(4, 4).weight
    groups = [{"params": [table], "weight_decay": 0.1}, {"params": [matrix], "weight_decay": 0.0}]
    with pytest.raises(GroupingError, match="none has a `rule`"):
        Muon(groups)
    Muon([{**groups[0], "rule": "adamw"}, groups[1]])
