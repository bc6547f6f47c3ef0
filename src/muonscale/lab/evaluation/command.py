"""All that `muonscale eval` does with one model: texts, samples, tasks, and what is written of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from muonscale.errors import ConfigError
from muonscale.lab.data.prepare import Report
from muonscale.lab.eval_results import Entry, KindT, Record
from muonscale.lab.evaluation.config import Settings, folder_settings, run_settings
from muonscale.lab.evaluation.harness import Harness
from muonscale.lab.evaluation.options import Options, Request, requests_of
from muonscale.lab.evaluation.perplexity import measure_texts
from muonscale.lab.evaluation.suites import Suite, find_suite
from muonscale.lab.evaluation.target import Subject, folder_subject, ready, run_subject
from muonscale.lab.models.generate import generate_text
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.parallel.processes import started_by_torchrun
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.targets import is_hugging_face

PACKAGES = ("muonscale", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Texts to be written by the model."""

    count: int = 0
    """Of every prompt."""
    prompts: tuple[str, ...] = ()
    """What they begin with; the run's `eval.prompt` when none is given."""
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0
    """Of the first; each of the others has the next one."""


@dataclass(frozen=True, kw_only=True)
class Tasks:
    """Benchmarks to be run."""

    names: tuple[str, ...] = ()
    """Of lm-evaluation-harness; with a suite, which of it."""
    suite: str | None = None
    shots: int | None = None
    options: Options = field(default_factory=Options)

    @property
    def given(self) -> bool:
        """Whether there are any."""
        return bool(self.names) or self.suite is not None

    def requests(self) -> list[Request]:
        """Return what the harness is to run.

        Raises:
            ConfigError: for an unknown suite or task of it, or shots beside a suite.
        """
        if self.suite is None:
            return [Request(name, self.shots) for name in dict.fromkeys(self.names)]
        if self.shots is not None:
            raise ConfigError(
                f"--shots {self.shots}: the suite {self.suite} has its own; leave out --shots, or --suite"
            )
        return requests_of(find_suite(self.suite), tuple(dict.fromkeys(self.names)))


@dataclass(frozen=True, kw_only=True)
class Found:
    """What an evaluation has measured and what was known before."""

    folder: Path
    new: Entry
    """By kind, as in `measured`."""
    measured: Entry
    """All of the checkpoint, as in eval/result.json."""


def evaluate_model(
    path: Path,
    step: int | None,
    overrides: Sequence[str],
    *,
    whole: bool,
    samples: Samples,
    tasks: Tasks,
    out: Path | None,
    say: Callable[[str], None],
    report: Report,
) -> Found:
    """Evaluate a run or a Hugging Face folder, writing each result as it is there.

    The text is left out where tasks are given and no text is named.

    Args:
        path: of the run or the folder.
        step: of the run's checkpoint; the newest when None.
        overrides: `section.key=value`, see `settings`.
        whole: evaluate on all of a foreign text, not on its held-out split.
        samples: texts to be written.
        tasks: benchmarks to be run.
        out: folder of result.json; `eval` in `path` when None.
        say: told what is going on.
        report: as of `prepare`.

    Raises:
        MuonscaleError: for anything the user gave that cannot be used.
    """
    if started_by_torchrun():
        raise ConfigError(f"an evaluation of {path} runs in one process; start it without torchrun")
    harness = Harness(tasks.requests(), tasks.options) if tasks.given else None
    subject, settings = _open(path, step, overrides, say)
    with_text = settings.gives_text or (not tasks.given and subject.is_run)
    _check_asked(path, with_text, whole, samples, tasks)
    if settings.config.run.threads is not None:
        torch.set_num_threads(settings.config.run.threads)
    forward, processes = ready(subject, settings.config)
    record = _record(subject, out or path / "eval")
    new: Entry = {}

    def add(kind: KindT, measured: Entry) -> None:
        entry = {**measured, "command": sys.argv, "versions": _versions(kind)}
        record.add(kind, entry)
        new.setdefault(kind, []).append(entry)

    if with_text:
        add(
            "texts",
            measure_texts(subject, forward, processes, settings, whole=whole, report=report),
        )
    for sample in _written(subject, settings, samples):
        add("samples", sample)
    if harness is not None:
        for kind, measured in _benchmarks(harness, tasks, subject, forward.precision):
            add(kind, measured)
            say(f"measured: {measured.get('task', measured.get('suite'))}")
    return Found(folder=record.folder, new=new, measured=record.read())


def _record(subject: Subject, folder: Path) -> Record:
    record = Record(
        folder=folder,
        step=subject.step,
        weights=subject.weights,
        parameters=count_parameters(subject.model).total,
    )
    record.check()
    return record


def _open(
    path: Path, step: int | None, overrides: Sequence[str], say: Callable[[str], None]
) -> tuple[Subject, Settings]:
    run = RunFolder(path)
    if is_hugging_face(path):
        if step is not None:
            raise ConfigError(f"{path} is a model folder, which has no steps; leave out @{step}")
        subject = folder_subject(path)
        return subject, folder_settings(path, subject.positions, overrides)
    if not run.exists:
        raise ConfigError(
            f"{path} is neither a run folder nor a Hugging Face model folder: "
            f"{'it has no config.json' if path.exists() else 'it does not exist'}; give one of the two"
        )
    settings = run_settings(run, overrides)
    return run_subject(run, step, say), settings


def _check_asked(path: Path, with_text: bool, whole: bool, samples: Samples, tasks: Tasks) -> None:
    if not (with_text or samples.count or tasks.given):
        raise ConfigError(
            f"there is nothing to evaluate {path} on: give a text with data.path=PATH, "
            "data.source=NAME or data.mixture=[...], or --tasks, or --samples"
        )
    if whole and not with_text:
        raise ConfigError(f"--all is given for {path}, and no text: name one with data.path=PATH")
    if samples.prompts and not samples.count:
        raise ConfigError(
            f"--prompt {samples.prompts[0]!r} is given, and no text is asked for; give --samples N too"
        )


def _written(subject: Subject, settings: Settings, samples: Samples) -> list[Entry]:
    found = []
    for prompt in dict.fromkeys(samples.prompts or (settings.config.eval.prompt,)):
        for number in range(samples.count):
            options = {
                "tokens": samples.tokens,
                "temperature": samples.temperature,
                "top_k": samples.top_k,
                "seed": samples.seed + number,
            }
            text = generate_text(subject.model, subject.tokenizer, prompt, **options)
            found.append({"prompt": prompt, **options, "text": text})
    return found


def _benchmarks(
    harness: Harness, tasks: Tasks, subject: Subject, precision: torch.dtype
) -> Iterator[tuple[KindT, Entry]]:
    """Yield what a suite is, if there is one, and what is measured on every task."""
    suite = None if tasks.suite is None else find_suite(tasks.suite)
    if suite is not None:
        yield "suites", {"suite": suite.name, "source": suite.source, "left_out": suite.left_out}
    for measured in harness.run(subject.model, subject.tokenizer, precision):
        yield "tasks", measured | _of_paper(suite, measured["task"])


def _of_paper(suite: Suite | None, task: str) -> Entry:
    """Return what the suite's paper says of a task."""
    if suite is None:
        return {}
    (row,) = suite.chosen((task,))
    paper = {"benchmark": row.name, "metric": row.metric, "value": row.paper, "note": row.note}
    return {"suite": suite.name, "paper": paper}


def _versions(kind: KindT) -> dict[str, str]:
    packages = [*PACKAGES, *(["lm_eval"] if kind == "tasks" and find_spec("lm_eval") else [])]
    return {package: version(package) for package in packages}
