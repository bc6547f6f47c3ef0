"""Parameters in 16 bits: float32 copies, stochastic rounding, and what is lost without."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon, parameter_groups
from muonscale.errors import ConfigError
from muonscale.optim.rules import reference
from muonscale.optim.rules.master_weights import _random_16_bits, rounding_key, stochastic_bfloat16
from tests.optim.compare import SetGradients, close, equal, snapshot, states


def first(number: int) -> Tensor:
    return torch.arange(number, dtype=torch.int32)


ROUNDED = pytest.mark.filterwarnings("ignore:.*16 bits")


def test_decay_reaches_a_bf16_parameter() -> None:
    W = nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16))
    W.grad = torch.zeros_like(W)
    with pytest.warns(UserWarning, match="16 bits"):
        optimizer = Muon([W], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(W.detach(), torch.full_like(W, 0.75))
    assert optimizer.state[W]["momentum_buffer"].dtype == torch.float32


def make(toy: nn.Module, master: str, lr: float = 1e-4, seed: int = 0, **options) -> Muon:
    groups = parameter_groups(toy, lr=lr, weight_decay=0.1)
    return Muon(groups, master=master, rounding_seed=seed, **options)


@ROUNDED
@pytest.mark.parametrize("rule", ["muon", "adamw"])
def test_decay_alone_is_lost_in_bf16_unless_there_is_a_remedy(rule: str) -> None:
    """200 steps of 1 - 5e-4 each take a tenth of a weight; rounded to nearest, they take nothing."""
    left = {}
    for master in ("none", "float32", "stochastic"):
        W = nn.Parameter(torch.ones(32, 32, dtype=torch.bfloat16))
        group = {"params": [W], "rule": rule}
        optimizer = Muon([group], lr=5e-3, weight_decay=0.1, master=master)
        W.grad = torch.zeros_like(W)
        for _ in range(200):
            optimizer.step()
        left[master] = float(W.detach().float().mean())
    assert left["none"] == 1.0
    assert left["float32"] == pytest.approx(math.exp(-0.1), abs=2**-8)
    assert left["stochastic"] == pytest.approx(math.exp(-0.1), abs=3e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_with_float32_copies_a_run_is_the_float32_run(toy, set_gradients, dtype) -> None:
    narrow = copy.deepcopy(toy).to(dtype)
    wide = copy.deepcopy(narrow).float()
    kept, plain = make(narrow, "float32"), make(wide, "none")
    for seed in range(4):
        set_gradients(narrow, seed)
        set_gradients(wide, seed)
        for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
            theirs.grad.copy_(ours.grad)
        kept.step()
        plain.step()
    for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
        assert torch.equal(kept.state[ours]["master"], theirs)
        assert torch.equal(ours, theirs.to(dtype))


def test_what_is_written_to_a_parameter_from_outside_counts(toy, set_gradients) -> None:
    """A model checkpoint loaded after the optimizer was made must not be undone by old copies."""
    model = copy.deepcopy(toy).bfloat16()
    optimizer = make(model, "float32", lr=0.0)
    set_gradients(model, 0)
    optimizer.step()
    W, other = model.get_parameter("up.weight"), model.get_parameter("down.weight")
    kept = optimizer.state[other]["master"].clone()
    with torch.no_grad():
        W[0].fill_(3.0)
    optimizer.step()
    assert torch.equal(W[0].detach(), torch.full_like(W[0], 3.0))
    assert torch.equal(optimizer.state[W]["master"][0], torch.full((8,), 3.0))
    assert torch.equal(optimizer.state[other]["master"], kept)


@pytest.mark.parametrize("master", ["float32", "stochastic"])
def test_a_resumed_run_rounds_as_an_uninterrupted_one(toy, set_gradients, master) -> None:
    model = copy.deepcopy(toy).bfloat16()
    optimizer = make(model, master, lr=1e-2, seed=7)
    for seed in range(3):
        set_gradients(model, seed)
        optimizer.step()
    twin = copy.deepcopy(model)
    resumed = make(twin, master, lr=1e-2, seed=8)  # the seed is saved
    resumed.load_state_dict(optimizer.state_dict())
    for seed in range(3, 6):
        for each, net in ((optimizer, model), (resumed, twin)):
            set_gradients(net, seed)
            each.step()
    assert equal(snapshot(model), snapshot(twin))
    assert equal(states(optimizer), states(resumed))


def test_seeds_and_steps_and_names_round_differently(toy, set_gradients) -> None:
    runs = []
    for seed in (0, 0, 1):
        model = copy.deepcopy(toy).bfloat16()
        set_gradients(model, 0)
        make(model, "stochastic", seed=seed).step()
        runs.append(snapshot(model))
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])
    keys = {rounding_key(s, n, t) for s in (0, 1) for n in ("a", "b") for t in range(100)}
    assert len(keys) == 400
    assert all(0 <= key < 2**31 for key in keys)


@ROUNDED
def test_a_step_left_out_advances_no_rounding(toy: nn.Module, set_gradients: SetGradients) -> None:
    model = copy.deepcopy(toy).bfloat16()
    optimizer = make(model, "stochastic", nonfinite="skip")
    set_gradients(model, 0)
    model.get_parameter("norm.bias").grad[0] = float("nan")
    optimizer.step()
    assert {float(state["rounding_step"]) for state in optimizer.state.values()} == {0.0}


def test_only_16_bit_parameters_have_more_state(toy: nn.Module) -> None:
    toy.up.bfloat16()
    optimizer = make(toy, "float32")
    with_copy = {name for name, state in states(optimizer).items() if "master" in state}
    assert with_copy == {"up.weight"}


def test_stochastic_rounding_of_float16_is_refused() -> None:
    with pytest.raises(ConfigError, match="float16"):
        Muon([nn.Parameter(torch.ones(2, 2, dtype=torch.float16))], master="stochastic")


def test_stochastic_rounding_equals_the_slow_one_bit_for_bit() -> None:
    torch.manual_seed(0)
    X = torch.cat([torch.randn(400) * 10.0 ** torch.randint(-38, 38, (400,)), torch.zeros(2)])
    X = torch.cat([X, torch.tensor([1.0, -1.5, 2.0**-133, 2.0**127, math.inf, -math.inf])])
    for key in (0, 1, 2**31 - 1):
        random = _random_16_bits(first(X.numel()), key).tolist()
        slow = [
            reference.stochastic_bfloat16(x, r) for x, r in zip(X.tolist(), random, strict=True)
        ]
        assert stochastic_bfloat16(X, key).tolist() == slow
    assert stochastic_bfloat16(torch.tensor([math.nan]), 3).isnan().all()


@pytest.mark.parametrize("part", [0.0, 0.1, 0.5, 0.9])
def test_stochastic_rounding_has_no_bias(part: float) -> None:
    X = torch.full((200_000,), 1.0 + part / 128)
    rounded = stochastic_bfloat16(X, rounding_key(0, "w", 5)).float()
    assert set(rounded.tolist()) <= {1.0, 1.0 + 1 / 128}
    share = float((rounded > 1).double().mean())
    assert share == pytest.approx(part, abs=4 * math.sqrt(0.25 / 200_000))


def test_the_random_bits_are_a_known_hash_of_key_and_position() -> None:
    """Frozen: another hash would change every resumed run."""

    def slow(position: int, key: int) -> int:
        x = (position * 2654435761 + key) % 2**32
        x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
        x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
        return x >> 16

    for key in (0, 12345, 2**31 - 1):
        found = _random_16_bits(first(2000), key).tolist()
        assert found == [slow(position, key) for position in range(2000)]


def test_the_random_bits_are_spread_and_unrelated_to_their_neighbors() -> None:
    number = 1 << 18
    for key in (0, 1, rounding_key(3, "w", 9)):
        bits = _random_16_bits(first(number), key)
        assert int(bits.min()) >= 0
        assert int(bits.max()) <= 0xFFFF
        counts = torch.bincount(bits >> 8, minlength=256).double()
        chi = float(((counts - number / 256) ** 2 / (number / 256)).sum())
        assert 160 < chi < 370  # 255 degrees of freedom: 5 standard deviations either way
        x = (bits.double() - 32767.5) / 18918.6
        for lag in (1, 2, 64, 128, 4096):
            assert abs(float((x[lag:] * x[:-lag]).mean())) < 5 / math.sqrt(number)
    one, other = (_random_16_bits(first(number), key).double() for key in (10, 11))
    assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 5 / math.sqrt(number)


def test_decay_rounds_once_and_not_twice() -> None:
    """Decay and update are added up in float32 before the only rounding."""
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(32, 32).bfloat16())
    twin = nn.Parameter(W.detach().float())
    W.grad = torch.randn(32, 32).bfloat16()
    twin.grad = W.grad.float()
    Muon([W], lr=0.05, weight_decay=0.5, master="float32").step()
    Muon([twin], lr=0.05, weight_decay=0.5).step()
    assert torch.equal(W.detach(), twin.detach().bfloat16())
    close(W.detach(), twin.detach(), 2**-8)
