from __future__ import annotations

import os

# Two test processes share two cores, and results must not depend on how many threads there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import io
import shutil
import signal
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from muonscale.cli import main


@pytest.fixture(scope="session")
def corpus_text() -> str:
    """About 200 kB of real text."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    names = ["argparse.py", "ast.py", "heapq.py", "shutil.py"]
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)[:200_000]


@pytest.fixture(scope="session")
def corpus_file(corpus_text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text(corpus_text, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny_words(run: Path, corpus_file: Path, cache: Path) -> list[str]:
    """Return words after `muonscale train` that train a very small model for 12 steps."""
    return [
        "demo",
        f"run.path={run}",
        "run.threads=1",
        "model.preset=llama-pico",
        f"data.path={corpus_file}",
        f"data.cache={cache}",
        "data.vocab_size=300",
        "data.sequence_length=32",
        "train.steps=12",
        "train.batch_tokens=256",
        "eval.every=4",
        "eval.tokens=512",
        "eval.batch_tokens=512",
        "eval.sample_tokens=8",
        "checkpoint.every=5",
    ]


@pytest.fixture
def hangup() -> Iterator[None]:
    """Let SIGHUP stop a process, also where the tests run under nohup, which ignores it."""
    former = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, former)


@pytest.fixture
def tiny(corpus_file: Path, cache: Path, tmp_path: Path) -> list[str]:
    """Words after `muonscale train` that train a very small model for 12 steps into tmp_path/run."""
    return tiny_words(tmp_path / "run", corpus_file, cache)


@dataclass
class Answer:
    code: int
    out: str
    err: str


Muonscale = Callable[..., Answer]


@pytest.fixture
def muonscale(capsys: pytest.CaptureFixture[str]) -> Muonscale:
    """Run the command line in this process."""

    def run(*words: object) -> Answer:
        code = call(*words)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run


def call(*words: object) -> int:
    """Run the command line in this process, and return its exit code."""
    former = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["muonscale", *map(str, words)])
        try:
            return main()
        except SystemExit as stop:
            return int(stop.code or 0)
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def train_shared(*words: object) -> str:
    """Train a run that several tests read, in a fixture that lives longer than them.

    Returns:
        What was printed. Tests get copies of the folder: no test may change what others read.
    """
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = call("train", *words)
    assert code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope="session")
def trained_once(corpus_file: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the words of `tiny`, to be read and copied."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_shared(*tiny_words(folder, corpus_file, cache))
    return folder


@pytest.fixture
def finished(trained_once: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of the words of `tiny`, at tmp_path/run, that a test may change."""
    return Path(shutil.copytree(trained_once, tmp_path / "run"))
