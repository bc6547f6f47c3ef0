"""The gradient noise scale against the gradients of single sequences."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from muonscale.errors import ConfigError
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.files import drop_nonfinite
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import Topology
from muonscale.lab.training.micro_batches import micro_batch_size
from muonscale.lab.training.noise_scale import (
    DECAY,
    MicroBatchNorms,
    NoiseEstimate,
    NoiseScale,
    check_noise_scale,
    estimate_noise,
)
from muonscale.lab.training.state import TrainState
from muonscale.lab.training.step import accumulate, train_step
from tests.lab.models.logits import build
from tests.lab.training.test_attention import state_of

L = 9
"""As in the configuration of `state_of`."""


def exactly(gradients: list[tuple[int, ...]]) -> tuple[Fraction, Fraction]:
    """Return |G|^2 and tr(Sigma) of a population of gradients."""
    count = len(gradients)
    mean = [Fraction(sum(column), count) for column in zip(*gradients, strict=True)]
    squares = sum(Fraction(x) ** 2 for gradient in gradients for x in gradient)
    gradient_sq = sum((x**2 for x in mean), Fraction(0))
    return gradient_sq, squares / count - gradient_sq


def square_of_mean(gradients: Any) -> Fraction:
    columns = list(zip(*gradients, strict=True))
    return sum((Fraction(sum(c), len(gradients)) ** 2 for c in columns), Fraction(0))


@pytest.mark.parametrize("small", [1, 2])
def test_the_estimates_are_unbiased(small: int) -> None:
    """Their mean over all batches of four of a population of three is what they estimate."""
    population = [(5, -1, 2), (1, 3, 2), (0, 1, -7)]
    found = []
    for batch in itertools.product(population, repeat=4):
        parts = [square_of_mean(batch[i : i + small]) for i in range(0, 4, small)]
        small_sq: Any = sum(parts) / len(parts)
        big_sq: Any = square_of_mean(batch)
        found.append(estimate_noise(small_sq, big_sq, small=small, big=4))
    assert (
        tuple(Fraction(sum(c)) / len(found) for c in zip(*found, strict=True))  # type: ignore[arg-type]
        == exactly(population)
    )
    assert min(e.gradient_sq for e in found) < 0  # which is why they are averaged


def test_two_lengths_give_both_terms() -> None:
    assert estimate_noise(7 + 60 / 4, 7 + 60 / 12, small=4, big=12) == pytest.approx(
        NoiseEstimate(7, 60)
    )


def test_numerator_and_denominator_are_averaged_apart() -> None:
    noise = NoiseScale()
    found = [NoiseEstimate(4.0, 10.0), NoiseEstimate(-1.0, 30.0), NoiseEstimate(0.5, 20.0)]
    for each in found:
        noise.add(each)
    weights = [DECAY**2, DECAY, 1.0]
    means = [sum(w * e[i] for w, e in zip(weights, found, strict=True)) for i in (0, 1)]
    assert noise.scale == pytest.approx(means[1] / means[0])


@pytest.mark.parametrize("wrong", [(-1.0, 2.0), (1.0, -2.0), (0.0, 1.0)])
def test_there_is_no_scale_while_an_average_is_not_positive(wrong: tuple[float, float]) -> None:
    noise = NoiseScale()
    assert noise.scale is None
    noise.add(NoiseEstimate(*wrong))
    assert noise.scale is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_step_that_is_not_finite_is_recorded_as_null_and_left_out(bad: float) -> None:
    noise = NoiseScale()
    noise.measure(3.0, 2.0, small=1, big=2)
    before = noise.scale
    record = noise.measure(bad, 2.0, small=1, big=2)
    assert before is not None and noise.scale == before == record["scale"]
    told = json.loads(json.dumps(drop_nonfinite(record), allow_nan=False))
    assert told["gradient_sq"] is None and told["trace"] is None


def test_it_comes_back_from_json_as_it_was() -> None:
    noise = NoiseScale()
    noise.add(NoiseEstimate(0.1, 1 / 3))
    assert NoiseScale(**json.loads(json.dumps(asdict(noise)))) == noise


@pytest.mark.parametrize(
    ("sequences", "micro", "part"), [(8, 2, 2), (8, 8, 4), (2, 2, 1), (9, 9, 3), (7, 7, 1)]
)
def test_a_part_is_a_micro_batch_or_half_of_the_only_one(
    sequences: int, micro: int, part: int
) -> None:
    config = config_of(
        "data.sequence_length=16",
        "eval.batch_tokens=16",
        f"train.batch_tokens={16 * sequences}",
        f"train.micro_batch_tokens={16 * micro}",
    )
    assert micro_batch_size(config, sequences) == micro
    assert micro_batch_size(config, sequences, at_least_two=True) == part


def ids(rows: int, seed: int = 1) -> Tensor:
    return torch.randint(0, 50, (rows, L + 1), generator=torch.Generator().manual_seed(seed))


def model() -> Any:
    return build("llama", dtype=torch.float32)


def plain_gradient(net: Any, rows: Tensor) -> Tensor:
    """Return the gradient of the mean loss of rows, all parameters in one vector, float64."""
    net.zero_grad()
    logits = net(rows[:, :-1]).logits
    cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).backward()
    return torch.cat([p.grad.flatten().double() for p in net.parameters()])


def measured(net: Any, rows: Tensor, micro: int) -> NoiseEstimate:
    """Return what one step measures of rows, in sequences."""
    state, _ = state_of(net)
    state.optimizer.zero_grad()
    lengths = MicroBatchNorms(state.optimizer, Processes())
    accumulate(state.forward, state.routing, rows, micro, norms=lengths)
    whole = torch.cat([p.grad.flatten().double() for p in net.parameters()])
    small = len(rows) // lengths.count
    assert small == micro
    return estimate_noise(
        lengths.mean_square(), float(whole.square().sum()), small=small, big=len(rows)
    )


def mean_of(found: list[NoiseEstimate]) -> NoiseEstimate:
    return NoiseEstimate(*(sum(c) / len(found) for c in zip(*found, strict=True)))


def test_over_all_batches_it_is_what_the_gradients_of_single_sequences_say() -> None:
    """Of a population of three sequences, in batches of two that are drawn with replacement."""
    net, population = model(), ids(3)
    single = torch.stack([plain_gradient(net, row[None]) for row in population])
    gradient = single.mean(0)
    trace = (single - gradient).square().sum() / 3
    pairs = itertools.product(range(3), repeat=2)
    found = mean_of([measured(net, population[list(pair)], 1) for pair in pairs])
    assert found.gradient_sq == pytest.approx(float(gradient.square().sum()), rel=1e-5)
    assert found.trace == pytest.approx(float(trace), rel=1e-5)


def test_over_all_halves_of_a_batch_it_is_the_variance_within_the_batch() -> None:
    net, rows = model(), ids(4)
    single = torch.stack([plain_gradient(net, row[None]) for row in rows])
    trace = float(single.var(0, correction=1).sum())
    gradient_sq = float(single.mean(0).square().sum()) - trace / 4
    halves = [[0, 1, 2, 3], [0, 2, 1, 3], [0, 3, 1, 2]]
    found = mean_of([measured(net, rows[order], 2) for order in halves])
    assert found == pytest.approx((gradient_sq, trace), rel=1e-4)
    # Parts of one sequence have seen all splits at once.
    assert measured(net, rows, 1) == pytest.approx((gradient_sq, trace), rel=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "deepseek_v3"])
def test_the_gradient_of_micro_batches_is_the_same_to_the_bit(kind: str) -> None:
    gradients = []
    for measures in (False, True):
        net = build(kind, dtype=torch.float32)
        state, _ = state_of(net)
        lengths = MicroBatchNorms(state.optimizer, Processes()) if measures else None
        accumulate(state.forward, state.routing, ids(6), 2, norms=lengths)
        gradients.append({name: p.grad for name, p in net.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def step_of(*words: str, rows: int = 6) -> tuple[TrainState, Config, dict[str, Any]]:
    state, config = state_of(model(), f"train.batch_tokens={rows * L}", *words)
    return state, config, train_step(state, ids(rows).numpy(), config, Processes())


def test_a_record_is_in_tokens_and_of_gradients_before_clipping() -> None:
    words = ["telemetry.noise_scale_every=1", f"train.micro_batch_tokens={2 * L}"]
    _, _, record = step_of(*words, "optimizer.max_grad_norm=1e-3", "optimizer.clip=all")
    expected = measured(model(), ids(6), 2)
    found = record["noise_scale"]
    assert (found["tokens_small"], found["tokens_big"]) == (2 * L, 6 * L)
    rounding = 1e-5 * expected.trace / 6  # of float32 lengths, of which this is a small difference
    assert found["gradient_sq"] == pytest.approx(expected.gradient_sq, abs=rounding)
    assert found["trace"] == pytest.approx(L * expected.trace, rel=1e-4)
    assert found["scale"] == pytest.approx(found["trace"] / found["gradient_sq"])


def test_only_due_steps_are_measured_and_only_they_are_split() -> None:
    state, config, first = step_of("telemetry.noise_scale_every=3")
    records = [first, *(train_step(state, ids(6).numpy(), config, Processes()) for _ in range(5))]
    assert [r["step"] for r in records if "noise_scale" in r] == [3, 6]
    assert records[2]["noise_scale"]["tokens_small"] == 3 * L
    other, plain, first = step_of()
    assert first["loss"] == records[0]["loss"]
    losses = [train_step(other, ids(6).numpy(), plain, Processes())["loss"] for _ in range(5)]
    assert [r["loss"] for r in records[1:]] == pytest.approx(losses, rel=1e-4)
    assert records[1]["loss"] == losses[0]


def test_tokens_are_those_of_the_step_where_batches_change() -> None:
    words = [f"train.batch_tokens={4 * L}", "train.steps=null", f"train.tokens={16 * L}"]
    later = f"train.batch_schedule=[{{after: {8 * L}, batch_tokens: {8 * L}}}]"
    state, config = state_of(model(), *words, later, "telemetry.noise_scale_every=1")
    batches = [ids(rows).numpy() for rows in (4, 4, 8)]
    found = [train_step(state, b, config, Processes())["noise_scale"] for b in batches]
    assert [n["tokens_big"] for n in found] == [4 * L, 4 * L, 8 * L]
    assert [n["tokens_small"] for n in found] == [2 * L, 2 * L, 4 * L]


def test_a_resumed_run_measures_as_an_uninterrupted_one(tmp_path: Path) -> None:
    words = ["telemetry.noise_scale_every=2", f"train.micro_batch_tokens={L}"]

    def steps(state: TrainState, config: Config, seeds: range) -> list[Any]:
        rows = [ids(6, seed).numpy() for seed in seeds]
        return [train_step(state, r, config, Processes()).get("noise_scale") for r in rows]

    whole, config = state_of(model(), *words)
    expected = steps(whole, config, range(8))
    first, _ = state_of(model(), *words)
    found = steps(first, config, range(5))
    first.save(tmp_path, Processes(), keep=1)
    second, _ = state_of(model(), *words)
    second.restore(tmp_path / "step-00000005", Processes())
    found += steps(second, config, range(5, 8))
    assert found == expected
    assert expected[-1]["scale"] != expected[-1]["trace"] / expected[-1]["gradient_sq"]


def config_of(*words: str) -> Config:
    return load_config("demo", ["telemetry.noise_scale_every=5", *words])


def test_batches_without_equal_parts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"noise_scale_every=5 with data\.format=chat"):
        check_noise_scale(
            config_of("data.format=chat", "data.path=x.jsonl", "data.tokenizer=x"), Topology()
        )
    single = ["data.sequence_length=64", "eval.batch_tokens=64"]
    with pytest.raises(ConfigError, match=r"train\.batch_tokens=64 is a single sequence of 64"):
        check_noise_scale(config_of(*single, "train.batch_tokens=64"), Topology())
    with pytest.raises(ConfigError, match="each of 4 data-parallel ranks"):
        check_noise_scale(
            config_of(*single, "train.batch_tokens=256"), Topology(data="ddp", replicas=4)
        )
    check_noise_scale(
        config_of(*single, "train.batch_tokens=512"), Topology(data="ddp", replicas=4)
    )
    check_noise_scale(load_config("demo", [*single, "train.batch_tokens=64"]), Topology())


def test_a_smaller_batch_later_in_the_run_is_refused_too() -> None:
    words = ["data.sequence_length=64", "train.batch_tokens=512", "eval.batch_tokens=64"]
    later = "train.batch_schedule=[{after: 0.5, batch_tokens: 64}]"
    with pytest.raises(ConfigError, match=r"train\.batch_tokens=64 is a single sequence"):
        check_noise_scale(
            config_of(*words, later, "train.steps=null", "train.tokens=5120"), Topology()
        )
