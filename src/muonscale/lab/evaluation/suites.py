"""Benchmarks of a paper as tasks of lm-evaluation-harness.

A suite lists the corresponding task of the harness for each benchmark, the number of examples in
the prompt, and the value in the paper. The papers used their own harnesses: prompts, parsing of
answers and splits differ, so their values are a reference and cannot be reproduced exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

from muonscale.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A benchmark of a paper and the corresponding task."""

    name: str
    """Name in the paper."""
    task: str
    """Task or group of the harness."""
    shots: int
    """Examples in the prompt."""
    metric: str
    """The closest value of the harness, as `metric,filter`."""
    paper: float
    """The paper's value, in percent."""
    note: str = ""
    """Differences from the paper, and facts that it does not state."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The benchmarks of a paper."""

    name: str
    source: str
    benchmarks: tuple[Benchmark, ...]
    left_out: dict[str, str]
    """Reasons for benchmarks of the paper that are left out."""

    def select(self, tasks: tuple[str, ...]) -> tuple[Benchmark, ...]:
        """Return the benchmarks of some tasks of the harness, or all if none is given.

        Raises:
            ConfigError: for a task that is not in the suite.
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
            note="shots of the harness; the paper reports pass@1",
        ),
        Benchmark(
            name="MBPP",
            task="mbpp",
            shots=3,
            metric="pass_at_1,none",
            paper=63.8,
            note="shots of the harness; the paper reports pass@1",
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
            note="shots of the harness; the paper does not state them",
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
