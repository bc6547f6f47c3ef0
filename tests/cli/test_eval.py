"""`muonscale eval` on runs and model folders, without tasks."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from muonscale.lab.config.load import load_config
from muonscale.lab.data.prepare import prepare
from tests.conftest import Muonscale
from tests.lab.data.chat.chats import CHATML, characters_tokenizer, conversations, write_chats

KEYS = {"loss": "validation_loss", "perplexity": "perplexity", "tokens": "validation_tokens"}


def result(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def checkpoints(folder: Path) -> list[dict[str, Any]]:
    return result(folder)["checkpoints"]


@pytest.fixture
def run(finished: Path) -> Path:
    return finished


def only_text(muonscale: Muonscale, *words: object) -> dict[str, Any]:
    answer = muonscale("eval", *words, "--json")
    assert answer.code == 0, answer.err
    return json.loads(answer.out)["texts"][-1]


def test_a_finished_run_has_the_numbers_of_its_result(
    muonscale: Muonscale, run: Path, cache: Path, tmp_path: Path
) -> None:
    text, want = only_text(muonscale, run), result(run)
    for key, name in KEYS.items():
        assert text[key] == pytest.approx(want[name], rel=1e-6), key
    assert text["bits_per_byte"] == pytest.approx(want["bits_per_byte"], rel=1e-6)
    assert text["bigram_loss"] == want["bigram_loss"] and text["data"] == "own"
    again = only_text(muonscale, run, f"data.cache={tmp_path / 'other'}")  # prepared anew
    assert again["loss"] == text["loss"]
    shutil.rmtree(run / "checkpoints")
    assert only_text(muonscale, run)["loss"] == pytest.approx(text["loss"], rel=1e-6)
    shorter = only_text(muonscale, run, "data.sequence_length=16", "--out", tmp_path / "out")
    assert shorter["loss"] != text["loss"] and "bigram_loss" not in shorter
    assert len(checkpoints(run / "eval")) == 2  # of the checkpoint, and of model/


def test_a_step_has_the_numbers_recorded_in_training(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    assert muonscale("train", *tiny, "eval.every=5", "eval.tokens=1000000").code == 0
    run = tmp_path / "run"
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    want = {r["step"]: r["validation_loss"] for r in lines if r["kind"] == "eval"}
    found = only_text(muonscale, f"{run}@10")
    assert found["loss"] == pytest.approx(want[10], rel=1e-6)
    assert abs(found["loss"] - want[12]) > 1e-4 and "bigram_loss" not in found
    answer = muonscale("eval", f"{run}@7")
    assert answer.code == 2 and "10, 12" in answer.err


def test_another_text_is_measured_whole_as_by_plain_torch(
    muonscale: Muonscale, run: Path, cache: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("The quick brown fox jumps over the lazy dog, while rivers run. " * 40)
    words = [f"data.path={other}", "data.sequence_length=16"]
    text = only_text(muonscale, run, *words, "--all")
    assert (text["split"], text["bytes"]) == ("all", other.stat().st_size)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    data = load_config(str(run)).data.model_copy(
        update={"path": str(other), "tokenizer": str(run / "tokenizer"), "sequence_length": 16}
    )
    (corpus,) = prepare(data, seed=0, report=lambda *report: None).values()
    splits = [store.read(0, len(store)) for store in (corpus.train, corpus.validation)]
    decoded = "".join(tokenizer.decode(ids, skip_special_tokens=True) for ids in splits)
    assert decoded == other.read_text()  # all of the text is in the two
    losses = []
    for ids in splits:
        for at in range(0, len(ids) - 16, 16):
            row = torch.tensor(ids[at : at + 17])[None]
            with torch.no_grad():
                log_p = model(row[:, :-1]).logits[0].double().log_softmax(-1)
            losses += [-float(log_p[i, row[0, i + 1]]) for i in range(16)]
    assert text["tokens"] == len(losses)
    assert text["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-6)
    bits = math.fsum(losses) / len(losses) / math.log(2) * sum(map(len, splits))
    assert text["bits_per_byte"] == pytest.approx(bits / other.stat().st_size, rel=1e-6)
    assert (
        only_text(muonscale, run, *words)["tokens"] < len(losses) / 5
    )  # the validation split alone


def test_a_folder_is_measured_on_a_text_that_has_to_be_named(
    muonscale: Muonscale, run: Path, corpus_file: Path, cache: Path, tmp_path: Path
) -> None:
    where = (f"data.path={corpus_file}", f"data.cache={cache}", "data.sequence_length=32")
    text = only_text(muonscale, run / "model", *where)
    assert text["loss"] == pytest.approx(result(run)["validation_loss"], rel=1e-6)
    for words, reason in [
        ((), "data.path"),
        (("data.validation=0.5",), "text"),
        (("--all",), "nothing to evaluate"),
        ((where[0], "data.tokenizer=x"), "its own tokenizer"),
        ((where[0], "data.sequence_length=100000"), "positions of the model"),
        ((where[0], "optimizer.lr=1"), "an evaluation has no optimizer.lr"),
        ((where[0], "data.pth=1"), "did you mean path"),
    ]:
        answer = muonscale("eval", run / "model", *words)
        assert answer.code == 2 and reason in answer.err, (words, answer.err)
    assert "which has no steps" in muonscale("eval", f"{run / 'model'}@3").err
    assert "it does not exist" in muonscale("eval", tmp_path / "nowhere").err


def test_the_training_part_of_the_run_is_never_evaluated(
    muonscale: Muonscale, run: Path, corpus_file: Path, cache: Path
) -> None:
    answer = muonscale("eval", run, "--all")
    assert answer.code == 2 and "training data" in answer.err
    # The run's own file, named as another text, is known by its fingerprint.
    answer = muonscale("eval", run, f"data.path={corpus_file}", "--all")
    assert answer.code == 2 and "training data" in answer.err
    for words in (
        ["data.validation=0.5"],
        [f"data.path={corpus_file}", "data.validation=0.5", "--all"],
    ):
        answer = muonscale("eval", run, *words)
        assert answer.code == 2 and "validation split" in answer.err
    named = only_text(muonscale, run, f"data.path={corpus_file}")  # the same split, by its name
    assert named["loss"] == pytest.approx(result(run)["validation_loss"], rel=1e-6)
    assert named["data"] == "own" and named["bigram_loss"] == result(run)["bigram_loss"]
    shutil.rmtree(run / "checkpoints")  # nothing says now what it was trained on, but its path
    answer = muonscale("eval", run, f"data.path={corpus_file}", "--all")
    assert answer.code == 2 and "training data" in answer.err


def test_a_value_that_is_no_yaml_and_a_prompt_that_is_no_text_are_refused(
    muonscale: Muonscale, run: Path
) -> None:
    answer = muonscale("eval", run, "data.sequence_length=[")
    assert answer.code == 2 and "not valid YAML" in answer.err
    answer = muonscale("eval", run, "--samples", 1, "--prompt", "x\udcff")
    assert answer.code == 2 and "not UTF-8" in answer.err


def test_a_corpus_that_only_a_stage_reads_is_evaluated(
    muonscale: Muonscale, tiny: list[str], corpus_file: Path, corpus_text: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(corpus_text[::-1][:60_000])
    words = [word for word in tiny if not word.startswith(("data.path", "train.steps"))]
    mixture = f"[{{path: {corpus_file}, weight: 1}}, {{path: {other}, weight: 0}}]"
    stages = "[{name: constant, until: 0.5}, {name: linear, weights: {other.txt: 1}}]"
    more = [f"data.mixture={mixture}", "schedule.name=stages", f"schedule.stages={stages}"]
    assert muonscale("train", *words, *more, "train.tokens=3072").code == 0
    run = tmp_path / "run"
    assert only_text(muonscale, run)["loss"] == pytest.approx(result(run)["validation_loss"])
    answer = muonscale("eval", run, f"data.path={other}", "--all")
    assert answer.code == 2 and "training data" in answer.err


def test_data_that_have_changed_are_refused(
    muonscale: Muonscale, tiny: list[str], corpus_text: str, tmp_path: Path
) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text(corpus_text)
    words = [word for word in tiny if not word.startswith("data.path")]
    assert muonscale("train", *words, f"data.path={mine}", "train.steps=2").code == 0
    mine.write_text(corpus_text + "one more line\n")
    answer = muonscale("eval", tmp_path / "run")
    assert answer.code == 2 and "have changed" in answer.err


def test_a_mixture_has_each_corpus_and_the_weighted_mean(
    muonscale: Muonscale, tiny: list[str], corpus_file: Path, corpus_text: str, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(corpus_text[::-1][:60_000])
    words = [word for word in tiny if not word.startswith("data.path")]
    mixture = f"[{{path: {corpus_file}, weight: 3}}, {{path: {other}, weight: 1}}]"
    assert muonscale("train", *words, f"data.mixture={mixture}", "train.steps=4").code == 0
    run = tmp_path / "run"
    text, want = only_text(muonscale, run), result(run)
    assert {k: v["loss"] for k, v in text["corpora"].items()} == pytest.approx(
        want["validation_losses"]
    )
    mean = (3 * text["corpora"]["corpus.txt"]["loss"] + text["corpora"]["other.txt"]["loss"]) / 4
    assert text["loss"] == pytest.approx(mean) == pytest.approx(want["validation_loss"])
    assert text["bits_per_byte"] == pytest.approx(want["bits_per_byte"])


def test_chats_have_a_loss_over_the_answers_and_no_bits_per_byte(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    dropped = ("data.path", "data.vocab_size", "data.sequence_length")
    words = [
        *(word for word in tiny if not word.startswith(dropped)),
        f"data.path={write_chats(tmp_path / 'x.jsonl', conversations(120))}",
        "data.format=chat",
        f"data.tokenizer={characters_tokenizer(tmp_path / 'tokenizer', CHATML)}",
        "data.sequence_length=128",
        "train.batch_tokens=512",
        "train.steps=4",
    ]
    assert muonscale("train", *words).code == 0
    text, want = only_text(muonscale, tmp_path / "run"), result(tmp_path / "run")
    assert text["loss"] == pytest.approx(want["validation_loss"], rel=1e-6)
    assert text["tokens"] == want["validation_tokens"] and "bits_per_byte" not in text
    other = write_chats(tmp_path / "y.jsonl", conversations(60, seed=1))
    foreign = only_text(muonscale, tmp_path / "run", f"data.path={other}", "data.format=chat")
    assert foreign["data"] == "foreign" and foreign["tokens"] > 0


def test_samples_are_written_for_every_prompt(muonscale: Muonscale, run: Path) -> None:
    words = ("--samples", 2, "--prompt", "def ", "--prompt", "import", "--tokens", 5, "--seed", 7)
    answer = muonscale("eval", run, *words)
    assert answer.code == 0, answer.err
    (one,) = checkpoints(run / "eval")
    assert [(s["prompt"], s["seed"]) for s in one["samples"]] == [
        ("def ", 7), ("def ", 8), ("import", 7), ("import", 8)
    ]  # fmt: skip
    written = muonscale("generate", run, "import", "--tokens", 5, "--seed", 8).out
    assert one["samples"][3]["text"] == written.removesuffix("\n") and written in answer.out
    assert "new: 1 text, 4 samples" in answer.out
    answer = muonscale("eval", run)
    assert "new: 1 text; from earlier evaluations: 4 samples" in answer.out
    assert "--samples" in muonscale("eval", run, "--prompt", "x").err


def test_the_report_shows_what_was_measured(muonscale: Muonscale, run: Path) -> None:
    from muonscale.lab.report.runs import runs_page

    assert not [t for t in runs_page([run]).tables if t.name == "evaluation"]
    assert muonscale("eval", f"{run}@10").code == 0
    (table,) = [t for t in runs_page([run]).tables if t.name == "evaluation"]
    loss = checkpoints(run / "eval")[0]["texts"][0]["loss"]
    assert any(row[0] == "10" and row[3] == f"{loss:.4f}" for row in table.rows)
    (run / "eval" / "result.json").write_text("{")
    page = runs_page([run])
    assert not [t for t in page.tables if t.name == "evaluation"]
    assert "eval/result.json cannot be read" in str(page.sections)
