"""Sets of benchmarks that a paper reports, as tasks of lm-evaluation-harness.

A suite says which task of the harness stands for each benchmark, with how many examples in the
prompt, and what the paper has measured. The papers used harnesses of their own: prompts, the way
answers are read, and splits differ, so that their numbers are a reference and nothing to reproduce.
"""

from __future__ import annotations

from dataclasses import dataclass

from muonscale.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A row of a suite."""

    name: str
    """What the paper calls it."""
    task: str
    """Task or group of the harness."""
    shots: int
    """Examples in the prompt."""
    metric: str
    """Which of the harness's values is the nearest to the paper's, as `metric,filter`."""
    paper: float
    """The paper's value, in percent."""
    runs_code: bool = False
    """Whether it runs what the model writes."""
    note: str = ""
    """What is different from the paper, or not said in it."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """Benchmarks of a paper."""

    name: str
    source: str
    benchmarks: tuple[Benchmark, ...]
    left_out: dict[str, str]
    """Benchmarks of the paper that are not run, and why."""

    def chosen(self, tasks: tuple[str, ...]) -> tuple[Benchmark, ...]:
        """Return the benchmarks of tasks of the harness, or all of them where none is named.

        Raises:
            ConfigError: for a task that the suite does not have.
        """
        known = {benchmark.task: benchmark for benchmark in self.benchmarks}
        for task in tasks:
            if task not in known:
                raise ConfigError(
                    f"the suite {self.name} has no task {task!r}; {nearest(task, known)}"
                )
        return tuple(known[task] for task in tasks or known)


MOONLIGHT = Suite(
    name="moonlight",
    source="arXiv 2502.16982, table 5, Moonlight (16B-A3B, 5.7T tokens)",
    benchmarks=(
        Benchmark(name="MMLU", task="mmlu", shots=5, metric="acc,none", paper=70.0),
        Benchmark(
            name="MMLU-pro",
            task="mmlu_pro",
            shots=5,
            metric="exact_match,custom-extract",
            paper=42.4,
        ),
        Benchmark(
            name="BBH",
            task="bbh",
            shots=3,
            metric="exact_match,get-answer",
            paper=65.2,
            note="examples with reasoning",
        ),
        Benchmark(
            name="TriviaQA",
            task="triviaqa",
            shots=5,
            metric="exact_match,remove_whitespace",
            paper=66.3,
            note="validation split of the questions without documents",
        ),
        Benchmark(
            name="HumanEval",
            task="humaneval",
            shots=0,
            metric="pass@1,create_test",
            paper=48.1,
            runs_code=True,
            note="shots as the harness has them; the paper says pass@1",
        ),
        Benchmark(
            name="MBPP",
            task="mbpp",
            shots=3,
            metric="pass_at_1,none",
            paper=63.8,
            runs_code=True,
            note="shots as the harness has them; the paper says pass@1",
        ),
        Benchmark(
            name="GSM8K", task="gsm8k", shots=4, metric="exact_match,strict-match", paper=77.4
        ),
        Benchmark(
            name="MATH",
            task="minerva_math",
            shots=4,
            metric="math_verify,none",
            paper=45.3,
            note="shots as the harness has them; the paper does not say",
        ),
        Benchmark(
            name="C-Eval",
            task="ceval-valid",
            shots=5,
            metric="acc,none",
            paper=77.2,
            note="validation split: the answers of the test split are not published",
        ),
        Benchmark(name="CMMLU", task="cmmlu", shots=5, metric="acc,none", paper=78.2),
    ),
    left_out={"CMath": "lm-evaluation-harness has no such task (paper: 81.1 %)"},
)

SUITES = {suite.name: suite for suite in (MOONLIGHT,)}


def find_suite(name: str) -> Suite:
    """Return a suite by its name.

    Raises:
        ConfigError: if there is none.
    """
    if name not in SUITES:
        raise ConfigError(f"there is no suite {name!r}; {nearest(name, SUITES)}")
    return SUITES[name]
