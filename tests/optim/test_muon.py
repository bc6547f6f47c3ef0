from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from muonscale import Muon, parameter_groups
from muonscale.errors import ConfigError, LayoutError, MuonscaleError, RoutingError
from muonscale.optim import finite, muon_rule, work
from muonscale.optim.coefficients import resolve_triples
from muonscale.optim.matrices import Matrices
from muonscale.optim.muon_rule import momentum_step_
from muonscale.optim.orthogonalize import orthogonalize
from muonscale.optim.reference import adamw_step, muon_step

Build = Callable[[str], nn.Module]
SetGradients = Callable[[nn.Module, int], None]
JORDAN = list(resolve_triples("jordan", 5))


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def states(optimizer: Muon) -> dict[str, dict[str, Tensor]]:
    named = ((n, p) for g in optimizer.param_groups for n, p in work.named(g))
    return {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in named}


def close(X: Tensor, Y: Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(X.double(), Y.double(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_equal_the_slow_rules(toy: nn.Module, set_gradients: SetGradients, nesterov) -> None:
    lr, decay = 0.05, 0.4
    groups = parameter_groups(toy, lr=lr, weight_decay=decay)
    on_muon = {n for g in groups if g["rule"] == "muon" for n in g["param_names"]}
    optimizer = Muon(groups, nesterov=nesterov)
    W = {name: w.double() for name, w in snapshot(toy).items()}
    M = {name: torch.zeros_like(w) for name, w in W.items()}
    V = {name: torch.zeros_like(w) for name, w in W.items()}
    for step in range(1, 4):
        set_gradients(toy, step)
        optimizer.step()
        for name, parameter in toy.named_parameters():
            G = parameter.grad
            common: dict[str, Any] = {"lr": lr, "weight_decay": decay}
            if name in on_muon:
                W[name], M[name] = muon_step(
                    W[name], G, M[name], **common, momentum=0.95, nesterov=nesterov, triples=JORDAN,
                    factor=0.2 * math.sqrt(max(G.shape)),
                )  # fmt: skip
            else:
                W[name], M[name], V[name] = adamw_step(
                    W[name], G, M[name], V[name], step, **common, betas=(0.9, 0.95), eps=1e-8
                )
    for name, parameter in toy.named_parameters():
        close(parameter.detach(), W[name])
    assert on_muon == {"first.weight", "second.weight", "up.weight", "down.weight"}


@pytest.mark.parametrize("shape", [(16, 48), (48, 16), (24, 24)])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(("theirs", "ours"), [("match_rms_adamw", "rms"), ("original", "keller")])
def test_it_equals_torch_optim_muon_in_float32(
    shape, nesterov: bool, theirs: str, ours: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_float32(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        return orthogonalize(grad.double(), coefficients, steps).float()

    monkeypatch.setattr(torch.optim._muon, "_zeropower_via_newtonschulz", in_float32)
    torch.manual_seed(0)
    mine = nn.Parameter(torch.randn(shape))
    other = nn.Parameter(mine.detach().clone())
    options: dict[str, Any] = {
        "lr": 0.02,
        "weight_decay": 0.5,
        "momentum": 0.9,
        "nesterov": nesterov,
    }
    reference = torch.optim.Muon([other], **options, adjust_lr_fn=theirs)
    optimizer = Muon([mine], **options, scale=ours)
    for _ in range(4):
        mine.grad = torch.randn(shape)
        other.grad = mine.grad.clone()
        optimizer.step()
        reference.step()
    close(mine.detach(), other.detach())
    close(optimizer.state[mine]["momentum_buffer"], reference.state[other]["momentum_buffer"], 1e-6)


def test_adamw_groups_equal_torch_optim_adamw(toy: nn.Module, set_gradients: SetGradients) -> None:
    twin = copy.deepcopy(toy)
    optimizer = Muon(parameter_groups(toy, lr=1e-2, weight_decay=0.2, rule="adamw"))
    reference = torch.optim.AdamW(twin.parameters(), lr=1e-2, weight_decay=0.2, betas=(0.9, 0.95))
    for seed in range(4):
        set_gradients(toy, seed)
        set_gradients(twin, seed)
        optimizer.step()
        reference.step()
    for mine, other in zip(toy.parameters(), twin.parameters(), strict=True):
        close(mine.detach(), other.detach(), 1e-6)
    assert optimizer.stats()["matrices"] == 0


@pytest.mark.parametrize("kind", ["gpt2", "gpt_oss", "mixtral", "deepseek_v3"])
def test_fused_and_stacked_matrices_step_as_if_stored_apart(
    kind: str, build_lm: Build, set_gradients: SetGradients
) -> None:
    model = build_lm(kind)
    groups = parameter_groups(model, lr=0.1, weight_decay=0.3)
    layouts = {n: m for g in groups for n, m in g["matrices"].items()}
    before = snapshot(model)
    optimizer = Muon(groups, nesterov=False, momentum=0.5)
    set_gradients(model, 0)
    optimizer.step()
    for name, parameter in model.named_parameters():
        if name not in layouts:
            continue
        for at in written_out(parameter.shape, layouts[name]):
            W, G, after = (at(t) for t in (before[name], parameter.grad, parameter.detach()))
            factor = 0.2 * math.sqrt(max(W.shape))
            expected, _ = muon_step(
                W, G, torch.zeros_like(W), lr=0.1, weight_decay=0.3, momentum=0.5, nesterov=False,
                triples=JORDAN, factor=factor,
            )  # fmt: skip
            close(after, expected, 5e-5)


def written_out(shape: torch.Size, layout: Matrices) -> list[Callable[[Tensor], Tensor]]:
    """Return functions that cut each logical matrix out of the stored tensor, one index at a time."""
    cuts = []
    for e in range(shape[0]) if len(shape) == 3 else [None]:
        rows = shape[-1] if layout.transposed else shape[-2]
        count = max(1, len(layout.splits))
        for k in range(count):
            if layout.interleaved:
                kept = list(range(k, rows, count))
            else:
                kept = list(range(k * rows // count, (k + 1) * rows // count))

            def cut(t: Tensor, e: int | None = e, kept: list[int] = kept) -> Tensor:
                one = t if e is None else t[e]
                return (one.T if layout.transposed else one)[kept]

            cuts.append(cut)
    return cuts


def test_every_matrix_is_orthogonalised_once(build_lm: Build, monkeypatch, set_gradients) -> None:
    counted: list[int] = []

    def counting(X: Tensor, *rest: Any) -> Tensor:
        counted.append(X.shape[0])
        return orthogonalize(X, *rest)

    monkeypatch.setattr(muon_rule, "orthogonalize", counting)
    model = build_lm("deepseek_v3")
    optimizer = Muon(parameter_groups(model, lr=1e-3))
    set_gradients(model, 0)
    optimizer.step()
    assert sum(counted) == optimizer.stats()["matrices"] == 2 * 4 + 3 + 4 * 3 + 3 + 1


def test_matrices_of_one_shape_share_a_batch_across_groups(toy, monkeypatch, set_gradients) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(
        muon_rule, "orthogonalize", lambda X, *r: (sizes.append(len(X)), orthogonalize(X, *r))[1]
    )
    overrides = {"second.weight": {"lr": 1.0, "weight_decay": 0.0}}
    optimizer = Muon(parameter_groups(toy, lr=1e-3, overrides=overrides))
    set_gradients(toy, 0)
    optimizer.step()
    assert sorted(sizes) == [1, 1, 2]


def test_the_cap_on_a_batch_changes_no_number(toy, monkeypatch, set_gradients) -> None:
    twin = copy.deepcopy(toy)
    set_gradients(toy, 0)
    set_gradients(twin, 0)
    Muon(parameter_groups(toy, lr=0.1)).step()
    monkeypatch.setattr(work, "WORKSPACE_BYTES", 1)
    Muon(parameter_groups(twin, lr=0.1)).step()
    for mine, other in zip(toy.parameters(), twin.parameters(), strict=True):
        close(mine.detach(), other.detach(), 1e-6)


def test_decay_is_lr_times_wd_without_the_shape_factor() -> None:
    W = nn.Parameter(torch.ones(64, 4))
    W.grad = torch.zeros(64, 4)
    bias = nn.Parameter(torch.ones(3))
    bias.grad = torch.zeros(3)
    groups = [{"params": [W]}, {"params": [bias], "rule": "adamw"}]
    Muon(groups, lr=0.5, weight_decay=0.4).step()
    close(W.detach(), torch.full((64, 4), 0.8), 1e-6)
    close(bias.detach(), torch.full((3,), 0.8), 1e-6)


def test_decay_reaches_a_bf16_parameter() -> None:
    W = nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16))
    W.grad = torch.zeros_like(W)
    with pytest.warns(UserWarning, match="16 bits"):
        optimizer = Muon([W], lr=0.5, weight_decay=0.5)
    optimizer.step()
    assert torch.equal(W.detach(), torch.full_like(W, 0.75))
    assert optimizer.state[W]["momentum_buffer"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.filterwarnings("ignore:.*16 bits")
def test_a_step_leaves_gradients_alone_and_momentum_is_an_average(dtype, nesterov: bool) -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(16, 24).to(dtype))
    optimizer = Muon([W], nesterov=nesterov, momentum=0.9)
    total = torch.zeros(16, 24)
    for step in range(1, 4):
        W.grad = (torch.randn(16, 24) * 100).to(dtype)
        kept = W.grad.clone()
        total = 0.9 * total + kept.float()
        optimizer.step()
        assert torch.equal(W.grad, kept)
        # a buffer that had been normalised in place would have length 1
        close(optimizer.state[W]["momentum_buffer"], 0.1 * total, 1e-4)
        assert optimizer.state[W]["momentum_buffer"].data_ptr() != W.grad.data_ptr(), step


def test_average_and_sum_have_the_same_direction() -> None:
    torch.manual_seed(0)
    M, total = torch.zeros(8, 12, dtype=torch.float64), torch.zeros(8, 12, dtype=torch.float64)
    for _ in range(5):
        G = torch.randn(8, 12, dtype=torch.float64)
        (N,) = momentum_step_([M], [G], momentum=0.95, nesterov=True)
        total = 0.95 * total + G
        close(orthogonalize(N), orthogonalize(G + 0.95 * total), 1e-10)
        close(M, 0.05 * total, 1e-12)


def test_none_is_skipped_and_zero_is_a_gradient() -> None:
    torch.manual_seed(0)
    left, right = (nn.Parameter(torch.randn(4, 4)) for _ in range(2))
    optimizer = Muon([left, right], lr=0.1, weight_decay=0.5)
    left.grad, right.grad = torch.randn(4, 4), torch.randn(4, 4)
    optimizer.step()
    before = {p: p.detach().clone() for p in (left, right)}
    momenta = {p: optimizer.state[p]["momentum_buffer"].clone() for p in (left, right)}
    left.grad, right.grad = None, torch.zeros(4, 4)
    optimizer.step()
    assert torch.equal(left.detach(), before[left])
    assert torch.equal(optimizer.state[left]["momentum_buffer"], momenta[left])
    assert not torch.equal(right.detach(), before[right])
    close(optimizer.state[right]["momentum_buffer"], 0.95 * momenta[right], 1e-6)


@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1), (2, 40), (0, 4)])
def test_degenerate_shapes_step(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    W = nn.Parameter(torch.randn(shape))
    W.grad = torch.randn(shape)
    optimizer = Muon([W], lr=0.1)
    optimizer.step()
    assert W.isfinite().all()
    assert optimizer.stats()["update_rms"].isfinite()


def test_gradients_of_any_strides_give_the_same_step() -> None:
    torch.manual_seed(0)
    G = torch.randn(6, 10)
    results = []
    for gradient in (G, G.T.contiguous().T, torch.randn(6, 20)[:, ::2].copy_(G)):
        W = nn.Parameter(torch.ones(6, 10))
        W.grad = gradient
        Muon([W], lr=0.1).step()
        results.append(W.detach())
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_gradient_length_does_not_change_the_step() -> None:
    torch.manual_seed(0)
    G = torch.randn(6, 10)
    results = []
    for length in (1.0, 1e-25, 1e25):
        W = nn.Parameter(torch.zeros(6, 10))
        W.grad = G * length
        Muon([W], lr=1.0).step()
        results.append(W.detach())
    close(results[1], results[0])
    close(results[2], results[0])


def test_update_rms_is_what_was_applied(toy: nn.Module, set_gradients: SetGradients) -> None:
    groups = parameter_groups(toy, lr=0.1, weight_decay=0.0)
    moved = [n for g in groups if g["rule"] == "muon" for n in g["param_names"]]
    before = snapshot(toy)
    optimizer = Muon(groups)
    set_gradients(toy, 0)
    optimizer.step()
    after = snapshot(toy)
    steps = torch.cat([(after[n] - before[n]).flatten() / 0.1 for n in moved])
    rms = optimizer.stats()["update_rms"]
    assert rms.ndim == 0
    assert float(rms) == pytest.approx(float(steps.square().mean().sqrt()), rel=1e-3)
    assert 0.14 < float(rms) < 0.22


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("victim", ["norm.bias", "up.weight"])
def test_a_nonfinite_gradient_leaves_everything_as_it_was(
    toy: nn.Module, set_gradients: SetGradients, value: float, victim: str
) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1))
    set_gradients(toy, 0)
    optimizer.step()
    before, state = snapshot(toy), states(optimizer)
    set_gradients(toy, 1)
    toy.get_parameter(victim).grad.view(-1)[3] = value
    optimizer.step()
    for name, parameter in toy.named_parameters():
        assert torch.equal(parameter.detach(), before[name])
    for name, kept in states(optimizer).items():
        assert all(torch.equal(kept[key], state[name][key]) for key in kept)
    assert optimizer.stats()["matrices"] == 0
    with pytest.raises(MuonscaleError, match=victim):
        optimizer.step()
    set_gradients(toy, 2)
    optimizer.step()  # training can go on
    optimizer.check_finite()
    assert not torch.equal(toy.get_parameter("up.weight").detach(), before["up.weight"])


def test_skip_counts_and_goes_on(toy: nn.Module, set_gradients: SetGradients) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1), nonfinite="skip")
    for seed in range(4):
        set_gradients(toy, seed)
        if seed % 2:
            toy.get_parameter("norm.bias").grad[0] = float("nan")
        optimizer.step()
    optimizer.check_finite()
    assert optimizer.stats()["skipped_steps"] == 2
    assert all(p.isfinite().all() for p in toy.parameters())
    assert float(optimizer.state[toy.get_parameter("norm.bias")]["step"]) == 2


def test_the_masked_path_equals_the_direct_one(toy, set_gradients, monkeypatch) -> None:
    """What a GPU runs: the host learns of a bad step only when the next one begins."""
    twin = copy.deepcopy(toy)
    direct = Muon(parameter_groups(toy, lr=0.1), nonfinite="skip")
    masked = Muon(parameter_groups(twin, lr=0.1), nonfinite="skip")
    check = finite.check_gradients

    def late(names: Any, gradients: Any) -> finite.FiniteCheck:
        found = check(names, gradients)
        found.mask = found.finite.all()
        return found

    for seed in range(5):
        for model, optimizer in ((toy, direct), (twin, masked)):
            set_gradients(model, seed)
            if seed in (0, 3):
                model.get_parameter("down.weight").grad[1, 2] = float("inf")
            with monkeypatch.context() as patch:
                if optimizer is masked:
                    patch.setattr("muonscale.optim.muon.check_gradients", late)
                optimizer.step()
    masked.check_finite()
    assert direct.stats()["skipped_steps"] == masked.stats()["skipped_steps"] == 2
    for mine, other in zip(toy.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)
    left, right = states(direct), states(masked)
    assert all(torch.equal(left[n][k], right[n][k]) for n in left for k in left[n])


def test_groups_keep_their_options_and_ratios_under_a_scheduler(toy: nn.Module) -> None:
    overrides = {"head": {"lr": 5e-4}, "norm": {"weight_decay": 0.0}}
    optimizer = Muon(parameter_groups(toy, lr=1e-3, overrides=overrides), lr=9.0, weight_decay=9.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    for parameter in toy.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    found = {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}
    assert found == {
        "hidden": (5e-4, 0.1),
        "embedding": (5e-4, 0.1),
        "head": (2.5e-4, 0.1),
        "norm": (5e-4, 0.0),
    }


def test_zero_is_not_taken_for_unset(toy: nn.Module, set_gradients: SetGradients) -> None:
    overrides = {"hidden": {"lr": 0.0, "weight_decay": 0.0}}
    optimizer = Muon(parameter_groups(toy, lr=1e-2, overrides=overrides))
    before = snapshot(toy)
    set_gradients(toy, 0)
    optimizer.step()
    assert torch.equal(toy.get_parameter("up.weight").detach(), before["up.weight"])
    assert not torch.equal(toy.get_parameter("out.weight").detach(), before["out.weight"])


def test_a_closure_is_run_with_gradients_and_its_loss_returned(toy: nn.Module) -> None:
    optimizer = Muon(parameter_groups(toy, lr=1e-2))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = toy(torch.arange(5)).logsumexp(-1).mean()
        loss.backward()
        return loss

    first = optimizer.step(closure).detach()
    assert optimizer.step(closure).detach() < first


def test_state_exists_from_construction(toy: nn.Module) -> None:
    optimizer = Muon(parameter_groups(toy, lr=1e-2))
    found = {name: set(state) for name, state in states(optimizer).items()}
    assert found["up.weight"] == {"momentum_buffer"}
    assert found["out.weight"] == {"step", "exp_avg", "exp_avg_sq"}
    assert len(found) == len(list(toy.parameters()))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_steps_like_the_original(toy, set_gradients: SetGradients, clone) -> None:
    optimizer = Muon(parameter_groups(toy, lr=0.1), nonfinite="skip")
    set_gradients(toy, 0)
    optimizer.step()
    model, copied = clone((list(toy.parameters()), optimizer))
    set_gradients(toy, 1)
    for mine, other in zip(toy.parameters(), model, strict=True):
        other.grad = mine.grad.clone()
    optimizer.step()
    copied.step()
    assert all(torch.equal(a, b) for a, b in zip(toy.parameters(), model, strict=True))
    assert copied.stats()["matrices"] == 4


def test_named_and_unnamed_tensors_are_taken(toy: nn.Module) -> None:
    matrices = [toy.get_parameter("up.weight"), toy.get_parameter("down.weight")]
    assert Muon(matrices).param_groups[0]["param_names"] == ["parameter0", "parameter1"]
    named = Muon([("a", matrices[0]), ("b", matrices[1])])
    assert named.param_groups[0]["param_names"] == ["a", "b"]
    mixed = Muon([{"params": [matrices[0]]}, {"params": [matrices[1]], "rule": "adamw"}])
    assert [g["param_names"] for g in mixed.param_groups] == [["parameter0"], ["parameter1"]]


def test_groups_of_the_caller_are_not_written_to(toy: nn.Module) -> None:
    groups = parameter_groups(toy, lr=1e-3)
    keys = [set(group) for group in groups]
    optimizer = Muon(groups)
    optimizer.param_groups[0]["lr"] = 7.0
    assert [set(group) for group in groups] == keys
    assert groups[0]["lr"] == 1e-3


@pytest.mark.parametrize("shape", [(3,), (), (2, 3, 4)])
def test_what_is_not_one_matrix_is_refused_with_a_way_out(shape: tuple[int, ...]) -> None:
    with pytest.raises(RoutingError, match="parameter_groups"):
        Muon([nn.Parameter(torch.zeros(shape))])


def test_a_stack_is_taken_where_the_group_says_so() -> None:
    torch.manual_seed(0)
    stack = nn.Parameter(torch.randn(3, 4, 6))
    apart = [nn.Parameter(w.clone()) for w in stack.detach()]
    stack.grad = torch.randn(3, 4, 6)
    for parameter, g in zip(apart, stack.grad, strict=True):
        parameter.grad = g.clone()
    group = {"params": [stack], "param_names": ["experts"], "matrices": {"experts": Matrices()}}
    Muon([group], lr=0.1).step()
    Muon(apart, lr=0.1).step()
    close(stack.detach(), torch.stack(apart).detach(), 1e-6)


def test_a_parameter_given_twice_is_refused(toy: nn.Module) -> None:
    W = toy.get_parameter("up.weight")
    with pytest.raises(RoutingError, match="given twice"):
        Muon([{"params": [W]}, {"params": [W], "rule": "adamw"}])
    with pytest.raises(RoutingError, match="given twice"):
        Muon([W, W])
    with pytest.raises(RoutingError, match="two parameters are called a"):
        Muon([("a", W), ("a", toy.get_parameter("down.weight"))])


def test_sparse_and_complex_are_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = Muon([{"params": [embedding.weight], "rule": "adamw", "param_names": ["e"]}])
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RoutingError, match="e has a sparse gradient"):
        optimizer.step()
    with pytest.raises(RoutingError, match="complex64"):
        Muon([nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))])


def test_a_sharded_parameter_is_refused() -> None:
    W = nn.Parameter(torch.zeros(2, 2))
    W.placements = ()
    with pytest.raises(LayoutError, match="sharded"):
        Muon([W])


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"momentum": 1.0},
        {"betas": (0.9, 1.0)},
        {"rms": -0.1},
        {"eps": float("nan")},
        {"scale": "rsm"},
        {"ns_coefficients": "jordon"},
        {"ns_steps": 0},
        {"ns_dtype": "float8"},
        {"nonfinite": "ignore"},
    ],
)
def test_options_outside_their_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Muon([nn.Parameter(torch.zeros(2, 2))], **options)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_training_lowers_the_loss(kind: str, build_lm: Build) -> None:
    model = build_lm(kind)
    optimizer = Muon(parameter_groups(model, lr=1e-2))
    ids = torch.arange(48).view(2, 24)
    losses = []
    for _ in range(16):
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]
