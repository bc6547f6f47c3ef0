"""Documents of a row that are kept apart, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from muonscale.lab.config.load import load_config
from muonscale.lab.data.prepare import prepare
from muonscale.lab.models.build import build_model
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.setup import build_batches, model_shape, shared_tokenizer
from tests.cli.jobs import losses
from tests.conftest import Muonscale


def test_a_run_has_the_loss_of_its_documents_one_by_one(
    muonscale: Muonscale, tiny: list[str], corpus_text: str, tmp_path: Path
) -> None:
    documents = [corpus_text[at : at + 30] for at in range(0, 60_000, 30)]
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    words = [*tiny, f"data.path={path}", "data.document_mask=true", "train.steps=2"]
    answer = muonscale("train", *words)
    assert answer.code == 0, answer.err

    config = load_config(words[0], words[1:])
    corpora = prepare(config.data, seed=config.run.seed, report=lambda *_: None)
    tokenizer = shared_tokenizer(corpora)
    model = build_model(model_shape(config, tokenizer), seed=config.run.seed)
    batch = torch.from_numpy(build_batches(config, corpora, Processes()).at(0))
    total, cuts = 0.0, 0
    for row in batch:
        starts = [0, *(row[1:-1] == tokenizer.bos_token_id).nonzero()[:, 0].add(1).tolist()]
        cuts += len(starts) - 1
        for start, end in zip(starts, [*starts[1:], len(row) - 1], strict=True):
            logits = model(input_ids=row[None, start:end]).logits[0]
            target = row[start + 1 : end + 1]
            total += functional.cross_entropy(logits, target, reduction="sum").item()
    assert cuts > len(batch)
    assert losses(tmp_path / "run")[0] == pytest.approx(total / batch[:, 1:].numel(), rel=1e-6)

    result = json.loads((tmp_path / "run" / "result.json").read_text())
    answer = muonscale("eval", tmp_path / "run", "--json")
    assert answer.code == 0, answer.err
    measured = json.loads((tmp_path / "run" / "eval" / "result.json").read_text())
    assert str(result["validation_loss"])[:8] in json.dumps(measured)


def test_conversations_need_no_mask(muonscale: Muonscale, tiny: list[str]) -> None:
    words = ["data.format=chat", "data.tokenizer=x", "data.document_mask=true"]
    answer = muonscale("train", *tiny, *words)
    assert answer.code == 2 and "data.document_mask=True is for text" in answer.err
