"""Mistakes in the use of the optimizer library, by what is called."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import muonscale as ms
from muonscale.errors import CheckpointError, ConfigError, DivergedError, GroupingError, LayoutError
from muonscale.optim.diagnostics.qk_clip import clip_factors, grouped_factors
from muonscale.optim.matrices.spec import matrix_shapes
from muonscale.optim.migrate.convert_lr import conversion_table
from muonscale.optim.migrate.convert_state import join_state_dicts
from muonscale.optim.newton_schulz.coefficients import Coefficients
from muonscale.optim.newton_schulz.flops import ns_flops
from muonscale.optim.newton_schulz.polar_express import polar_express
from muonscale.optim.option_schedule import OptionSchedule
from muonscale.optim.parameters.roles import Role
from muonscale.optim.rules.post_norm import resolve_post_norm
from muonscale.optim.rules.scale import shape_factor
from muonscale.transfer.constants import ForwardConstants
from muonscale.transfer.multipliers import UpdateRule, multipliers
from tests.errors.row import Row


def matrix(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape or (4, 6), dtype=dtype))


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 7))


class Bare(nn.Module):
    """Holds a parameter whose use nobody can read."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = matrix()


def groups(**options: Any) -> list[dict[str, Any]]:
    return ms.parameter_groups(model(), lr=0.1, **options)


def attention(name: str, columns: int = 4, matrices: Any = None, **sizes: int) -> Any:
    """Ask for the heads of one projection of an attention module, by an override."""
    held = nn.Module()
    vars(held).update(sizes)
    held.q_proj, held.v_proj = nn.Linear(4, 8), nn.Linear(4, 8)
    held.add_module(name, nn.Linear(columns, 8))
    options = {"heads": "auto", "matrices": matrices or {}}
    model = nn.ModuleDict({"attention": held})
    return ms.parameter_groups(model, overrides={f"*.{name}.weight": options})


def muon(**options: Any) -> ms.Muon:
    return ms.Muon([matrix()], **options)


def of_group(params: Any = None, **options: Any) -> ms.Muon:
    return ms.Muon([{"params": [matrix()] if params is None else params, **options}])


def stepped(gradient: Tensor, **options: Any) -> None:
    weight = matrix(*gradient.shape)
    weight.grad = gradient
    optimizer = ms.Muon([("w", weight)], **options)
    optimizer.step()
    optimizer.check_finite()


def loaded(change: Any) -> None:
    optimizer = ms.Muon([("w", matrix())])
    state = optimizer.state_dict()
    change(state)
    ms.Muon([("w", matrix())]).load_state_dict(state)


def changed(change: Any) -> Any:
    """Step twice, and change the group or its parameter before the second step."""

    def call(_: object) -> None:
        weight = matrix()
        optimizer = ms.Muon([("w", weight)])
        weight.grad = torch.ones(4, 6)
        optimizer.step()
        change(optimizer.param_groups[0], weight)
        optimizer.step()

    return call


def resize(weight: nn.Parameter, columns: int) -> None:
    weight.grad = None
    weight.data = torch.ones(4, columns)
    weight.grad = torch.ones(4, columns)


def replaced_layer(_: object) -> None:
    net = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 6), nn.Linear(6, 7))
    optimizer = ms.Muon(net, lr=0.1)
    net[1] = nn.Linear(4, 6)
    net(torch.arange(3)).sum().backward()
    optimizer.step()


def frozen_group(_: object) -> None:
    net = model()
    net[1].weight.requires_grad_(False)
    ms.Muon(net, lr=0.1).add_param_group({"params": [net[1].weight]})


def of_inference() -> nn.Parameter:
    with torch.inference_mode():
        return matrix()


def on_meta(_: object) -> None:
    weight = nn.Parameter(torch.ones(4, 6, device="meta"))
    weight.grad = torch.ones(4, 6, device="meta")
    ms.Muon([("w", weight)]).step()


def half(step: int) -> float:
    return 0.5


def of_heads() -> object:
    wide = small_llama(64)
    given = ms.parameter_groups(wide, lr=0.1, overrides={"*.q_proj.weight": {"heads": "auto"}})
    return ms.parametrize(wide, small_llama(32), given)


def diverged(state: dict[str, Any]) -> None:
    state["state"] = {0: {"momentum_buffer": torch.full((4, 6), float("nan"))}}


def renamed(state: dict[str, Any]) -> None:
    state["param_groups"][0]["param_names"] = ["v"]


def unnamed(state: dict[str, Any]) -> None:
    group = state["param_groups"][0]
    del group["param_names"], group["rule"]


def odd_convention(state: dict[str, Any]) -> None:
    state["param_groups"][0]["momentum_convention"] = "median"


def transfer(change: Any = None, **options: Any) -> Any:
    wide, base = small_llama(64), small_llama(32)
    if change is not None:
        change(wide, base)
    return ms.parametrize(wide, base, ms.parameter_groups(wide, lr=0.1), **options)


def small_llama(width: int, **fields: Any) -> nn.Module:
    from transformers import LlamaConfig

    from muonscale.lab.models.build import meta_model

    config = LlamaConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, vocab_size=32,
        num_attention_heads=width // 16, num_key_value_heads=width // 16, **fields,
    )  # fmt: skip
    return meta_model(config)


def frozen(net: nn.Module) -> nn.Module:
    return net.requires_grad_(False)


def of_layout(shape: tuple[int, ...], **fields: Any) -> Any:
    return matrix_shapes(shape, ms.MatrixSpec(**fields))


def saved(*names: str) -> dict[str, Any]:
    state = {i: {"momentum_buffer": torch.ones(4, 6)} for i in range(len(names))}
    return {
        "state": state,
        "param_groups": [{"params": [*state], "param_names": [*names], "lr": 0.1}],
    }


C, R, L, K = ConfigError, GroupingError, LayoutError, CheckpointError
ROWS: dict[str, Row] = {
    # Muon: its own options
    "nonfinite": Row(C, ("'stop'",), lambda _: muon(nonfinite="stop")),
    "compile": Row(C, ("'inductr'", "inductor"), lambda _: muon(compile="inductr")),
    "rule": Row(C, ("'moun'", "muon"), lambda _: of_group(rule="moun")),
    "decay": Row(C, ("'free'", "coupled", "independent"), lambda _: muon(decay="free")),
    "master": Row(C, ("'fp32'", "float32"), lambda _: muon(master="fp32")),
    "ns_form": Row(C, ("'grim'", "gram"), lambda _: muon(ns_form="grim")),
    "ns_kernel": Row(C, ("'tritn'", "triton"), lambda _: muon(ns_kernel="tritn")),
    "ns_dtype": Row(C, ("'float8'",), lambda _: muon(ns_dtype="float8")),
    "wire": Row(C, ("'float16'", "bfloat16"), lambda _: muon(comm_dtype="float16")),
    "lr": Row(C, ("lr is -1",), lambda _: muon(lr=-1)),
    "lr nan": Row(C, ("nan",), lambda _: muon(lr=float("nan"))),
    "momentum": Row(C, ("1.5", "0 <= x < 1"), lambda _: muon(momentum=1.5)),
    "betas": Row(C, ("is 1", "0 <= x < 1"), lambda _: muon(betas=(0.9, 1))),
    "constraint": Row(C, ("'norm'", "weight_norm"), lambda _: muon(constraint="norm")),
    "row_fraction": Row(C, ("is 0", "0 < x <= 1"), lambda _: muon(row_fraction=0)),
    "block_period": Row(C, ("is 0",), lambda _: muon(block_period=0)),
    "blocks": Row(
        C, ("is 2", "row_second_moment"), lambda _: muon(block_period=2, post_norm="normuon")
    ),
    "outward_scale": Row(C, ("is 1",), lambda _: muon(outward_scale=1)),
    "zero weight": Row(
        GroupingError,
        ("weight is zero", "None"),
        lambda _: ms.Muon([("weight", nn.Parameter(torch.zeros(4, 6)))], constraint="weight_norm"),
    ),
    "second_moment": Row(C, ("'grad'", "gradient"), lambda _: muon(second_moment="grad")),
    "second_moment_beta": Row(C, ("is 1",), lambda _: muon(second_moment_beta=1)),
    "second_moment_eps": Row(C, ("is 0",), lambda _: muon(second_moment_eps=0)),
    "pre_norm": Row(C, ("'rows'", "row"), lambda _: muon(pre_norm="rows")),
    "post_norm": Row(C, ("'rows'", "row"), lambda _: muon(post_norm="rows")),
    "post_norm_eps": Row(C, ("is 0",), lambda _: muon(post_norm_eps=0)),
    "scale": Row(C, ("'rmss'", "rms"), lambda _: muon(scale="rmss")),
    "scale number": Row(C, ("scale is -2",), lambda _: muon(scale=-2.0)),
    "independent": Row(C, ("peak_lr", "is 0"), lambda _: muon(lr=0.0, decay="independent")),
    "coefficients": Row(C, ("'jordn'", "jordan"), lambda _: muon(ns_coefficients="jordn")),
    "no coefficients": Row(C, ("()",), lambda _: muon(ns_coefficients=())),
    "a pair": Row(C, ("(1, 2)",), lambda _: muon(ns_coefficients=[(1, 2)])),
    "ns_steps": Row(C, ("ns_steps is 0",), lambda _: muon(ns_steps=0)),
    "steps of a row": Row(C, ("ns_steps is 2",), lambda _: muon(ns_coefficients="you5", ns_steps=2)),
    "normalisation": Row(C, ("'l7'",), lambda _: Coefficients(triples=((1, 2, 3),), normalization="l7")),
    "margin": Row(C, ("0.5",), lambda _: Coefficients(triples=((1, 2, 3),), margin=0.5)),
    "restarts": Row(C, ("(0,)",), lambda _: Coefficients(triples=((1, 2, 3),), restarts=(0,))),
    "empty coefficients": Row(C, ("0 triples",), lambda _: muon(ns_coefficients=Coefficients(triples=()))),
    # Muon: what it is given
    "one tensor": Row(R, ("(4, 6)",), lambda _: ms.Muon(matrix())),
    "no params": Row(C, ("[]",), lambda _: ms.Muon([])),
    "a number": Row(R, ("int",), lambda _: of_group([3])),
    "integers": Row(R, ("torch.int64",), lambda _: of_group([torch.ones(4, 6, dtype=torch.int64)])),
    "stochastic": Row(C, ("torch.float16", "bfloat16 only"), lambda _: of_group([matrix(dtype=torch.float16)], master="stochastic")),
    "a vector": Row(R, ("(9,)", "'adamw'", "parameter_groups"), lambda _: of_group([matrix(9)])),
    "twice": Row(R, ("given twice",), lambda _: (lambda w: ms.Muon([("a", w), ("b", w)]))(matrix())),
    "two names": Row(R, ("called a",), lambda _: ms.Muon([("a", matrix()), ("a", matrix())])),
    "names": Row(R, ("1 parameters", "2 param_names"), lambda _: of_group(param_names=["a", "b"])),
    "sparse": Row(R, ("sparse",), lambda _: stepped(torch.ones(4, 6).to_sparse())),
    "infinite": Row(DivergedError, ("skip",), lambda _: stepped(torch.full((4, 6), float("inf")))),
    "state of others": Row(K, ("v",), lambda _: loaded(renamed)),
    "state without names": Row(K, ("param_names",), lambda _: loaded(unnamed)),
    "convention": Row(K, ("'median'",), lambda _: loaded(odd_convention)),
    "a flag": Row(C, ("nesterov", "'yes'"), lambda _: muon(nesterov="yes")),
    "no list": Row(R, ("5", "(name, tensor)"), lambda _: of_group(5)),
    "a named number": Row(R, ("a of a group is 5", "int"), lambda _: of_group([("a", 5)])),
    "inference": Row(R, ("weight", "inference_mode"), lambda _: ms.Muon([("weight", of_inference())])),
    "shared elements": Row(R, ("(4, 6)", "(0, 1)", ".contiguous()"), lambda _: of_group([nn.Parameter(torch.ones(1, 6).expand(4, 6))])),
    "on the meta device": Row(R, ("gradient of w", "meta"), on_meta),
    "an option removed": Row(C, ("momentum is missing",), changed(lambda group, _: group.pop("momentum"))),
    "an option changed": Row(C, ("2", "0 <= x < 1"), changed(lambda group, _: group.update(momentum=2))),
    "params replaced": Row(R, ("'x'", "add_param_group"), changed(lambda group, _: group.update(params="x"))),
    "resized": Row(L, ("(4, 6)", "(4, 7)"), changed(lambda _, w: resize(w, 7))),
    "layer replaced": Row(R, ("1.weight", "(6, 4)", "strict=False"), replaced_layer),
    "a group of a lost model": Row(R, ("1 parameters", "`rule`"), lambda _: ms.Muon(model(), lr=0.1).add_param_group({"params": [matrix()]})),
    "a group that is frozen": Row(R, ("(6, 4)", "unfreeze"), frozen_group),
    "no state": Row(K, ("list", "state_dict()"), lambda _: muon().load_state_dict([])),  # type: ignore[arg-type]
    "half a state": Row(K, ("param_groups", "'state'"), lambda _: muon().load_state_dict({"state": {}})),
    "state of NaN": Row(K, ("momentum_buffer of w",), lambda _: loaded(diverged)),
    "state with an option": Row(K, ("momentum is 5",), lambda _: loaded(lambda state: state["param_groups"][0].update(momentum=5))),
    "schedule of no group": Row(C, ("'head'", "0"), lambda _: OptionSchedule(muon(), values={"head.momentum": half})),
    "schedule of another rule": Row(C, ("eps", "muon"), lambda _: OptionSchedule(muon(), values={"eps": half})),
    "schedule twice": Row(C, ("0.momentum", "twice"), lambda _: OptionSchedule(muon(), values={"momentum": half}, multipliers={"momentum": half})),
    "another schedule": Row(C, ("momentum", "weight_decay"), lambda _: OptionSchedule(muon(), values={"momentum": half}).load_state_dict(OptionSchedule(muon(), multipliers={"weight_decay": half}).state_dict())),
    # parameter_groups, grouping_report
    "groups rule": Row(C, ("'mun'", "muon"), lambda _: groups(rule="mun")),
    "frozen": Row(R, ("5 parameters", "requires_grad"), lambda _: ms.parameter_groups(frozen(model()), lr=0.1)),
    "no matrix": Row(R, ("2 trainable", 'rule="adamw"'), lambda _: ms.parameter_groups(nn.LayerNorm(4), lr=0.1, strict=True)),
    "pattern": Row(R, ("'*.qkv'",), lambda _: groups(overrides={"*.qkv": {"rule": "adamw"}})),
    "option": Row(C, ("'rle'", "rule"), lambda _: groups(overrides={"head": {"rle": "muon"}})),
    "role": Row(C, ("head",), lambda _: groups(overrides={"head": {"role": "heads"}})),
    "matrices given": Row(C, ("is 3",), lambda _: groups(overrides={"1.weight": {"matrices": 3}})),
    "muon on a vector": Row(R, ("(6,)", 'use rule "adamw"'), lambda _: groups(overrides={"1.bias": {"rule": "muon"}})),
    "heads of a group": Row(L, ("heads=4",), lambda _: groups(overrides={"1.weight": {"matrices": {"heads": 4}}})),
    "heads word": Row(C, ("heads", "4"), lambda _: groups(heads=4)),
    "convolutions word": Row(C, ("'no'", "adamw"), lambda _: groups(convolutions="no")),
    "heads without a model": Row(C, ("heads='auto'", "parameter_groups"), lambda _: muon(heads="auto")),
    "no attention": Row(R, ("'1.weight'", "1.weight"), lambda _: groups(overrides={"1.weight": {"heads": "auto"}})),
    "no convolution": Row(R, ("'1.weight'", "'muon'"), lambda _: groups(overrides={"1.weight": {"convolutions": "muon"}})),
    "sizes of heads": Row(R, ("head_dim", "num_heads"), lambda _: attention("k_proj")),
    "rows of heads": Row(R, ("8 rows", "3"), lambda _: attention("k_proj", head_dim=3)),
    "number of heads": Row(R, ("4 heads of 2", "2 heads"), lambda _: attention("q_proj", head_dim=2, num_heads=2)),
    "fused heads": Row(R, ("8 rows", "splits"), lambda _: attention("qkv", head_dim=2)),
    "width of heads": Row(R, ("3", "8 rows", "head_dim"), lambda _: attention("k_proj", num_heads=3)),
    "columns of heads": Row(R, ("9 columns", "2 heads of 4"), lambda _: attention("o_proj", columns=9, head_dim=4, num_heads=2)),
    "uneven columns": Row(R, ("9 columns", "2 heads"), lambda _: attention("o_proj", columns=9, num_heads=2)),
    "latent sizes": Row(R, ("qk_nope_head_dim", "v_head_dim"), lambda _: attention("kv_b_proj", head_dim=2)),
    "latent rows": Row(R, ("8 rows", "2 rows", "3 of values"), lambda _: attention("kv_b_proj", head_dim=4, qk_nope_head_dim=2, v_head_dim=3)),
    "latent given": Row(R, ("(6, 2)", "2 heads"), lambda _: attention("kv_b_proj", matrices={"splits": [6, 2]}, head_dim=4, qk_nope_head_dim=2, v_head_dim=2)),
    "a group before torch.distributed": Row(L, ("init_process_group",), lambda _: ms.Muon([matrix()], process_group="world")),
    "flat": Row(L, ("(24,)", "fully_shard"), lambda _: ms.parameter_groups(flat(), lr=0.1)),
    "in no group": Row(R, ("2.bias", "parameter_groups"), lambda _: report(lambda g: g[-1]["params"].pop() is None or g[-1]["param_names"].pop())),
    "in two groups": Row(R, ("is in two groups",), lambda _: report(lambda g: g.append(dict(g[0])))),
    "not of the model": Row(R, ("not have x",), lambda _: report(lambda g: (g[0]["params"].append(matrix()), g[0]["param_names"].append("x")))),
    "unknown key": Row(C, ("learning_rate=0.1", "option of Muon"), lambda _: muon(learning_rate=0.1)),
    "rules of none": Row(R, ("2 groups", "`rule`"), lambda _: ms.Muon([{"params": [matrix()]}, {"params": [matrix()]}])),
    "a list as group": Row(R, ("list", "one dict"), lambda _: muon().add_param_group([])),  # type: ignore[arg-type]
    "one beta": Row(C, ("betas", "(0.9,)"), lambda _: muon(betas=(0.9,))),
    "a rate in words": Row(C, ("lr", "'fast'"), lambda _: muon(lr="fast")),
    "many steps": Row(C, ("ns_steps", "0"), lambda _: muon(ns_steps=0)),
    "a generator": Row(R, ("generator", "module itself"), lambda _: ms.parameter_groups(model().parameters())),  # type: ignore[arg-type]
    "overrides in words": Row(C, ("'head'", "mapping"), lambda _: groups(overrides="head")),
    "an override in words": Row(C, ("'muon'", '"rule"'), lambda _: groups(overrides={"head": "muon"})),
    "rate of an override": Row(C, ("'head'", "lr"), lambda _: groups(overrides={"head": {"lr": -1.0}})),
    "scripted": Row(R, ("scripted",), lambda _: ms.parameter_groups(torch.jit.script(model()))),
    "lazy": Row(R, ("1.weight", "LazyLinear"), lambda _: ms.parameter_groups(nn.Sequential(nn.Linear(4, 4), nn.LazyLinear(4)))),
    "a guess": Row(R, ("bare", "overrides"), lambda _: ms.parameter_groups(Bare(), strict=True)),
    "unfreeze without a model": Row(R, ("'head'", "model="), lambda _: muon().unfreeze("head")),
    "unfreeze a stranger": Row(R, ("weight", "Linear"), lambda _: (lambda net: ms.Muon(net, lr=0.1).unfreeze(nn.Linear(2, 2)))(model())),
    "unfreeze nothing": Row(R, ("'*.qkv'",), lambda _: (lambda net: ms.Muon(net, lr=0.1).unfreeze("*.qkv"))(model())),
    "translate nobody": Row(C, ("'nobody'",), lambda _: ms.translate_arguments("nobody")),
    "translate an argument": Row(C, ("'rate'",), lambda _: ms.translate_arguments("torch", rate=0.1)),
    "translate a choice": Row(C, ("adjust_lr_fn", "'none'"), lambda _: ms.translate_arguments("torch", lr=0.1, adjust_lr_fn="none")),
    "no counterpart": Row(C, ("AdaptiveMuon", "torch"), lambda _: ms.translate_arguments("nvidia_adaptive")),
    "a value without a counterpart": Row(C, ("weight_update_hook='x'", "constraint"), lambda _: ms.translate_arguments("nvidia", weight_update_hook="x")),
    "no rate": Row(C, ("optax", "learning_rate"), lambda _: ms.translate_arguments("optax")),
    "rate of AdamW": Row(C, ("'embedding'", "adamw_lr"), lambda _: ms.translate_arguments("nvidia").groups(model())),
    "NVIDIA's coefficients": Row(C, ("'quintc'", "'quintic'"), lambda _: ms.translate_arguments("nvidia", coefficient_type="quintc")),
    "NVIDIA's steps": Row(C, ("num_ns_steps is 4", "5"), lambda _: ms.translate_arguments("nvidia", coefficient_type="cubic5", num_ns_steps=4)),
    "NVIDIA's scale": Row(C, ("'spectrl'", "spectral"), lambda _: ms.translate_arguments("nvidia", scale_mode="spectrl")),
    "NVIDIA's factor": Row(C, ("extra_scale_factor is 2", "'shape_scaling'", "lr"), lambda _: ms.translate_arguments("nvidia", scale_mode="shape_scaling", extra_scale_factor=2)),
    "optax's coefficients": Row(C, ("'jordn'", "'standard'"), lambda _: ms.translate_arguments("optax", learning_rate=0.1, ns_coeffs="jordn")),
    "optax's steps": Row(C, ("ns_steps is 1", "2 triples"), lambda _: ms.translate_arguments("optax", learning_rate=0.1, ns_coeffs=[(1, 2, 3)] * 2, ns_steps=1)),
    "NorMuon's scale": Row(C, ("'rms'", "match_rms"), lambda _: ms.translate_arguments("pytorch_optimizer_normuon", update_scale="rms")),
    "interleaved": Row(L, ("interleaved", "by_columns"), lambda _: of_layout((6, 4), heads=2, interleaved=True)),
    # Matrices
    "field": Row(C, ("'head'", "heads"), lambda _: groups(overrides={"1.weight": {"matrices": {"head": 2}}})),
    "type of a field": Row(C, ("'two'",), lambda _: groups(overrides={"1.weight": {"matrices": {"heads": "two"}}})),
    "splits": Row(L, ("(2, 2)", "6 rows"), lambda _: of_layout((6, 4), splits=(2, 2))),
    "groups": Row(L, ("groups=5",), lambda _: of_layout((6, 4), splits=(2, 4), groups=5)),
    "groups alone": Row(L, ("groups=2",), lambda _: of_layout((6, 4), groups=2)),
    "one axis": Row(L, ("two axes",), lambda _: of_layout((6,))),
    "heads": Row(L, ("heads=(2, 2)",), lambda _: of_layout((6, 4), heads=(2, 2))),
    "columns": Row(L, ("heads=3", "4 columns"), lambda _: of_layout((6, 4), heads=3, by_columns=True)),
    # functions of tensors and numbers
    "orthogonalize a vector": Row(C, ("(5,)", "[..., out, in]"), lambda _: ms.orthogonalize(torch.ones(5))),
    "orthogonalize dtype": Row(C, ("'int8'",), lambda _: ms.orthogonalize(torch.ones(5, 5), dtype="int8")),
    "restarts of flops": Row(C, ("(2,)", "between 1 and 1"), lambda _: ns_flops((4, 4), 2, "gram", coefficients=Coefficients(triples=((1, 2, 3),) * 3, restarts=(2,)))),
    "preset": Row(C, ("'moonlit'", "moonlight"), lambda _: ms.preset("moonlit")),
    "post_norm name": Row(C, ("'colum'", "None for none"), lambda _: resolve_post_norm("colum")),
    "polar express": Row(C, ("lower is 2", "0 < lower < 1"), lambda _: polar_express(5, lower=2)),
    "form of flops": Row(C, ("'gramm'", "gram"), lambda _: ns_flops((4, 4), 5, "gramm")),
    "tau": Row(C, ("tau is 0",), lambda _: clip_factors(torch.ones(2), 0)),
    "alpha": Row(C, ("alpha is 2",), lambda _: grouped_factors(torch.ones(2), 1, 2)),
    "lr to 0": Row(C, ("is 0.0",), lambda _: ms.convert_lr(0.1, "rms", lambda o, i: 0.0, (4, 4))),
    "lr scale": Row(C, ("'keler'",), lambda _: ms.convert_lr(0.1, "keler", "rms", (4, 4))),
    "lr of nothing": Row(C, ("0 shapes",), lambda _: conversion_table([], "rms", "keller")),
    "lr from 0": Row(C, ("not above 0",), lambda _: conversion_table([(4, 4)], lambda o, i: 0.0, "rms")),
    "factor": Row(C, ("inf",), lambda _: shape_factor(float("inf"), (4, 4), 0.2)),
    # convert_state_dict
    "source": Row(C, ("'kellr'", "keller"), lambda _: ms.convert_state_dict(saved("a"), [("a", matrix())], "kellr")),
    "count of names": Row(K, ("1 parameters", "2 names"), lambda _: ms.convert_state_dict(saved("a"), [("a", matrix()), ("b", matrix())], "torch")),
    "joined": Row(K, ("called a",), lambda _: join_state_dicts([saved("a"), saved("a")])),
    "same names": Row(K, ("called a",), lambda _: ms.convert_state_dict(saved("a", "a"), [("a", matrix()), ("a", matrix())], "torch")),
    "no rule": Row(K, ("a: neither",), lambda _: ms.convert_state_dict({"state": {0: {"step": 1}}, "param_groups": [{"params": [0], "lr": 0.1}]}, [("a", matrix())], "normuon")),
    # parametrize
    "convention of transfer": Row(C, ("'spectrl'", "spectral"), lambda _: transfer(convention="spectrl")),
    "depth": Row(C, ("'complete'", "complete_p"), lambda _: transfer(depth="complete")),
    "other fields": Row(C, ("hidden_act is 'gelu'", "hidden_size"), lambda _: ms.parametrize(small_llama(64, hidden_act="gelu"), small_llama(32), [])),
    "unknown model": Row(C, ("Sequential", "ForwardConstants"), lambda _: ms.parametrize(model(), model(), groups())),
    "layers": Row(C, ("None",), lambda _: ms.parametrize(model(), model(), groups(), depth="complete_p", constants=SimpleNamespace())),
    "no rate to multiply": Row(C, ("'hidden'", "lr", "0.7"), lambda _: transfer().groups(ms.parameter_groups(small_llama(64)))),
    "heads of transfer": Row(C, ("q_proj", "heads='auto'"), lambda _: of_heads()),
    "layers of other shapes": Row(C, ("3.weight", "3 shapes"), lambda _: ms.parametrize(nn.Sequential(*model(), nn.Linear(7, 7)), model(), groups(), convention="standard", constants=ForwardConstants(final_norm="2"))),
    "empty side": Row(C, ("(0, 4)",), lambda _: multipliers(Role.HIDDEN, (0, 4), (4, 4), UpdateRule())),
    "decay of a rule": Row(C, ("'free'", "coupled"), lambda _: UpdateRule(decay="free")),
    "vocabulary": Row(C, ("9 rows", "7 at"), lambda _: multipliers(Role.EMBEDDING, (9, 4), (7, 4), UpdateRule())),
    "scale of transfer": Row(C, ("(4, 4)",), lambda _: UpdateRule(scale=lambda o, i: 0.0).update_rms((4, 4))),
    "another model": Row(C, ("0.weight",), lambda _: transfer().scale_weights_(model())),
    "groups of another": Row(C, ("has no 1.weight",), lambda _: transfer().groups(groups())),
}  # fmt: skip


def flat() -> nn.Module:
    net = nn.Linear(4, 6)
    net.weight = nn.Parameter(torch.ones(24))
    return net


def report(change: Any) -> None:
    net = model()
    found = ms.parameter_groups(net, lr=0.1)
    change(found)
    ms.grouping_report(found, net)
