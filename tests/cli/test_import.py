"""Training that starts from a checkpoint, through the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from muonscale import Muon, parameter_groups
from muonscale.errors import MuonscaleError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.data.prepare import prepare
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training import loop
from muonscale.lab.training.setup import build_batches
from tests.cli.jobs import losses, weights
from tests.conftest import Answer, Muonscale

Words = Callable[..., list[str]]


@pytest.fixture
def rest(tiny: list[str]) -> list[str]:
    """What the words of a very small run say besides the model."""
    return [word for word in tiny if not word.startswith("model.")]


@pytest.fixture
def model(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of the model of a finished run."""
    return Path(shutil.copytree(trained_once / "model", tmp_path / "first" / "model"))


def refused(answer: Answer, *words: str) -> None:
    assert answer.code == 2, answer.out
    assert "Traceback" not in answer.err
    for word in words:
        assert word in answer.err


def config_of(model: Path, words: list[str]) -> Config:
    return load_config(words[0], [f"model.weights={model}", f"data.tokenizer={model}", *words[1:]])


def first_batch(config: Config) -> torch.Tensor:
    corpus = prepare(config.data, seed=config.run.seed, report=lambda *_: None)
    return torch.from_numpy(build_batches(config, corpus, Processes()).at(0))


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=batch[:, :-1]).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(["model.preset=llama-pico"], id="llama", marks=pytest.mark.slow),
        pytest.param(
            ["model.preset=gpt-nano", "model.fields.n_embd=32", "model.fields.n_layer=2"],
            id="gpt2",
        ),
        pytest.param(
            ["model.preset=moonlight-nano", "model.fields.num_hidden_layers=2"], id="deepseek_v3"
        ),
        pytest.param(
            ["model.preset=gemma-nano", "model.fields.num_hidden_layers=2"],
            id="gemma3",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_an_imported_model_starts_with_the_exported_ones_loss(
    muonscale: Muonscale, tiny: list[str], rest: list[str], tmp_path: Path, words: list[str]
) -> None:
    steps = ["train.steps=1", "data.sequence_length=32"]
    answer = muonscale("train", *tiny, *words, *steps, f"run.path={tmp_path / 'first'}")
    assert answer.code == 0, answer.err
    model = tmp_path / "first" / "model"
    answer = muonscale("import", model, *rest, *steps)
    assert answer.code == 0, answer.err
    expected = AutoModelForCausalLM.from_pretrained(model).eval()
    with torch.no_grad():
        loss = loss_of(expected, first_batch(config_of(model, rest)))
    assert losses(tmp_path / "run")[0] == pytest.approx(float(loss), rel=2e-6)
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert env["weights"]["folder"] == str(model)
    size = (model / "model.safetensors").stat().st_size
    assert env["weights"]["files"]["model.safetensors"]["bytes"] == size


@pytest.mark.parametrize(("lr", "said"), [(0.02, "better"), (3.0, "worse")])
def test_an_import_says_the_loss_before_and_after(
    muonscale: Muonscale, rest: list[str], model: Path, trained_once: Path, tmp_path: Path,
    lr: float, said: str,
) -> None:  # fmt: skip
    answer = muonscale("import", model, *rest, f"optimizer.lr={lr}", "schedule.warmup=0")
    assert answer.code == 0, answer.err
    first = json.loads((trained_once / "result.json").read_text())
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    before, after = result["start_validation_loss"], result["validation_loss"]
    assert before == pytest.approx(first["validation_loss"], abs=1e-5)  # of the same text
    assert result["bigram_loss"] == first["bigram_loss"]
    assert (after < before) == (said == "better")
    assert (
        f"validation loss before training {before:.3f}, after {after:.3f} "
        f"({abs(after - before):.3f} {said})" in answer.out
    )
    assert muonscale("report", tmp_path / "run").code == 0
    page = (tmp_path / "run" / "report" / "report.html").read_text(encoding="utf-8")
    assert "validation loss before training" in page and f"{before:.4f}" in page


def test_with_the_optimizers_state_a_run_goes_on_as_if_never_left(
    muonscale: Muonscale, rest: list[str], model: Path, tmp_path: Path
) -> None:
    options = ["optimizer.max_grad_norm=null", "optimizer.ns_dtype=float32", "optimizer.lr=0.02"]
    words = [*rest, *options, "train.steps=1", "schedule.warmup=0"]
    config = config_of(model, words)
    batch = first_batch(config)
    own = AutoModelForCausalLM.from_pretrained(model).train()
    optimizer = Muon(parameter_groups(own, lr=0.5, weight_decay=0.1), ns_dtype="float32")
    for _ in range(4):  # with another learning rate than the run's, which is not to be taken over
        for group in optimizer.param_groups:
            group["lr"] = 0.003
        optimizer.zero_grad()
        loss_of(own, batch.flip(0)).backward()
        optimizer.step()
    own.save_pretrained(tmp_path / "own")
    for path in model.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "own")
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    optimizer.zero_grad()
    loss_of(own, batch).backward()
    optimizer.step()

    arguments = [tmp_path / "own", *words, "--state", tmp_path / "state.pt"]
    answer = muonscale("import", *arguments)
    assert answer.code == 0, answer.err
    number = len(list(own.parameters()))
    assert f"state of {number} of {number} parameters" in answer.out
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    after = dict(trained.named_parameters())
    for name, parameter in own.named_parameters():
        torch.testing.assert_close(after[name], parameter, rtol=1e-5, atol=1e-6)
    env = json.loads((tmp_path / "run" / "env.json").read_text())
    assert len(env["optimizer_state"]["state.pt"]["sha256"]) == 64
    # and without the state it is another step
    answer = muonscale("import", *arguments[:-2], f"run.path={tmp_path / 'without'}")
    assert answer.code == 0, answer.err
    without = dict(
        AutoModelForCausalLM.from_pretrained(tmp_path / "without" / "model").named_parameters()
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    assert (without[name] - after[name]).abs().max() > 1e-4


@pytest.mark.slow
def test_a_resumed_run_needs_its_folder_and_state_only_without_a_checkpoint(
    muonscale: Muonscale, rest: list[str], model: Path, tmp_path: Path, monkeypatch
) -> None:
    own = AutoModelForCausalLM.from_pretrained(model)
    state = tmp_path / "state.pt"
    torch.save(Muon(parameter_groups(own, lr=0.5)).state_dict(), state)
    for name in ("run", "whole"):
        shutil.copytree(model, tmp_path / f"source-{name}")
    whole = [*rest, f"run.path={tmp_path / 'whole'}", "--state", state]
    assert muonscale("import", tmp_path / "source-whole", *whole).code == 0

    taken = 0
    step = loop.train_step

    def stopping(*args, **kwargs):
        nonlocal taken
        taken += 1
        if taken == 1 or taken == 9:  # before any checkpoint; after that of step 5
            raise MuonscaleError("stopped")
        return step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", stopping)
    source, run = tmp_path / "source-run", tmp_path / "run"
    refused(muonscale("import", source, *rest, "--state", state), "stopped")
    source.rename(tmp_path / "away")
    refused(muonscale("train", run, "--resume"), "source-run")
    (tmp_path / "away").rename(source)
    refused(muonscale("train", run, "--resume"), "stopped")
    shutil.rmtree(source)
    state.unlink()
    answer = muonscale("train", run, "--resume")
    assert answer.code == 0 and "at step 5 of 12" in answer.out, answer.err
    assert weights(run) == weights(tmp_path / "whole")
    env = json.loads((run / "env.json").read_text())
    assert env["weights"]["folder"] == str(source)


def test_the_verbs_that_only_look_take_the_checkpoint_too(
    muonscale: Muonscale, rest: list[str], model: Path, tmp_path: Path
) -> None:
    words = [f"model.weights={model}", f"data.tokenizer={model}"]
    for verb, more in (("inspect", []), ("plan", ["--device", "cpu"]), ("train", ["--dry-run"])):
        answer = muonscale(verb, *rest, *words, *more)
        assert answer.code == 0, answer.err
        answer = muonscale(verb, *rest, *words, f"model.weights={tmp_path / 'none'}", *more)
        refused(answer, "model.weights", "none")
    answer = muonscale("import", model, *rest, "--dry-run", "--json")
    assert answer.code == 0 and f'"weights": "{model}"' in answer.out
    refused(muonscale("inspect", "llama-pico", words[0]), "data.tokenizer")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_verify_starts_from_the_checkpoint(
    muonscale: Muonscale, rest: list[str], model: Path
) -> None:
    words = [*rest, f"model.weights={model}", f"data.tokenizer={model}"]
    answer = muonscale("verify", *words, "--layout", "fsdp=2", "--steps", "2", "--json")
    assert answer.code == 0, answer.err
    expected = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        loss = loss_of(expected, first_batch(config_of(model, rest)))
    text = json.dumps(json.loads(answer.out[answer.out.index("{") :]))
    assert f"{float(loss):.4f}"[:5] in text


@pytest.mark.parametrize(("positions", "length"), [(4096, 1024), (700, 512), (48, 32)])
def test_without_a_recipe_import_has_defaults_for_fine_tuning(
    positions: int, length: int, muonscale: Muonscale, model: Path, corpus_file: Path
) -> None:
    path = model / "config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": positions})
    )
    words = ["import", model, f"data.path={corpus_file}", "--dry-run"]
    answer = muonscale(*words, "--json")
    assert answer.code == 0, answer.err
    assert "warning: optimizer.lr" not in answer.err
    config = json.loads(answer.out)
    assert config["optimizer"]["lr"] == 2e-5 and config["eval"]["prompt"] == ""
    schedule = config["schedule"]
    assert (schedule["name"], schedule["warmup"], schedule["final"]) == ("linear", 0.03, 0)
    assert config["data"]["sequence_length"] == length
    answer = muonscale(*words, "--json", "data.sequence_length=16", "optimizer.lr=0.1")
    config = json.loads(answer.out)
    assert (config["data"]["sequence_length"], config["optimizer"]["lr"]) == (16, 0.1)
    assert muonscale(*words).code == 0


def test_a_warning_says_what_muon_gains_unless_the_card_has_the_tag(
    muonscale: Muonscale, rest: list[str], model: Path
) -> None:
    card = model / "README.md"
    card.unlink(missing_ok=True)
    say = "warning: the model card"
    answer = muonscale("import", model, *rest, "--dry-run")
    assert "optimizer.lr=0.02 is that of the recipe demo" in answer.err
    given = muonscale("import", model, *rest, "optimizer.lr=0.001", "--dry-run")
    assert given.code == 0 and "of the recipe demo" not in given.err
    assert say in answer.err and "2502.16982" in answer.err and "optimizer.rule=adamw" in answer.err
    for text, warns in (
        ("---\ntags:\n- muon\n- llama\n---\n# A model\n", False),
        ("---\ntags: [llama]\n---\ntrained with muon\n", True),
        ("tags: muon\n", True),
        ("---\ntags: [\n---\n", True),
    ):
        card.write_text(text)
        answer = muonscale("import", model, *rest, "--dry-run")
        assert answer.code == 0 and (say in answer.err) == warns, text
    answer = muonscale("import", model, *rest, "--dry-run", "optimizer.rule=adamw")
    assert answer.code == 0 and say not in answer.err


def test_a_name_is_fetched(
    muonscale: Muonscale, rest: list[str], model: Path, monkeypatch, tmp_path: Path
) -> None:
    asked = []

    def fetch(name: str, **options: list[str]) -> str:
        asked.append((name, options))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    monkeypatch.chdir(tmp_path)
    answer = muonscale("import", "org/model", *rest, "--dry-run", "--json")
    assert answer.code == 0 and f'"tokenizer": "{model}"' in answer.out
    assert asked[0][0] == "org/model" and "*.safetensors" in asked[0][1]["allow_patterns"]


def test_what_cannot_be_imported_is_refused_in_a_sentence(
    muonscale: Muonscale, rest: list[str], model: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    refused(muonscale("import", "org/model", *rest), "no folder org/model")
    refused(muonscale("import", tmp_path / "none", *rest), "none is not a folder")
    (tmp_path / "empty").mkdir()
    refused(muonscale("import", tmp_path / "empty", *rest), "empty")
    answer = muonscale("train", *rest, f"model.weights={model}")
    refused(answer, "data.tokenizer", f"data.tokenizer={model}")
    answer = muonscale("import", model, *rest, "model.preset=llama-pico")
    refused(answer, "model.preset and model.weights exclude each other")
    answer = muonscale("import", model, *rest, "model.fields.hidden_size=64")
    refused(answer, "hidden_size", "shape")
    answer = muonscale("import", model, *rest, "data.sequence_length=64")
    refused(answer, "data.sequence_length=64", "32 positions", "max_position_embeddings=64")
    answer = muonscale("import", model, *rest, "--state", tmp_path / "none.pt")
    refused(answer, "optimizer.state=", "none.pt")
    answer = muonscale("import", model, *rest, "--state", tmp_path / "none.pt", "--dry-run")
    refused(answer, "optimizer.state=", "none.pt")
    answer = muonscale("import", model, *rest, "optimizer.state_format=moonlite")
    refused(answer, "optimizer.state_format='moonlite'", "moonlight")
    answer = muonscale("import", model, *rest, "optimizer.state_format=moonlight")
    refused(answer, "without optimizer.state")
    (model / "model.safetensors").write_bytes(b"not weights")
    refused(muonscale("import", model, *rest), "cannot be loaded")
    assert not (tmp_path / "run").exists()
