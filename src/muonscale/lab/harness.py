"""Tasks of lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).

The results equal those of the harness for the same model, with the seeds of its command line. The
harness is imported only when it is needed: building its index of tasks takes ten seconds.
"""

from __future__ import annotations

import difflib
import logging
import os
import random
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from muonscale.errors import ConfigError, DataError, MuonscaleError, first_line
from muonscale.lab.models.contexts import quiet_transformers, seed_rng

INSTALL = 'tasks need lm-evaluation-harness; install it with: pip install "muonscale[eval]"'

LOGGERS = ("lm_eval", "huggingface_hub", "datasets")
"""Loggers whose warnings are collected while tasks are loaded and run."""

ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
"""Environment variable that the metrics of code require."""


@dataclass(frozen=True)
class HarnessTask:
    """A task to run."""

    task: str
    """Task, group or tag of the harness."""
    shots: int | None = None
    """Examples in the prompt; those of the task by default."""


@dataclass(frozen=True, kw_only=True)
class HarnessOptions:
    """How tasks are run."""

    include: Path | None = None
    """Folder of the user's own task files."""
    limit: int | None = None
    """Maximum number of documents of a task; all by default."""
    batch_size: int = 8
    """Sequences in a batch of the model."""
    run_code: bool = False
    """Whether code that the model writes may be run."""


def check_installed() -> None:
    """Check that the harness is installed.

    Raises:
        ConfigError: with the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(INSTALL)


@dataclass(frozen=True)
class _LoadedTask:
    request: HarnessTask
    built: Any
    """Result of the manager's `load`."""


class Harness:
    """Loaded tasks with their documents.

    Args:
        requests: the tasks to load.
        options: how to run them.

    Raises:
        ConfigError: if the harness is not installed, a name is unknown, a task does not support the
            number of shots, or needs `run_code`.
        DataError: if a task cannot be loaded.
    """

    def __init__(self, requests: Sequence[HarnessTask], options: HarnessOptions) -> None:
        check_installed()
        if options.include is not None and not options.include.is_dir():
            raise ConfigError(f"tasks of the folder {options.include}: there is no such folder")
        self.options = options
        with _collect_warnings(), _allow_code(options):
            manager = _manager([request.task for request in requests], options.include)
            for request in requests:
                # Before it is loaded: some tasks run code on loading.
                if (manager.task_index[request.task].cfg or {}).get("unsafe_code"):
                    _require_run_code(request.task, options)
            self._loaded = [_load(request, manager, options) for request in requests]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        precision: torch.dtype = torch.float32,
    ) -> Iterator[dict[str, Any]]:
        """Yield the results of every task, in the format of eval/result.json.

        Args:
            model: a causal language model, on its device.
            tokenizer: its tokenizer; may get a padding token.
            precision: dtype of the forward passes; with float32 the weights keep their dtypes.

        Raises:
            DataError: if a task fails.
        """
        training = model.training
        with _collect_warnings():
            lm = _language_model(model, tokenizer, precision, self.options)
            for loaded in self._loaded:
                _check_positions(loaded, lm.max_length)
        try:
            for loaded in self._loaded:
                yield from self._run(loaded, lm)
        finally:
            model.train(training)

    def _run(self, loaded: _LoadedTask, lm: Any) -> Iterator[dict[str, Any]]:
        from lm_eval import evaluator

        task = loaded.request.task
        with _collect_warnings() as warnings, _allow_code(self.options), _seed_harness(lm.device):
            try:
                results = evaluator.evaluate(
                    lm,
                    loaded.built,
                    limit=self.options.limit,
                    log_samples=False,
                    confirm_run_unsafe_code=self.options.run_code,
                )
            except (KeyboardInterrupt, MuonscaleError):
                raise
            except Exception as error:  # the code of tasks raises errors of any class
                raise DataError(
                    f"task {task} failed: {type(error).__name__}: {first_line(error)}"
                ) from error
        cut = sum("runcat" in message for message in warnings)
        for name in [task] if task in results["results"] else list(loaded.built["tasks"]):
            yield {
                **_task_result(name, results, loaded.request.shots),
                "limit": self.options.limit,
                "batch_size": self.options.batch_size,
                "truncations": cut,
            }


def _manager(names: Sequence[str], include: Path | None) -> Any:
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._index import Kind

    if include is not None:
        own = TaskManager(include_path=str(include), include_defaults=False)
        entries = [own.task_index.get(name) for name in names]
        if all(entry is not None and entry.kind == Kind.TASK for entry in entries):
            return own
    manager = TaskManager(include_path=None if include is None else str(include))
    for name in names:
        if name not in manager.task_index:
            close = difflib.get_close_matches(name, manager.all_tasks, n=3, cutoff=0.6)
            hint = f"did you mean {' or '.join(close)}?" if close else "lm-eval ls tasks lists them"
            raise ConfigError(f"lm-evaluation-harness has no task {name!r}; {hint}")
    return manager


def _require_run_code(name: str, options: HarnessOptions) -> None:
    if not options.run_code:
        raise ConfigError(
            f"task {name} runs code that the model writes on this machine; allow it with "
            "--run-code, preferably in a container without a network"
        )


def _load(request: HarnessTask, manager: Any, options: HarnessOptions) -> _LoadedTask:
    try:
        built = manager.load([request.task])
    except Exception as error:  # datasets, the network, yaml, imports: no common base
        raise DataError(
            f"task {request.task} cannot be loaded: {type(error).__name__}: {first_line(error)} "
            "(its data are downloaded from the Hugging Face Hub unless they are in the local cache)"
        ) from error
    for name, task in built["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            _require_run_code(name, options)
        _set_shots(name, task, request.shots)
    return _LoadedTask(request, built)


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 and shots != 0:
        raise ConfigError(f"task {name} supports only 0 shots, not {shots}")
    if shots is not None or own is None:
        task.set_config("num_fewshot", shots or 0)
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    precision: torch.dtype,
    options: HarnessOptions,
) -> Any:
    from lm_eval.models.huggingface import HFLM

    mixed = None if precision == torch.float32 else precision
    return HFLM(
        pretrained=model,
        tokenizer=tokenizer,  # type: ignore[arg-type]
        backend="causal",
        batch_size=options.batch_size,
        mixed_precision_dtype=mixed,
    )


def _check_positions(loaded: _LoadedTask, positions: int) -> None:
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS

    for name, task in loaded.built["tasks"].items():
        if task.get_config("output_type") != "generate_until":
            continue
        options = task.get_config("generation_kwargs") or {}
        tokens = int(options.get("max_gen_toks", DEFAULT_MAX_GEN_TOKS))
        if tokens >= positions:
            raise ConfigError(
                f"task {name} generates up to {tokens} tokens, and the model has {positions} "
                "positions for them and the question; a task file of your own may set fewer "
                "(generation_kwargs.max_gen_toks)"
            )


def _task_result(name: str, results: Any, requested: int | None) -> dict[str, Any]:
    """Return the values of a task or group, and of the tasks in it.

    The harness reports no shots for a group of groups; the requested ones are used.
    """
    below = results.get("group_subtasks", {}).get(name, [])
    return {
        "task": name,
        "shots": results["n-shot"].get(name, requested),
        "version": results["versions"].get(name),
        "documents": _documents(name, results),
        "values": _values(results["results"][name]),
        **({"tasks": {each: _values(results["results"][each]) for each in below}} if below else {}),
    }


def _documents(name: str, results: Any) -> int:
    if name in results["n-samples"]:
        return results["n-samples"][name]["effective"]
    return sum(_documents(each, results) for each in results["group_subtasks"].get(name, []))


def _values(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return value and standard error (or None) by `metric,filter`."""
    values = {}
    for key, value in metrics.items():
        metric, comma, kept = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = metrics.get(f"{metric}_stderr,{kept}")
        known = isinstance(error, int | float)
        values[key] = {"value": float(value), "stderr": float(error) if known else None}
    return values


@contextmanager
def _collect_warnings() -> Generator[list[str]]:
    """Collect the warnings of the harness and its libraries instead of printing them."""
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())
    loggers = [logging.getLogger(name) for name in LOGGERS]
    former = [(logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [handler]
    try:
        with quiet_transformers():
            yield warnings
    finally:
        for logger, (propagate, handlers) in zip(loggers, former, strict=True):
            logger.propagate, logger.handlers = propagate, handlers


@contextmanager
def _allow_code(options: HarnessOptions) -> Generator[None]:
    former = os.environ.get(ALLOW_CODE)
    if options.run_code:
        os.environ[ALLOW_CODE] = "1"
    try:
        yield
    finally:
        if options.run_code and former is None:
            del os.environ[ALLOW_CODE]
        elif former is not None:
            os.environ[ALLOW_CODE] = former


@contextmanager
def _seed_harness(device: torch.device) -> Generator[None]:
    """Seed all random number generators as the harness does, and restore them after the block."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    python, array = random.getstate(), np.random.get_state()
    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    try:
        with seed_rng(DEFAULT_OTHER_SEED, device):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(array)
