"""Benchmark tasks during training (`eval.tasks`), as metrics records."""

from __future__ import annotations

import copy

from muonscale.errors import DataError
from muonscale.lab.harness import Harness, HarnessOptions, HarnessTask
from muonscale.lab.models.adapter import merge_adapter
from muonscale.lab.parallel.gather import gather_model
from muonscale.lab.training.setup import Run


class RunTasks:
    """The tasks of a run, loaded on the first rank, which also measures them."""

    def __init__(self, run: Run) -> None:
        """Load the tasks: a collective.

        Raises:
            ConfigError: as `Harness`.
            DataError: as `Harness`.
        """
        self._harness: Harness | None = None
        section = run.config.eval

        def load() -> None:
            options = HarnessOptions(include=section.tasks_path, limit=section.tasks_limit)
            self._harness = Harness([HarnessTask(name) for name in section.tasks], options)

        if section.tasks:
            run.processes.on_first(load)

    def measure_if_due(self, run: Run, *, last: bool) -> None:
        """Record the results with the model as it is, if they are due: a collective.

        A task that fails is a warning: it must not stop a run.
        """
        section, step = run.config.eval, run.state.step
        due = last or (section.tasks_every is not None and step % section.tasks_every == 0)
        if not section.tasks or not due:
            return
        model = gather_model(run.state.model, run.processes)

        def measure() -> None:
            assert model is not None and self._harness is not None
            plain = merge_adapter(model).to(run.device)  # pyrefly: ignore
            tokenizer = copy.deepcopy(run.tokenizer)  # it may get a padding token
            precision = run.state.forward.precision
            values: dict[str, dict[str, float]] = {}
            try:
                for found in self._harness.run(plain, tokenizer, precision):
                    values[found["task"]] = {
                        name.removesuffix(",none"): each["value"]
                        for name, each in found["values"].items()
                    }
            except DataError as error:
                run.console.warn(str(error))
            tokens = run.config.timeline.tokens_before(step)
            run.record({"kind": "tasks", "step": step, "tokens": tokens, "tasks": values})
            figures = (
                f"{task} {metric} {value:.3g}"
                for task, each in values.items()
                for metric, value in each.items()
            )
            run.console.log(f"step {step}/{run.config.steps}  {', '.join(figures)}")

        run.processes.on_first(measure)
