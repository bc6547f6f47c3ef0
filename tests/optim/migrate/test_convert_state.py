"""State of other optimizers: loaded from what stand-ins with their momentum and keys have saved."""

from __future__ import annotations

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon, parameter_groups
from muonscale.errors import CheckpointError, ConfigError
from muonscale.optim.migrate.convert_state import SOURCES, convert_state_dict, join_state_dicts
from muonscale.optim.newton_schulz.orthogonalize import orthogonalize
from tests.optim.compare import SetGradients, close

SHAPES = {"up": (12, 5), "down": (5, 12), "bias": (7,)}


def model(seed: int = 0) -> dict[str, nn.Parameter]:
    torch.manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in SHAPES.items()}


def gradients(parameters: dict[str, nn.Parameter], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def ours(parameters: dict[str, nn.Parameter], **options: Any) -> Muon:
    matrices = {"params": [(n, p) for n, p in parameters.items() if p.ndim == 2]}
    rest = {"params": [(n, p) for n, p in parameters.items() if p.ndim != 2], "rule": "adamw"}
    return Muon([matrices, rest], lr=0.1, weight_decay=0.3, **options)


class Foreign(torch.optim.Optimizer):
    """Muon and AdamW as other projects store them, with `M <- mu*M + G` or an average."""

    def __init__(
        self, parameters: dict[str, nn.Parameter], *, summed: bool, per_state: bool
    ) -> None:
        self.summed, self.per_state = summed, per_state
        common = {"lr": 0.1, "wd" if per_state else "weight_decay": 0.3}
        muon = {**common, "momentum": 0.9, "nesterov": True, "ns_steps": 5}
        if per_state:  # one group, the rule in the state of every parameter
            groups = [
                {"params": list(parameters.values()), **muon, "adamw_betas": (0.9, 0.95), "adamw_eps": 1e-8}
            ]  # fmt: skip
        else:
            on = [p for p in parameters.values() if p.ndim == 2]
            off = [p for p in parameters.values() if p.ndim != 2]
            groups = [
                {"params": on, **muon, "use_muon": True},
                {"params": off, **common, "betas": (0.9, 0.95), "eps": 1e-8, "use_muon": False},
            ]
        super().__init__(groups, {})
        if per_state:
            for parameter in parameters.values():
                self.state[parameter]["use_muon"] = parameter.ndim == 2

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                on = self.state[parameter].get("use_muon", group.get("use_muon"))
                wd = group["wd" if self.per_state else "weight_decay"]
                update = (self._muon if on else self._adamw)(parameter, self.state[parameter])
                parameter.mul_(1 - 0.1 * wd).sub_(0.1 * update)

    def _muon(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        M = state.setdefault("momentum_buffer", torch.zeros_like(parameter))
        G = parameter.grad
        M.mul_(0.9).add_(G, alpha=1.0 if self.summed else 0.1)
        N = G + 0.9 * M if self.summed else 0.1 * G + 0.9 * M
        out, in_ = parameter.shape
        factor = 0.2 * math.sqrt(max(out, in_)) if self.per_state else math.sqrt(max(1, out / in_))
        return factor * orthogonalize(N)

    def _adamw(self, parameter: Tensor, state: dict[str, Any]) -> Tensor:
        keys = ("moment1", "moment2") if self.per_state else ("exp_avg", "exp_avg_sq")
        M, V = (state.setdefault(key, torch.zeros_like(parameter)) for key in keys)
        state["step"] = t = state.get("step", 0) + 1
        M.lerp_(parameter.grad, 0.1)
        V.lerp_(parameter.grad.square(), 0.05)
        return (M / (1 - 0.9**t)) / ((V / (1 - 0.95**t)).sqrt() + 1e-8)


@pytest.mark.parametrize(
    ("source", "summed", "per_state"),
    [("moonlight", True, True), ("keller", False, False), ("keller_2024", True, False)],
)
def test_a_converted_run_goes_on_as_the_foreign_one(source, summed, per_state) -> None:
    theirs = model()
    foreign = Foreign(theirs, summed=summed, per_state=per_state)
    for seed in range(3):
        gradients(theirs, seed)
        foreign.step()
    file = io.BytesIO()
    torch.save(foreign.state_dict(), file)
    file.seek(0)
    mine = copy.deepcopy(theirs)
    optimizer = ours(mine)
    optimizer.load_state_dict(convert_state_dict(torch.load(file), mine.items(), source))
    assert optimizer.param_groups[0]["momentum"] == 0.9
    assert optimizer.param_groups[0]["scale"] == SOURCES[source].scale
    for seed in range(3, 6):
        gradients(theirs, seed)
        gradients(mine, seed)
        foreign.step()
        optimizer.step()
    for name in SHAPES:
        close(mine[name].detach(), theirs[name].detach())


def test_a_sum_taken_for_an_average_turns_the_next_step() -> None:
    theirs = model()
    foreign = Foreign(theirs, summed=True, per_state=True)
    for seed in range(3):
        gradients(theirs, seed)
        foreign.step()
    results = []
    for source in ("moonlight", "keller"):
        mine = copy.deepcopy(theirs)
        optimizer = ours(mine)
        optimizer.load_state_dict(convert_state_dict(foreign.state_dict(), mine.items(), source))
        before = mine["up"].detach().clone()
        gradients(mine, 3)
        optimizer.step()
        results.append((mine["up"].detach() - before).flatten())
    assert torch.cosine_similarity(*results, dim=0) < 0.95


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
def test_torchs_two_optimizers_become_one(adjust: str | None, monkeypatch) -> None:
    monkeypatch.setattr(
        torch.optim._muon,
        "_zeropower_via_newtonschulz",
        lambda grad, coefficients, steps, eps: orthogonalize(grad, coefficients, steps),
    )
    theirs = model()
    on = {name: p for name, p in theirs.items() if p.ndim == 2}
    off = {name: p for name, p in theirs.items() if p.ndim != 2}
    muon = torch.optim.Muon(
        on.values(), lr=0.1, weight_decay=0.3, momentum=0.9, adjust_lr_fn=adjust
    )
    adamw = torch.optim.AdamW(off.values(), lr=0.05, weight_decay=0.2, betas=(0.8, 0.9), eps=1e-2)
    for seed in range(3):
        gradients(theirs, seed)
        muon.step()
        adamw.step()
    mine = copy.deepcopy(theirs)
    optimizer = ours(mine)
    parts = [
        convert_state_dict(muon.state_dict(), on.items(), "torch"),
        convert_state_dict(adamw.state_dict(), off.items(), "torch"),
    ]
    optimizer.load_state_dict(join_state_dicts(parts))
    for seed in range(3, 6):
        gradients(theirs, seed)
        gradients(mine, seed)
        muon.step()
        adamw.step()
        optimizer.step()
    for name in SHAPES:
        close(mine[name].detach(), theirs[name].detach())
    with pytest.raises(CheckpointError, match=r"\bup\b"):
        join_state_dicts([parts[0], parts[0]])


def test_torchs_muon_with_names_loads_without_conversion(toy, set_gradients: SetGradients) -> None:
    named = [(n, p) for n, p in toy.named_parameters() if n in ("up.weight", "down.weight")]
    theirs = torch.optim.Muon(named, lr=0.1)
    set_gradients(toy, 0)
    theirs.step()
    mine = Muon(named)
    with pytest.warns(UserWarning, match="adjust_lr_fn"):  # it has no meaning here
        mine.load_state_dict(theirs.state_dict())
    for _, parameter in named:
        expected = theirs.state[parameter]["momentum_buffer"]
        assert torch.equal(mine.state[parameter]["momentum_buffer"], expected)


def test_normuon_brings_its_rows() -> None:
    parameters = {name: p for name, p in model().items() if p.ndim == 2}
    group = {"params": [0, 1], "lr": 0.02, "weight_decay": 0.1, "momentum": 0.95, "beta2": 0.9}
    rows = torch.rand(12, 1)
    state = {0: {"momentum_buffer": torch.randn(12, 5), "second_momentum_buffer": rows}}
    foreign = {"state": state, "param_groups": [group]}  # the second has not been stepped yet
    optimizer = Muon(list(parameters.items()), post_norm="normuon")
    optimizer.load_state_dict(convert_state_dict(foreign, parameters.items(), "normuon"))
    up, down = (optimizer.state[parameter] for parameter in parameters.values())
    assert torch.equal(up["row_second_moment"], rows)
    assert not down["momentum_buffer"].any()
    assert optimizer.param_groups[0]["normuon_beta2"] == 0.9


def test_ambiguous_state_is_refused(toy: nn.Module) -> None:
    named = list(model().items())
    state = {"state": {}, "param_groups": [{"params": [0, 1, 2], "lr": 0.1}]}
    with pytest.raises(CheckpointError, match=r"^up\b.*'lr'"):
        convert_state_dict(state, named, "torch")
    with pytest.raises(CheckpointError, match=r"3 .*2 "):
        convert_state_dict(state, named[:2], "torch")
    with pytest.raises(ConfigError, match="moonlight"):
        convert_state_dict(state, named, "moonlite")


def test_a_whole_model_is_taken_over_by_names(toy, set_gradients: SetGradients) -> None:
    named = dict(toy.named_parameters())
    state = {
        k: {"momentum_buffer": torch.randn_like(p), "use_muon": True}
        if n in ("up.weight", "down.weight", "first.weight", "second.weight")
        else {"moment1": torch.randn_like(p), "moment2": torch.rand_like(p), "step": 3, "use_muon": False}
        for k, (n, p) in enumerate(named.items())
    }  # fmt: skip
    group = {"params": list(state), "lr": 0.1, "wd": 0.1, "momentum": 0.95}
    optimizer = Muon(parameter_groups(toy, lr=0.7))
    with pytest.warns(UserWarning, match=r"group.*\blr\b"):
        optimizer.load_state_dict(
            convert_state_dict(
                {"state": state, "param_groups": [group]}, named.items(), "moonlight"
            )
        )
    momentum = optimizer.state[named["up.weight"]]["momentum_buffer"]
    number = list(named).index("up.weight")
    close(momentum, 0.05 * state[number]["momentum_buffer"], 1e-6)
    assert float(optimizer.state[named["out.weight"]]["step"]) == 3
