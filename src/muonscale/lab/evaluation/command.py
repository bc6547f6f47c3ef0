"""`muonscale eval` for one model: texts, samples, tasks, and the record of the results."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from muonscale.errors import ConfigError
from muonscale.lab.data.prepare import OnProgress
from muonscale.lab.eval_results import Entry, KindT, Record
from muonscale.lab.evaluation.perplexity import measure_texts
from muonscale.lab.evaluation.suites import find_suite
from muonscale.lab.evaluation.target import load_on_device, open_target
from muonscale.lab.harness import Harness, HarnessOptions, HarnessTask
from muonscale.lab.models.generate import generate_text
from muonscale.lab.models.structure import count_parameters
from muonscale.lab.parallel.processes import check_alone

PACKAGES = ("muonscale", "torch", "transformers", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class SampleRequest:
    """Texts for the model to write."""

    count: int = 0
    """Number of samples for every prompt."""
    prompts: tuple[str, ...] = ()
    """Prompts; the run's `eval.prompt` by default."""
    tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0
    """Seed of the first sample; it increases by one for each of the others."""


@dataclass(frozen=True, kw_only=True)
class TaskRequest:
    """Benchmarks to run."""

    names: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness; with a suite, the tasks of the suite to run."""
    suite: str | None = None
    shots: int | None = None
    options: HarnessOptions = field(default_factory=HarnessOptions)

    @property
    def given(self) -> bool:
        """Whether any are requested."""
        return bool(self.names) or self.suite is not None

    def tasks(self) -> list[HarnessTask]:
        """Return the tasks for the harness.

        Raises:
            ConfigError: for an unknown suite or task of it, or shots with a suite.
        """
        names = tuple(dict.fromkeys(self.names))
        if self.suite is None:
            return [HarnessTask(name, self.shots) for name in names]
        if self.shots is not None:
            raise ConfigError(
                f"--shots {self.shots}: the suite {self.suite} has its own; leave out --shots, or "
                "--suite"
            )
        return [HarnessTask(row.task, row.shots) for row in find_suite(self.suite).select(names)]


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """The new results of an evaluation, and all results of the checkpoint."""

    folder: Path
    new: Entry
    """New results, by kind as in `measured`."""
    measured: Entry
    """All results of the checkpoint, as in eval/result.json."""


def evaluate_model(
    path: Path,
    step: int | None,
    overrides: Sequence[str],
    *,
    whole: bool,
    samples: SampleRequest,
    tasks: TaskRequest,
    out: Path | None,
    log: Callable[[str], None],
    report: OnProgress,
) -> EvalResult:
    """Evaluate a run or a Hugging Face folder, writing each result when it is measured.

    No text is evaluated if tasks are given and no text is selected.

    Args:
        path: folder of the run or the model.
        step: step of the run's checkpoint; the newest by default.
        overrides: `section.key=value`; see `muonscale.lab.evaluation.target`.
        whole: evaluate on all of a foreign text, not only its validation split.
        samples: texts to write.
        tasks: benchmarks to run.
        out: folder of result.json; `eval` in `path` by default.
        log: called with progress messages.
        report: as for `prepare`.

    Raises:
        MuonscaleError: for any input that cannot be used.
    """
    check_alone("an evaluation runs in one process")
    harness = Harness(tasks.tasks(), tasks.options) if tasks.given else None
    target, settings = open_target(path, step, overrides, log)
    config = settings.config
    with_text = settings.gives_text or (not tasks.given and target.is_run)
    _check_request(path, with_text, whole, samples, tasks)
    if config.run.threads is not None:
        torch.set_num_threads(config.run.threads)
    forward, processes = load_on_device(target, config)
    record = Record(
        folder=out or path / "eval",
        step=target.step,
        weights=target.weights,
        parameters=count_parameters(target.model).total,
    )
    record.check()
    new: Entry = {}

    def add(kind: KindT, measured: Entry) -> None:
        packages = [*PACKAGES, *(["lm_eval"] if kind == "tasks" and find_spec("lm_eval") else [])]
        versions = {package: version(package) for package in packages}
        entry = {**measured, "command": sys.argv, "versions": versions}
        record.add(kind, entry)
        new.setdefault(kind, []).append(entry)

    if with_text:
        add(
            "texts",
            measure_texts(target, forward, processes, settings, whole=whole, report=report),
        )
    for prompt in dict.fromkeys(samples.prompts or (config.eval.prompt,)):
        for number in range(samples.count):
            options = {
                "tokens": samples.tokens,
                "temperature": samples.temperature,
                "top_k": samples.top_k,
                "seed": samples.seed + number,
            }
            text = generate_text(target.model, target.tokenizer, prompt, **options)
            add("samples", {"prompt": prompt, **options, "text": text})
    if harness is not None:
        suite = None if tasks.suite is None else find_suite(tasks.suite)
        if suite is not None:
            add(
                "suites",
                {"suite": suite.name, "source": suite.source, "left_out": suite.left_out},
            )
            log(f"measured: {suite.name}")
        for measured in harness.run(target.model, target.tokenizer, forward.precision):
            if suite is not None:
                (row,) = suite.select((measured["task"],))
                measured |= {
                    "suite": suite.name,
                    "paper": {
                        "benchmark": row.name,
                        "metric": row.metric,
                        "value": row.paper,
                        "note": row.note,
                    },
                }
            add("tasks", measured)
            log(f"measured: {measured['task']}")
    return EvalResult(folder=record.folder, new=new, measured=record.read())


def _check_request(
    path: Path, with_text: bool, whole: bool, samples: SampleRequest, tasks: TaskRequest
) -> None:
    if not (with_text or samples.count or tasks.given):
        raise ConfigError(
            f"there is nothing to evaluate {path} on: give a text with data.path=PATH, "
            "data.source=NAME or data.mixture=[...], or --tasks, or --samples"
        )
    if whole and not with_text:
        raise ConfigError(f"--all is given for {path} without a text; give one with data.path=PATH")
    if samples.prompts and not samples.count:
        raise ConfigError(f"--prompt {samples.prompts[0]!r} needs --samples N")
