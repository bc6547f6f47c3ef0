from __future__ import annotations

import json
import math
import os
import shutil
import signal
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from muonscale.lab.config.load import load_config
from muonscale.lab.data.ngram import fit_ngrams
from muonscale.lab.data.prepare import prepare
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.setup import build_batches
from tests.conftest import Muonscale, tiny_words, train_shared

STEPS = 12


def metrics(run: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_a_run_leaves_everything_it_promises(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    answer = muonscale("train", *tiny)
    assert answer.code == 0, answer.err
    run = tmp_path / "run"
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.json", "env.json", "metrics.jsonl", "tokenizer", "checkpoints", "model", "loss.png",
        "result.json",
    }  # fmt: skip
    env = json.loads((run / "env.json").read_text())
    assert env["threads"] == 1 and env["ns_dtype"] in ("float32", "bfloat16")
    assert env["ns_kernel"] == "torch"
    assert env["versions"]["torch"] == version("torch")
    steps = metrics(run, "train")
    assert [record["step"] for record in steps] == list(range(1, STEPS + 1))
    groups = set(steps[0]["lr"])
    assert groups == set(steps[0]["grad_norm"]) and "hidden" in groups
    for record in steps:
        assert record["tokens"] == record["step"] * 256
        assert 0 < record["optimizer_ms"] < record["step_ms"]
        assert 0.1 < record["update_rms"] < 0.25
    assert [r["step"] for r in metrics(run, "eval")] == [4, 8, 12]
    result = json.loads((run / "result.json").read_text())
    assert result["bigram_loss"] < result["unigram_loss"] < math.log(300)
    assert result["perplexity"] == pytest.approx(math.exp(result["validation_loss"]))
    for text in ("unigram", "bigram", "bits per byte", "matrices"):
        assert text in answer.out


def test_the_baselines_are_those_of_the_corpus_whatever_a_run_reads(
    muonscale: Muonscale, tiny: list[str], finished: Path, cache: Path, tmp_path: Path
) -> None:
    whole = json.loads((finished / "result.json").read_text())
    words = [*tiny, "train.steps=1", f"run.path={tmp_path / 'short'}"]
    answer = muonscale("train", *words)
    assert answer.code == 0, answer.err
    assert "fitting the n-gram baselines" not in answer.out  # the run of 12 steps has done it
    short = json.loads((tmp_path / "short" / "result.json").read_text())
    for key in ("unigram_loss", "bigram_loss"):
        assert short[key] == whole[key]

    # They are those of counts of the whole training split, and are fitted again when lost.
    config = load_config(tiny[0], tiny[1:])
    corpora = prepare(config.data, seed=config.run.seed, report=lambda *_: None)
    (corpus,) = corpora.values()
    (rows,) = build_batches(config, corpora, Processes()).train.values()
    ngrams = fit_ngrams([rows.batch(np.arange(len(rows)))], 300)
    validation = corpus.validation.rows(32)
    batch = validation.batch(np.arange(len(validation)))
    assert whole["bigram_loss"] == pytest.approx(ngrams.bigram_loss([batch]), rel=1e-9)
    (kept,) = [
        path
        for path in (cache / "ngrams").iterdir()
        if json.loads(path.read_text())["bigram_loss"] == whole["bigram_loss"]
    ]
    for damage in ("[", '{"unigram_loss": null}'):
        kept.write_text(damage)
        shutil.rmtree(tmp_path / "short")
        answer = muonscale("train", *words)
        assert answer.code == 0 and "fitting the n-gram baselines" in answer.out
        assert json.loads(kept.read_text())["bigram_loss"] == whole["bigram_loss"]


def test_the_speed_is_that_of_all_steps_and_the_median_is_called_so(
    muonscale: Muonscale, finished: Path
) -> None:
    """A machine that is busy for a while makes the median another number than the whole."""
    (finished / "result.json").unlink()
    lines = (finished / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records:
        if record["kind"] == "train":
            record["step_ms"] = 100.0 if record["step"] <= 7 else 1000.0
            record["tokens_per_second"] = 256 / (record["step_ms"] / 1000)
    changed = "".join(json.dumps(record) + "\n" for record in records)
    (finished / "metrics.jsonl").write_text(changed)
    answer = muonscale("train", finished, "--resume")
    assert answer.code == 0, answer.err
    result = json.loads((finished / "result.json").read_text())
    assert result["train_seconds"] == pytest.approx(5.7)
    assert result["mean_tokens_per_second"] == pytest.approx(12 * 256 / 5.7)
    assert result["tokens_per_second"] == pytest.approx(2560)
    assert "trained in 6 s, 539 tokens/s (median of the steps 2,560)" in answer.out


def test_the_model_loads_and_generates_in_transformers(
    muonscale: Muonscale, finished: Path
) -> None:
    folder = finished / "model"
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer("import os", return_tensors="pt")
    written = model.generate(**tokens, max_new_tokens=5, do_sample=False)
    assert written.shape[1] > tokens["input_ids"].shape[1]
    assert tokenizer.decode(tokens["input_ids"][0]) == "import os"
    answer = muonscale("generate", finished, "import os", "--tokens", 5, "--seed", 1)
    assert answer.code == 0 and answer.out.startswith("import os")


def test_the_loss_falls(muonscale: Muonscale, tiny: list[str], tmp_path: Path) -> None:
    assert muonscale("train", *tiny, "train.steps=40", "optimizer.lr=0.02").code == 0
    losses = [record["loss"] for record in metrics(tmp_path / "run", "train")]
    assert losses[-1] < losses[0] - 0.5


def test_the_logged_learning_rate_is_the_scheduled_one(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = ["schedule.name=linear", "schedule.warmup=2", "schedule.final=0", "optimizer.lr=0.5"]
    assert muonscale("train", *tiny, *words).code == 0
    for record in metrics(tmp_path / "run", "train"):
        step = record["step"] - 1
        want = (step + 1) / 3 if step < 2 else 1 - (step - 2) / 10
        assert list(record["lr"].values()) == pytest.approx([0.5 * want] * len(record["lr"]))


def test_the_same_seed_gives_the_same_weights_and_another_does_not(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        words = [*tiny, "train.steps=4", f"run.path={tmp_path / name}", f"run.seed={seed}"]
        answer = muonscale("train", *words)
        assert answer.code == 0, answer.err
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_a_diverging_run_stops_with_a_sentence_or_skips(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [*tiny, "optimizer.lr=1e30", "schedule.warmup=0"]
    answer = muonscale("train", *words)
    refused(answer, "is not finite", "q_proj")
    skipping = [*words, "optimizer.nonfinite=skip", f"run.path={tmp_path / 'skip'}"]
    assert muonscale("train", *skipping).code == 0
    assert metrics(tmp_path / "skip", "train")[-1]["skipped_steps"] > 5


def test_adamw_can_be_asked_for(muonscale: Muonscale, tiny: list[str], tmp_path: Path) -> None:
    answer = muonscale("train", *tiny, "optimizer.rule=adamw", "optimizer.lr=0.003")
    assert answer.code == 0, answer.err
    assert all(record["update_rms"] == 0 for record in metrics(tmp_path / "run", "train"))


def stop_after(step: int, run: Path, signum: int, times: int = 1) -> threading.Thread:
    """Send this process a signal once the run has recorded a step."""

    def watch() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if (run / "metrics.jsonl").exists() and len(metrics(run, "train")) >= step:
                for _ in range(times):
                    os.kill(os.getpid(), signum)
                    time.sleep(0.02)
                return
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


LONGER = ["train.steps=40", "checkpoint.every=1000"]


@pytest.fixture(scope="module")
def whole(corpus_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the words of `tiny` and LONGER, only to be read."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_shared(*tiny_words(folder, corpus_file, cache), *LONGER)
    return folder


@pytest.mark.parametrize(
    ("signum", "code"),
    [
        (signal.SIGINT, 130),
        (signal.SIGTERM, 143),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("hangup")
def test_a_stopped_run_saves_itself_and_resumes_bit_identically(
    signum: int, code: int, muonscale: Muonscale, tiny: list[str], whole: Path, tmp_path: Path
) -> None:
    words = [*tiny, *LONGER]
    watcher = stop_after(3, tmp_path / "run", signum)
    answer = muonscale("train", *words)
    watcher.join()
    assert answer.code == code
    assert "--resume" in answer.err
    done = len(metrics(tmp_path / "run", "train"))
    assert 3 <= done < 40
    assert not (tmp_path / "run" / "result.json").exists()
    answer = muonscale("train", tmp_path / "run", "--resume")
    assert answer.code == 0 and f"at step {done} of 40" in answer.out
    assert weights(tmp_path / "run") == weights(whole)
    losses = [[r["loss"] for r in metrics(path, "train")] for path in (tmp_path / "run", whole)]
    assert losses[0] == losses[1]


def test_a_second_ctrl_c_stops_at_once(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        finished.append(True)

    finished: list[bool] = []
    monkeypatch.setattr("muonscale.lab.training.loop.train_step", slow)
    assert muonscale("train", *tiny).code == 130
    assert not finished  # the step was interrupted, not waited for


def test_resume_passes_over_a_damaged_checkpoint(
    muonscale: Muonscale, tiny: list[str], finished: Path
) -> None:
    run, whole = finished, weights(finished)
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    data = next((run / "checkpoints" / "step-00000012").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-100])
    answer = muonscale("train", *tiny, "--resume")
    assert answer.code == 0
    assert "step-00000012 is damaged" in answer.out and "at step 10 of 12" in answer.out
    assert weights(run) == whole
    assert [r["step"] for r in metrics(run, "train")] == list(range(1, STEPS + 1))
    assert [r["step"] for r in metrics(run, "eval")] == [4, 8, 12]


def test_resume_keeps_the_records_after_a_damaged_line(
    muonscale: Muonscale, tiny: list[str], finished: Path
) -> None:
    (finished / "result.json").unlink()
    path = finished / "metrics.jsonl"
    split = path.read_text().splitlines(keepends=True)
    split[2] = split[2][:20] + "\n"
    path.write_text("".join(split))
    answer = muonscale("train", *tiny, "--resume")
    assert answer.code == 0 and "metrics-damaged.jsonl" in answer.out
    steps = [r["step"] for r in metrics(finished, "train")]
    assert len(steps) == STEPS - 1 and steps[-1] == STEPS
    assert (finished / "metrics-damaged.jsonl").read_text() == "".join(split)


@pytest.mark.parametrize("how", ["link", "empty", "missing"])
def test_resume_without_the_checkpoints_that_there_were(
    how: str, muonscale: Muonscale, finished: Path
) -> None:
    (finished / "result.json").unlink()
    before = (finished / "metrics.jsonl").read_bytes()
    root = finished / "checkpoints"
    shutil.rmtree(root)
    if how == "link":
        root.symlink_to(finished.parent / "volume" / "checkpoints")
    elif how == "empty":
        root.mkdir()
    refused(muonscale("train", finished, "--resume"), str(root), "mount")
    assert (finished / "metrics.jsonl").read_bytes() == before
    if how == "link":
        root.unlink()
    (finished / "metrics.jsonl").rename(finished / "old.jsonl")  # as the error says
    answer = muonscale("train", finished, "--resume")
    assert answer.code == 0 and "at step 0 of 12" in answer.out


def test_a_run_whose_metrics_are_lost_is_finished_all_the_same(
    muonscale: Muonscale, finished: Path
) -> None:
    run, whole = finished, weights(finished)
    shutil.rmtree(run / "model")
    (run / "result.json").write_text("{")
    refused(muonscale("train", run, "--resume"), "result.json cannot be read", "remove it")
    (run / "result.json").unlink()
    (run / "metrics.jsonl").write_text("5\n")
    answer = muonscale("train", run, "--resume")
    assert answer.code == 0 and "no record of a step" in answer.out
    assert weights(run) == whole
    assert json.loads((run / "result.json").read_text())["train_seconds"] is None
    assert muonscale("report", run).code == 0


def test_checkpoints_of_the_background_go_on_to_the_same_weights(
    muonscale: Muonscale, tiny: list[str], trained_once: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    words = [*tiny, "checkpoint.background=true", "checkpoint.every=3", "checkpoint.keep=9"]
    answer = muonscale("train", *words)
    assert answer.code == 0, answer.err
    assert steps_saved(run) == [3, 6, 9, 12] and weights(run) == weights(trained_once)
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "result.json").unlink()
    answer = muonscale("train", run, "--resume")
    assert answer.code == 0 and "at step 9 of 12" in answer.out
    assert weights(run) == weights(trained_once)


def test_samples_during_training_change_nothing_else(
    muonscale: Muonscale, tiny: list[str], trained_once: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    answer = muonscale("train", *tiny, "eval.samples_every=4")
    assert answer.code == 0, answer.err
    assert weights(run) == weights(trained_once)
    assert sorted(p.name for p in (run / "samples").iterdir()) == [
        "step-00000004.txt", "step-00000008.txt",
    ]  # fmt: skip
    text = (run / "samples" / "step-00000008.txt").read_text()
    assert text.startswith("def ") and f"--- sample after step 8\n{text}---" in answer.out


def steps_saved(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").iterdir())


def test_marked_checkpoints_are_kept_over_a_resume(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    marks = ["checkpoint.keep=1", "checkpoint.marks=[0.25, 1700]"]
    run = tmp_path / "run"
    assert muonscale("train", *tiny, *marks).code == 0
    assert steps_saved(run) == [3, 7, 12]  # 1700 tokens end within step 7
    shutil.rmtree(run / "model")
    (run / "result.json").unlink()
    for step in (7, 12):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    answer = muonscale("train", run, "--resume")
    assert answer.code == 0 and "at step 3 of 12" in answer.out
    assert steps_saved(run) == [3, 7, 12]


def test_marks_may_change_on_resume_and_one_beyond_the_end_is_refused(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    late = "checkpoint.marks=[0.5, 3073]"
    for extra in ([], ["--dry-run"]):
        refused(muonscale("train", *tiny, late, *extra), "checkpoint.marks: 3,073 tokens", "3,072")
    assert not run.exists()
    assert muonscale("train", *tiny, "checkpoint.marks=[0.25]").code == 0
    assert steps_saved(run) == [3, 10, 12]
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    for step in (10, 12):
        shutil.rmtree(run / "checkpoints" / f"step-{step:08d}")
    answer = muonscale(
        "train", run, "checkpoint.marks=[0.25, 0.5]", "checkpoint.keep=1", "--resume"
    )
    assert answer.code == 0, answer.err
    assert steps_saved(run) == [3, 6, 12]


def test_a_run_that_found_another_corpus_before_its_first_checkpoint_has_its_tokenizer(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, corpus_text: str
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(corpus_text[:80_000])
    words = [*tiny, f"data.path={own}", "train.steps=2"]
    assert muonscale("train", *words).code == 0
    run = tmp_path / "run"
    first = (run / "tokenizer" / "tokenizer.json").read_bytes()
    for folder in ("model", "checkpoints"):
        shutil.rmtree(run / folder)
    (run / "result.json").unlink()
    own.write_text(corpus_text[80_000:])
    assert muonscale("train", *words, "--resume").code == 0
    now = (run / "tokenizer" / "tokenizer.json").read_bytes()
    assert now != first and now == (run / "model" / "tokenizer.json").read_bytes()


def test_resume_of_nothing_starts_and_says_so(muonscale: Muonscale, tiny: list[str]) -> None:
    answer = muonscale("train", *tiny, "train.steps=2", "--resume")
    assert answer.code == 0 and "nothing to resume" in answer.out


def test_a_finished_run_is_not_repeated(
    muonscale: Muonscale, tiny: list[str], finished: Path
) -> None:
    before = (finished / "result.json").stat().st_mtime_ns
    answer = muonscale("train", *tiny, "--resume")
    assert answer.code == 0 and "finished" in answer.out
    assert (finished / "result.json").stat().st_mtime_ns == before


def test_the_length_of_a_run_may_be_given_in_epochs(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    words = [word for word in tiny if not word.startswith("train.steps")] + ["train.epochs=0.05"]
    answer = muonscale("train", *words)
    assert answer.code == 0, answer.err
    config = load_config(str(tmp_path / "run"))
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    (data,) = env["data"].values()
    assert config.train.epochs is None and config.steps * 256 >= config.train.tokens
    assert data["read"]["epochs"] == pytest.approx(0.05, abs=256 / data["train"]["tokens"])
    assert "validation loss" in answer.out and "epoch 0.05" in answer.out
    for again in (words, [tmp_path / "run"]):
        answer = muonscale("train", *again, "--resume")
        assert answer.code == 0 and "is finished" in answer.out, answer.err
    refused(muonscale("train", *words, "--dry-run"), "train.epochs=0.05", "train.tokens")
    mixture = "data.mixture=[{path: a, weight: 1}, {path: b, weight: 1}]"
    several = [word for word in words if not word.startswith("data.path")]
    refused(muonscale("train", *several, mixture), "train.epochs=0.05", "data.mixture has 2")


def test_a_dry_run_says_everything_and_writes_nothing(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    answer = muonscale("train", *tiny, "--dry-run")
    assert answer.code == 0, answer.err
    assert '"run": {' not in answer.out
    for text in (
        "parameters",
        "FLOPs",
        "schedule",
        "q_proj",
        "adamw",
        "12 steps of 256: 3,072",
    ):
        assert text in answer.out
    assert not (tmp_path / "run").exists()


def refused(answer: object, *words: str) -> None:
    assert answer.code == 2  # type: ignore[attr-defined]
    text = answer.err  # type: ignore[attr-defined]
    assert "Traceback" not in text
    for word in words:
        assert word in text


def test_an_existing_run_is_refused(muonscale: Muonscale, tiny: list[str], finished: Path) -> None:
    before = weights(finished)
    refused(muonscale("train", *tiny), "already exists", "--resume", "run.path=")
    assert weights(finished) == before


def test_resume_with_another_model_or_data_is_refused(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, corpus_text: str
) -> None:
    own = tmp_path / "own.txt"
    own.write_text(corpus_text)
    words = [*tiny, f"data.path={own}", "train.steps=2"]
    assert muonscale("train", *words).code == 0
    (tmp_path / "run" / "result.json").unlink()
    refused(
        muonscale("train", *words, "model.fields.hidden_size=64", "--resume"),
        "model.fields.hidden_size",
    )
    own.write_text(corpus_text[::-1])
    refused(muonscale("train", *words, "--resume"), "another data fingerprint")


def test_bad_data_leaves_no_run_folder_behind(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"fine text\n" * 50 + b"\xff\xfe oops")
    refused(muonscale("train", *tiny, f"data.path={bad}"), "bad.txt", "500", "data.errors=replace")
    short = tmp_path / "short.txt"
    short.write_text("too short")
    refused(muonscale("train", *tiny, f"data.path={short}"), "sequence")
    refused(muonscale("train", *tiny, f"data.path={tmp_path / 'none.txt'}"), "none.txt")
    assert not (tmp_path / "run").exists()
    assert muonscale("train", *tiny, "train.steps=2").code == 0


def test_a_run_folder_that_cannot_be_made_is_refused(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path
) -> None:
    refused(muonscale("train", *tiny, "run.path=/proc/run"), "/proc/run")
    (tmp_path / "file").write_text("x")
    refused(muonscale("train", *tiny, f"run.path={tmp_path / 'file'}"), "file")


def test_an_unfinished_run_does_not_generate(
    muonscale: Muonscale, finished: Path, tmp_path: Path
) -> None:
    shutil.rmtree(finished / "model")
    refused(muonscale("generate", finished, "x"), "not finished")
    refused(muonscale("generate", tmp_path / "nothing", "x"), "nothing")


@pytest.mark.parametrize("how", ["elsewhere", "gone"])
def test_resume_uses_the_prepared_tokens_if_the_text_cannot_be_read(
    how: str,
    muonscale: Muonscale,
    tiny: list[str],
    corpus_text: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "own.txt").write_text(corpus_text[:60_000])
    monkeypatch.chdir(tmp_path)
    run, weights_file = tmp_path / "run", tmp_path / "run" / "model" / "model.safetensors"
    words = [word for word in tiny if not word.startswith(("data.path=", "data.cache="))]
    words += ["data.path=own.txt", f"data.cache={tmp_path / 'cache'}"]
    assert muonscale("train", *words).code == 0
    whole = weights_file.read_bytes()
    (run / "result.json").unlink()
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    if how == "gone":
        (tmp_path / "own.txt").unlink()
    else:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
    answer = muonscale("train", run, "--resume")
    assert answer.code == 0, answer.err
    assert "own.txt" in answer.out and str(tmp_path / "cache") in answer.out
    assert weights_file.read_bytes() == whole
    assert muonscale("eval", run).code == 0
    (run / "result.json").unlink()
    shutil.rmtree(tmp_path / "cache")
    refused(muonscale("train", run, "--resume"), "own.txt cannot be read")


def test_the_mfu_is_recorded_where_the_peak_of_the_device_is_known(
    muonscale: Muonscale, tiny: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muonscale.lab.training.setup.peak_flops", lambda *_: 1e10)
    answer = muonscale("train", *tiny, "log.every=1")
    assert answer.code == 0, answer.err
    run = tmp_path / "run"
    environment = json.loads((run / "env.json").read_text())
    per_token = environment["flops"]["per_token"]
    assert environment["peak_flops"] == 1e10 and "MFU" in answer.out
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    records = [line for line in lines if line["kind"] == "train"]
    for record in records:
        assert record["mfu"] == pytest.approx(per_token * record["tokens_per_second"] / 1e10)
