from __future__ import annotations

import os

# Two test processes share two cores, and results must not depend on how many threads there are.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal
import sys
import sysconfig
from collections.abc import Callable
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


@pytest.fixture
def tiny(corpus_file: Path, cache: Path, tmp_path: Path) -> list[str]:
    """Words after `muonscale train` that train a very small model for 12 steps into tmp_path/run."""
    return [
        "demo",
        f"run.path={tmp_path / 'run'}",
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


@dataclass
class Answer:
    code: int
    out: str
    err: str


Muonscale = Callable[..., Answer]


@pytest.fixture
def muonscale(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Muonscale:
    """Run the command line in this process."""

    def run(*words: object) -> Answer:
        monkeypatch.setattr(sys, "argv", ["muonscale", *map(str, words)])
        former = signal.getsignal(signal.SIGTERM)
        try:
            code = main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        finally:
            signal.signal(signal.SIGTERM, former)
        captured = capsys.readouterr()
        return Answer(code, captured.out, captured.err)

    return run
