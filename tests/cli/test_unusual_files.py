"""Pipes, devices and huge files in place of a file: every command refuses or passes them over."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest

from tests.conftest import Muonscale

SECONDS = 600
"""A command that waits for a pipe, or reads a device, is stopped after this time."""

STEP = "checkpoints/step-00000012"


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def huge(path: Path) -> None:
    path.touch()
    os.truncate(path, 2**42)  # sparse


KINDS = [
    pytest.param(pipe, id="pipe"),
    pytest.param(device, id="device", marks=pytest.mark.slow),
    pytest.param(huge, id="huge", marks=pytest.mark.slow),
]


@pytest.fixture(autouse=True)
def bounded() -> Iterator[None]:
    """Stop a test that waits, and refuse it memory in place of the machine's."""

    def stop(signum: int, frame: FrameType | None) -> None:
        pytest.fail("the command waits")  # a BaseException, which no command turns into a sentence

    former = signal.signal(signal.SIGALRM, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (16 * 2**30, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


RUN_FILES = (
    "config.json",
    "env.json",
    "metrics.jsonl",
    "run.lock",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    f"{STEP}/manifest.json",
    f"{STEP}/facts.json",
    f"{STEP}/.metadata",
    f"{STEP}/__0_0.distcp",
    ".metrics.jsonl.tmp",
    ".env.json.tmp",
)
MODEL_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def refused_or_done(code: int, err: str) -> bool:
    return code in (0, 2) and "Traceback" not in err and bool(code == 0 or err.strip())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", RUN_FILES)
def test_in_a_run_folder(
    name: str, kind: Callable[[Path], None], finished: Path, muonscale: Muonscale
) -> None:
    for path in ("result.json", name):
        (finished / path).unlink(missing_ok=True)
    kind(finished / name)
    out = finished.parent / "out"
    for words in (
        ["export", finished, out],
        ["eval", finished],
        ["report", finished, "--out", out.with_name("report")],
        ["train", finished, "--resume"],
    ):
        found = muonscale(*words)
        assert refused_or_done(found.code, found.err), (words, found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", MODEL_FILES)
def test_in_a_model_folder(
    name: str,
    kind: Callable[[Path], None],
    tiny: list[str],
    trained_once: Path,
    tmp_path: Path,
    muonscale: Muonscale,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained_once / "model", folder)
    (folder / name).unlink()
    kind(folder / name)
    for words in (
        ["generate", folder, "def ", "--tokens", 2],
        ["eval", folder, tiny[4], "data.sequence_length=32"],
        ["inspect", folder],
        ["import", folder, *tiny[1:3], *tiny[4:]],
    ):
        found = muonscale(*words)
        assert found.code in (0, 2) and "Traceback" not in found.err, (words, found)
        assert found.code == 2 or name != "model.safetensors" or words[0] == "inspect"


NAMED: dict[str, Callable[[Path], list[object]]] = {
    "recipe.yaml": lambda path: ["train", path],
    "recipe.json": lambda path: ["train", path],
    "study.yaml": lambda path: ["study", "plan", path],
    "state.pt": lambda path: ["train", "demo", f"optimizer.state={path}"],
    "tokenizer.json": lambda path: ["train", "demo", f"data.tokenizer={path}"],
    "model.json": lambda path: ["train", "demo", f"model.config={path}", "--dry-run"],
    "text.txt": lambda path: ["train", "demo", f"data.path={path}"],
    "text.jsonl": lambda path: ["train", "demo", f"data.path={path}"],
    "text.parquet": lambda path: ["train", "demo", f"data.path={path}"],
    "table.csv": lambda path: ["fit", "scaling", path],
    "table.jsonl": lambda path: ["fit", "scaling", path],
}


@pytest.fixture
def refused(
    tmp_path: Path, muonscale: Muonscale, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, Callable[[Path], object]], None]:
    """Return a check that a file which is named on the command line is refused by its name."""
    monkeypatch.setenv("MUONSCALE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)

    def check(name: str, make: Callable[[Path], object]) -> None:
        make(path := tmp_path / name)
        found = muonscale(*NAMED[name](path))
        assert found.code == 2 and name in found.err and "Traceback" not in found.err

    return check


@pytest.mark.parametrize("kind", [pipe, device])
@pytest.mark.parametrize("name", NAMED)
def test_named_on_the_command_line(
    name: str, kind: Callable[[Path], None], tmp_path: Path, refused: Callable
) -> None:
    refused(name, kind)
    assert not (tmp_path / "cache").exists()  # refused before anything was prepared


def test_a_recipe_from_a_pipe_of_the_shell(muonscale: Muonscale) -> None:
    reading, writing = os.pipe()
    try:
        found = muonscale("train", f"/dev/fd/{reading}")
    finally:
        os.close(reading)
        os.close(writing)
    assert found.code == 2 and "is a pipe or a device" in found.err and ".yaml" in found.err


def test_a_pipe_among_the_files_of_a_corpus(
    tmp_path: Path, tiny: list[str], muonscale: Muonscale
) -> None:
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.txt").write_text("text\n" * 9000)
    pipe(folder / "b.txt")
    found = muonscale("train", *tiny, f"data.path={folder}")
    assert found.code == 2 and "b.txt" in found.err and "data.path" in found.err


@pytest.mark.parametrize("depth", [900, 100_000])
@pytest.mark.parametrize("name", [name for name in NAMED if "json" in name or "yaml" in name])
def test_deeply_nested(name: str, depth: int, refused: Callable) -> None:
    content = '{"text": %s, "model_type": "llama"}' % ("[" * depth + "]" * depth)
    refused(name, lambda path: path.write_text(content))
