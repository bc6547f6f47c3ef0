"""Tasks of lm-evaluation-harness on local files, beside the same numbers by plain torch."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from muonscale.errors import ConfigError
from muonscale.lab.harness import Harness, HarnessOptions, HarnessTask
from tests.conftest import Muonscale

DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
CHOICES = [{"q": f"import {name}", "options": ["os, sys\n", "def", "(self):"], "answer": i % 3}
           for i, name in enumerate(("ast", "json", "heapq", "shutil", "re", "math", "copy"))]  # fmt: skip

PICK = """
task: pick
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{q}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
{more}
"""

WRITE = """
task: write
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {file}}}}}
output_type: generate_until
validation_split: validation
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: {tokens}}}
metric_list: [{{metric: exact_match}}]
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")


def task_folder(folder: Path, *, name: str = "tasks", more: str = "", tokens: int = 6) -> Path:
    """Write two tasks, and the texts that a model has to write for the second."""
    folder = folder / name
    folder.mkdir()
    (folder / "pick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHOICES))
    (folder / "pick.yaml").write_text(PICK.format(file=folder / "pick.jsonl", more=more))
    (folder / "write.yaml").write_text(WRITE.format(file=folder / "write.jsonl", tokens=tokens))
    return folder


@pytest.fixture
def run(muonscale: Muonscale, tiny: list[str], tmp_path: Path) -> Path:
    assert muonscale("train", *tiny, "train.steps=8").code == 0
    return tmp_path / "run"


def log_likelihood(model: Any, tokenizer: Any, context: str, text: str) -> float:
    before = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + text)["input_ids"]])
    with torch.no_grad():
        log_p = model(ids[:, :-1]).logits[0].double().log_softmax(-1)
    return sum(float(log_p[i, ids[0, i + 1]]) for i in range(before - 1, ids.shape[1] - 1))


def greedy(model: Any, tokenizer: Any, prompt: str, tokens: int) -> str:
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids = [*ids, int(model(torch.tensor([ids])).logits[0, -1].argmax())]
    return tokenizer.decode(ids[start:]).split("\n")[0]


@pytest.mark.slow
def test_the_numbers_are_those_of_plain_torch(
    muonscale: Muonscale, run: Path, tmp_path: Path
) -> None:
    folder = task_folder(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    prompts = ["def f", "import o", "class A", "return "]
    answers = [greedy(model, tokenizer, prompt, 6) for prompt in prompts]
    rows = [{"q": q, "answer": a if i else "?"} for i, (q, a) in enumerate(zip(prompts, answers, strict=True))]  # fmt: skip
    (folder / "write.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    right, right_by_bytes = 0, 0
    for row in CHOICES:
        # The harness joins question and choice with a space.
        each = [log_likelihood(model, tokenizer, row["q"], " " + o) for o in row["options"]]
        scaled = [value / len(o) for value, o in zip(each, row["options"], strict=True)]
        right += max(range(3), key=each.__getitem__) == row["answer"]
        right_by_bytes += max(range(3), key=scaled.__getitem__) == row["answer"]
    answer = muonscale("eval", run, "--tasks", "pick,write", "--include-path", folder, "--json")
    assert answer.code == 0, answer.err
    measured = json.loads(answer.out)
    assert measured["texts"] == []
    pick, write = measured["tasks"]
    n = len(CHOICES)
    assert pick["values"]["acc,none"]["value"] == pytest.approx(right / n)
    assert pick["values"]["acc_norm,none"]["value"] == pytest.approx(right_by_bytes / n)
    p = right / n
    assert pick["values"]["acc,none"]["stderr"] == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    assert write["values"]["exact_match,none"]["value"] == pytest.approx(3 / 4)
    assert (pick["documents"], pick["shots"], pick["limit"]) == (n, 0, None)
    assert pick["versions"]["lm_eval"]
    # A second call keeps these, and says so; other shots and limits are other measurements.
    words = ("--tasks", "pick", "--include-path", folder)
    answer = muonscale("eval", run, *words, "--shots", 2, "--limit", 3)
    assert "new: 1 task; from earlier evaluations: 2 tasks" in answer.out, answer.err
    result = json.loads((run / "eval" / "result.json").read_text())
    kept = [(t["task"], t["shots"], t["documents"]) for t in result["checkpoints"][0]["tasks"]]
    assert kept == [("pick", 0, n), ("write", 0, 4), ("pick", 2, 3)]


@pytest.mark.slow
def test_the_log_likelihoods_are_those_of_plain_torch(run: Path, tmp_path: Path) -> None:
    from lm_eval.api.instance import Instance

    from muonscale.lab import harness

    model = AutoModelForCausalLM.from_pretrained(run / "model")
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    with harness._collect_warnings():
        lm = harness._language_model(model, tokenizer, torch.float32, HarnessOptions(batch_size=4))
        pairs = [(row["q"], " " + option) for row in CHOICES for option in row["options"]]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        found = [value for value, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    want = [log_likelihood(model, tokenizer, *pair) for pair in pairs]
    assert found == pytest.approx(want, rel=1e-5)


@pytest.mark.slow
def test_what_cannot_be_run_is_refused_in_a_sentence(
    muonscale: Muonscale, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixed = task_folder(tmp_path, name="fixed", more="num_fewshot: 0", tokens=64)
    unsafe = task_folder(tmp_path, name="unsafe", more="unsafe_code: true")
    (fixed / "write.jsonl").write_text('{"q": "a", "answer": "b"}\n')
    lost = task_folder(tmp_path, name="lost")
    (lost / "pick.jsonl").unlink()
    for words, reason in [
        (("--tasks", "pick", "--include-path", fixed, "--shots", 2), "0 shots"),
        (("--tasks", "write", "--include-path", fixed), "positions for them"),
        (("--tasks", "pick", "--include-path", unsafe), "--run-code"),
        (("--tasks", "pick", "--include-path", lost), "cannot be loaded"),
        (("--tasks", "pick", "--include-path", tmp_path / "none"), "there is no such folder"),
        (("--tasks", "pick,", "--include-path", fixed), "'pick,'"),
        (("--tasks", "gsm8kk"), "did you mean gsm8k"),
        (("--suite", "moonlight", "--tasks", "humaneval"), "--run-code"),
        (("--suite", "moonlight", "--shots", 2), "has its own"),
    ]:
        answer = muonscale("eval", run, *words)
        assert answer.code == 2 and reason in answer.err, (words, answer.err)
        assert "Traceback" not in answer.err
    assert not (run / "eval" / "result.json").exists()
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    words = ("--tasks", "pick", "--include-path", unsafe, "--run-code")
    assert muonscale("eval", run, *words).code == 0
    assert "HF_ALLOW_CODE_EVAL" not in os.environ


@pytest.mark.slow
def test_prompts_that_are_cut_are_counted(muonscale: Muonscale, run: Path, tmp_path: Path) -> None:
    folder = task_folder(tmp_path, more='description: "a long one, "')
    long = [{**row, "q": "x = 1\n" * 200} for row in CHOICES[:2]]
    (folder / "pick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in long))
    answer = muonscale("eval", run, "--tasks", "pick", "--include-path", folder)
    assert answer.code == 0, answer.err
    assert "lost their beginning" in answer.out


@pytest.mark.slow
def test_the_task_of_the_docs_runs(
    muonscale: Muonscale, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tasks").mkdir()
    for language, name in (("yaml", "capitals.yaml"), ("json", "capitals.jsonl")):
        (block,) = re.findall(rf"^```{language}\n(.*?)^```", DOCS, flags=re.M | re.S)
        (tmp_path / "tasks" / name).write_text(block)
    line = re.search(r"^muonscale eval runs/mine (--tasks capitals .*)$", DOCS, flags=re.M)
    assert line
    answer = muonscale("eval", run, *line[1].split())
    assert answer.code == 0, answer.err
    assert "2 documents" in answer.out


def test_without_the_extra_the_command_that_installs_it_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("muonscale.lab.harness.find_spec", lambda name: None)
    assert importlib.util.find_spec("muonscale")
    with pytest.raises(ConfigError, match=r"pip install \"muonscale\[eval\]\""):
        Harness([HarnessTask("arc_easy")], HarnessOptions())


@pytest.mark.slow
def test_tasks_during_training_are_those_of_eval_and_change_nothing(
    muonscale: Muonscale, tiny: list[str], trained_once: Path, tmp_path: Path
) -> None:
    folder, run = task_folder(tmp_path), tmp_path / "run"
    words = [*tiny, "eval.tasks=[pick]", f"eval.tasks_path={folder}", "eval.tasks_every=5"]
    answer = muonscale("train", *words, "checkpoint.keep=9")
    assert answer.code == 0, answer.err
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = {r["step"]: r["tasks"] for r in records if r["kind"] == "tasks"}
    assert list(measured) == [5, 10, 12]
    for step, tasks in measured.items():
        out = tmp_path / str(step)
        words = ["--tasks", "pick", "--include-path", folder, "--json", "--out", out]
        answer = muonscale("eval", f"{run}@{step}", *words)
        assert answer.code == 0, answer.err
        (checkpoint,) = json.loads((out / "result.json").read_text())["checkpoints"]
        (task,) = checkpoint["tasks"]
        values = {name.removesuffix(",none"): v["value"] for name, v in task["values"].items()}
        assert tasks == {"pick": values} and {"acc", "acc_norm"} <= values.keys()
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        assert (run / "model" / name).read_bytes() == (trained_once / "model" / name).read_bytes()


def test_unknown_tasks_end_a_run_before_its_first_step(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = ["eval.tasks=[pick]", f"eval.tasks_path={tmp_path / 'none'}"]
    answer = muonscale("train", *tiny, *words)
    assert answer.code == 2 and "there is no such folder" in answer.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
