"""Tasks of lm-evaluation-harness (Gao et al., https://github.com/EleutherAI/lm-evaluation-harness).

The numbers are those of the harness for the same model, with the seeds of its own command line.
It is imported when a task is asked for: its index of tasks takes ten seconds.
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

from muonscale.errors import ConfigError, DataError, MuonscaleError
from muonscale.lab.evaluation.options import Options, Request
from muonscale.lab.models.contexts import quiet_transformers, seed_rng

INSTALL = 'tasks need lm-evaluation-harness; install it with: pip install "muonscale[eval]"'

LOGGERS = ("lm_eval", "huggingface_hub", "datasets")
"""Who warns while tasks are loaded and run."""

ALLOW_CODE = "HF_ALLOW_CODE_EVAL"
"""Environment variable without which the metrics of code refuse to run it."""


def check_installed() -> None:
    """Refuse to go on without the harness.

    Raises:
        ConfigError: with the command that installs it.
    """
    if find_spec("lm_eval") is None:
        raise ConfigError(INSTALL)


@dataclass(frozen=True)
class _Loaded:
    request: Request
    built: Any
    """What the manager's `load` returns."""


class Harness:
    """Tasks that are loaded, with their documents, and can be run.

    Args:
        requests: the tasks.
        options: how.

    Raises:
        ConfigError: if the harness is not installed, a name is unknown, a task has fixed shots and
            others are asked for, or runs code and may not.
        DataError: if a task cannot be loaded.
    """

    def __init__(self, requests: Sequence[Request], options: Options) -> None:
        check_installed()
        if options.include is not None and not options.include.is_dir():
            raise ConfigError(
                f"--include-path {options.include}: there is no such folder; give one with task files"
            )
        self.options = options
        with _noted(), _code_allowed(options):
            manager = _manager([request.task for request in requests], options.include)
            for request in requests:
                _check_code(request.task, manager, options)
            self._loaded = [_load(request, manager, options) for request in requests]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        precision: torch.dtype = torch.float32,
    ) -> Iterator[dict[str, Any]]:
        """Yield what is measured on every task, as eval/result.json has it.

        Args:
            model: a causal language model, on its device.
            tokenizer: its tokenizer; may get a padding token.
            precision: of the forward passes; float32 leaves the weights as they are.

        Raises:
            DataError: if a task fails.
        """
        training = model.training
        with _noted():
            lm = _language_model(model, tokenizer, precision, self.options)
            for loaded in self._loaded:
                _check_room(loaded, lm.max_length)
        try:
            for loaded in self._loaded:
                yield from self._run(loaded, lm)
        finally:
            model.train(training)

    def _run(self, loaded: _Loaded, lm: Any) -> Iterator[dict[str, Any]]:
        from lm_eval import evaluator

        task = loaded.request.task
        with _noted() as said, _code_allowed(self.options), _seeded(lm.device):
            try:
                found = evaluator.evaluate(
                    lm,
                    loaded.built,
                    limit=self.options.limit,
                    log_samples=False,
                    confirm_run_unsafe_code=self.options.run_code,
                )
            except (KeyboardInterrupt, MuonscaleError):
                raise
            except Exception as error:  # tasks bring code of their own, which raises what it likes
                raise DataError(
                    f"task {task} failed: {_first_line(error)}; leave it out, or see its files"
                ) from error
        cut = sum("runcat" in message for message in said)
        for name in [task] if task in found["results"] else list(loaded.built["tasks"]):
            yield {
                **_measured(name, found, loaded.request.shots),
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


def _check_code(name: str, manager: Any, options: Options) -> None:
    """Refuse what says that it runs code before it is loaded: some does so on loading."""
    config = manager.task_index[name].cfg or {}
    if config.get("unsafe_code"):
        _refuse_code(name, options)


def _refuse_code(name: str, options: Options) -> None:
    if not options.run_code:
        raise ConfigError(
            f"task {name} runs the code that the model writes, on this machine; allow it with "
            "--run-code, best in a container without a network, or leave the task out"
        )


def _load(request: Request, manager: Any, options: Options) -> _Loaded:
    try:
        built = manager.load([request.task])
    except Exception as error:  # datasets, the network, yaml, imports: no common base
        raise DataError(
            f"task {request.task} cannot be loaded: {_first_line(error)} (its data come from the "
            "Hugging Face Hub, unless they are in the local cache); leave it out where there is no network"
        ) from error
    for name, task in built["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            _refuse_code(name, options)
        _set_shots(name, task, request.shots)
    return _Loaded(request, built)


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    own = task.get_config("num_fewshot")
    if shots is not None and own == 0 and shots != 0:
        raise ConfigError(
            f"task {name} is made for 0 shots and takes no others, not {shots}; leave out --shots"
        )
    if shots is not None or own is None:
        task.set_config("num_fewshot", shots or 0)
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    task.set_fewshot_seed(DEFAULT_OTHER_SEED)


def _language_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    precision: torch.dtype,
    options: Options,
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


def _check_room(loaded: _Loaded, positions: int) -> None:
    from lm_eval.defaults import DEFAULT_MAX_GEN_TOKS

    for name, task in loaded.built["tasks"].items():
        if task.get_config("output_type") != "generate_until":
            continue
        options = task.get_config("generation_kwargs") or {}
        tokens = int(options.get("max_gen_toks", DEFAULT_MAX_GEN_TOKS))
        if tokens >= positions:
            raise ConfigError(
                f"task {name} has the model write up to {tokens} tokens, and it has {positions} "
                "positions for them and the question; a task file of your own may say fewer "
                "(generation_kwargs.max_gen_toks)"
            )


def _measured(name: str, found: Any, asked: int | None) -> dict[str, Any]:
    """Return the values of a task or group, and of the tasks in it.

    The harness says no shots of a group of groups: these are those that were asked for.
    """
    below = found.get("group_subtasks", {}).get(name, [])
    return {
        "task": name,
        "shots": found["n-shot"].get(name, asked),
        "version": found["versions"].get(name),
        "documents": _documents(name, found),
        "values": _values(found["results"][name]),
        **({"tasks": {each: _values(found["results"][each]) for each in below}} if below else {}),
    }


def _documents(name: str, found: Any) -> int:
    if name in found["n-samples"]:
        return found["n-samples"][name]["effective"]
    return sum(_documents(each, found) for each in found["group_subtasks"].get(name, []))


def _values(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return `metric,filter` to value and standard error (None where the harness has none)."""
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
def _noted() -> Generator[list[str]]:
    """Collect the warnings of the harness and of what it loads from, in place of showing them."""
    said: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    listener: logging.Handler = Listener(logging.WARNING)
    loggers = [logging.getLogger(name) for name in LOGGERS]
    former = [(logger.propagate, logger.handlers) for logger in loggers]
    for logger in loggers:
        logger.propagate, logger.handlers = False, [listener]
    try:
        with quiet_transformers():
            yield said
    finally:
        for logger, (propagate, handlers) in zip(loggers, former, strict=True):
            logger.propagate, logger.handlers = propagate, handlers


@contextmanager
def _code_allowed(options: Options) -> Generator[None]:
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
def _seeded(device: torch.device) -> Generator[None]:
    """Seed all that tasks may draw from as the harness does, and put it back after."""
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


def _first_line(error: Exception) -> str:
    text = (str(error) or type(error).__name__).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}".rstrip(": ")
