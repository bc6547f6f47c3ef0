"""Mistakes in recipes and overrides: keys, values and what does not go together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import nn

from muonscale import Muon
from muonscale.errors import ConfigError, GroupingError
from muonscale.lab.config.keys import find_keys
from muonscale.lab.config.load import Config, load_config
from muonscale.lab.config.sections import ParallelSection
from muonscale.lab.parallel.topology import arrange, parse_layout
from muonscale.lab.targets import inspect
from muonscale.lab.training.average import build_average
from muonscale.lab.training.checkpoint import steps_to_keep
from muonscale.lab.training.micro_batches import check_shares
from muonscale.lab.training.noise_scale import check_noise_scale
from muonscale.lab.training.schedule import (
    build_option_schedule,
    check_schedule,
    option_functions,
)
from tests.errors.row import Row

C = ConfigError
PICO = ("model.preset=llama-pico", "data.vocab_size=300")
POINT = "{at: 0, value: 0.9}"
TWO = "data.mixture=[{path: a, weight: 1}, {path: b, weight: %s}]"
STAGES = "schedule.stages=[{name: constant, until: %s, weights: %s}, {name: cosine}]"


def load(*overrides: str, recipe: str = "demo") -> Callable[[Path], Config]:
    return lambda _: load_config(recipe, overrides)


def file(content: str, name: str = "recipe.yaml") -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / name).write_text(content)
        return load_config(str(folder / name) if name.endswith("yaml") else str(folder))

    return call


def other_encoding(folder: Path) -> object:
    (folder / "recipe.yaml").write_bytes(b"\xff")
    return load_config(str(folder / "recipe.yaml"))


def shares(world: int, *overrides: str) -> Callable[[Path], object]:
    def call(_: Path) -> object:
        config = load_config("demo", overrides)
        check_shares(config, arrange(config.parallel, world))
        return check_noise_scale(config, arrange(config.parallel, world))

    return call


def looked(*overrides: str, model: str = "demo") -> Callable[[Path], object]:
    return lambda _: inspect(model, [*PICO, *overrides] if model == "demo" else overrides)


def layout(text: str) -> Callable[[Path], object]:
    return lambda _: parse_layout(text)


def ranks(world: int, **options: object) -> Callable[[Path], object]:
    return lambda _: arrange(ParallelSection(**options), world)  # type: ignore[arg-type]


ROWS: dict[str, Row] = {
    # what is read
    "a URL for a recipe": Row(C, ("s3://a", "data.path"), load(recipe="s3://a")),
    "a URL for a folder": Row(C, ("run.path", "s3://a", "data.path"), load("run.path=s3://a")),
    "a URL for a tokenizer": Row(C, ("data.tokenizer", "s3://a"), load("data.tokenizer=s3://a")),
    "a recipe": Row(C, ("'dem'", "demo", ".yaml file"), load(recipe="dem")),
    "no file": Row(C, ("none.yaml",), load(recipe="none.yaml")),
    "no YAML": Row(C, ("not valid YAML",), file("a: [")),
    "a list": Row(C, ("[1, 2]",), file("[1, 2]")),
    "a section": Row(C, ("'run'", "is 5"), file("run: 5")),
    "a run": Row(C, ("Expecting value", "config.json"), file("", "config.json")),
    "another config": Row(C, ("no section `run`",), file("{}", "config.json")),
    "a word": Row(C, ("'lr=3'", "section.key=value"), load("lr=3")),
    "a value": Row(C, ("'run.seed=['",), load("run.seed=[")),
    "a key in a value": Row(C, ("optimizer.lr.x",), load("optimizer.lr.x=1")),
    "an item": Row(C, ("5 is none of the 0",), load("checkpoint.marks=[]", "checkpoint.marks.5=1")),
    "alternatives": Row(C, ("train.tokens and train.steps",), load("train.steps=5", "train.tokens=9")),
    "NUL": Row(C, ("data.path", r"\x00"), load(r'data.path="a\0b"')),
    "a comment": Row(C, ("'a'", "run.path='\"a #b\"'"), load("run.path=a #b")),
    "text as a recipe": Row(C, ("data.path=", "run.path="), file("x", "a.txt")),
    "a pipe": Row(C, ("/dev/null", ".yaml"), load(recipe="/dev/null")),
    "a recipe in another encoding": Row(C, ("recipe.yaml", "0xff"), other_encoding),
    "a key to explain": Row(C, ("warmupp", "warmup"), lambda _: find_keys("warmupp")),
    # sections: keys and types
    "seed below 0": Row(C, ("run.seed=-1",), load("run.seed=-1")),
    "seed too large": Row(C, ("run.seed=99999999999999999999",), load("run.seed=99999999999999999999")),
    "run": Row(C, ("unknown key run.sed", "seed"), load("run.sed=1")),
    "run.threads": Row(C, ("run.threads=0",), load("run.threads=0")),
    "run.device": Row(C, ("'tpu'", "'cuda'"), load("run.device=tpu")),
    "model": Row(C, ("model.preset",), load("model.preset=null")),
    "data": Row(C, ("data.source",), load("data.source=null")),
    "data.vocab_size": Row(C, ("=5", "257"), load("data.vocab_size=5")),
    "data.mixture.path": Row(C, ("data.mixture.N.path",), load("data.mixture=[{weight: 1}]")),
    "data.mixture key": Row(C, ("wieght", "weight"), load("data.mixture=[{path: a, weight: 1, wieght: 2}]")),
    "data.mixture names": Row(C, ("'a'",), load("data.mixture=[{path: a, weight: 1}, {path: x/a, weight: 1}]")),
    "data.mixture weights": Row(C, ("all 1 items",), load("data.mixture=[{path: a, weight: 0}]")),
    "data.format": Row(C, ("data.path",), load("data.format=chat", "data.tokenizer=t")),
    "data.tokenizer": Row(C, ("null",), load("data.format=chat", "data.path=a")),
    "data.chat_template": Row(C, ("plain", "data.format=chat"), load("data.chat_template=plain")),
    "data.path": Row(C, ("path=5", "list of paths"), load("data.path=5")),
    "tokens of a source": Row(C, ("python-stdlib", "data.path"), load("data.format=tokens")),
    "tokens of no tokenizer": Row(C, ("data.tokenizer",), load("data.format=tokens", "data.path=a")),
    "bytes of tokens": Row(C, ("data.max_bytes=5",), load("data.format=tokens", "data.path=a", "data.tokenizer=t", "data.max_bytes=5")),
    "optimizer": Row(C, ("optimizer.momntum", "momentum"), load("optimizer.momntum=1")),
    "optimizer.rule": Row(C, ("'moun'", "muon"), load("optimizer.rule=moun")),
    "rule of another key": Row(C, ("optimizer.post_norm=normuon",), load("optimizer.rule=normuon")),
    "optimizer.lr": Row(C, ("optimizer.lr=-1",), load("optimizer.lr=-1")),
    "optimizer.lr nan": Row(C, ("optimizer.lr=nan",), load("optimizer.lr=.nan")),
    "optimizer.constraint": Row(C, ("'weight_nrm'", "'weight_norm'"), load("optimizer.constraint=weight_nrm")),
    "optimizer.second_moment": Row(C, ("'grad'", "'gradient'"), load("optimizer.second_moment=grad")),
    "optimizer.pre_norm": Row(C, ("'rows'", "'row_col'"), load("optimizer.pre_norm=rows")),
    "optimizer.post_norm": Row(C, ("'rows'", "'row_col'"), load("optimizer.post_norm=rows")),
    "optimizer.state_format": Row(C, ("keller",), load("optimizer.state_format=keller")),
    "transfer": Row(C, ("transfer.base",), load("model.weights=w", "data.tokenizer=w", "transfer.base=llama-pico")),
    "routing": Row(C, ("-3",), load("routing.bias_rate=-3")),
    "schedule.name": Row(C, ("'cosin'", "'cosine'"), load("schedule.name=cosin")),
    "schedule.stages": Row(C, ("stages with 0 items",), load("schedule.name=stages")),
    "stages.until": Row(C, ("None, None",), load("schedule.name=stages", "schedule.stages=[{name: constant}, {name: cosine}]")),
    "stages.weights": Row(C, ("there is no data.mixture",), load("schedule.name=stages", STAGES % (0.5, "{a: 1}"))),
    "stages.weights name": Row(C, ("'c'",), load(TWO % 1, "schedule.name=stages", STAGES % (0.5, "{c: 1}"))),
    "stages.weights zero": Row(C, ("all weights are 0",), load(TWO % 1, "schedule.name=stages", STAGES % (0.5, "{a: 0}"))),
    "stages in order": Row(C, ("of 3",), load("train.steps=3", "schedule.name=stages", "schedule.stages=[{name: constant, until: 0.99}, {name: cosine}]")),
    "schedule of lr": Row(C, ("lr", "schedulers"), load("schedule.options={lr: [{at: 0, value: 1}]}")),
    "schedule of a word": Row(C, ("'momntum'", "momentum"), load("schedule.options={momntum: [{at: 0, value: 1}]}")),
    "schedule of both": Row(C, ("schedule.options.momentum",), load("schedule.options={momentum: [{at: 0, value: 0.9}, {at: end, times: 2}]}")),
    "schedule in order": Row(C, ("schedule.options.momentum", "steps 0, 0 of 5"), lambda folder: option_functions(load("train.steps=5", f"schedule.options={{momentum: [{POINT}, {POINT}]}}")(folder))),
    "schedule of a group": Row(C, ("schedule.options", "'head'"), lambda folder: build_option_schedule(Muon(nn.Linear(4, 6), lr=0.1), load(f"schedule.options={{head.momentum: [{POINT}]}}")(folder))),
    "unused": Row(C, ("'b' has weight 0",), lambda folder: check_schedule(load(TWO % 0)(folder))),
    "train": Row(C, ("train.tokens",), load("train.tokens=null")),
    "train.batch_schedule": Row(C, ("train.steps=5", "train.tokens"), load("train.steps=5", "train.batch_schedule=[{after: 0.5, batch_tokens: 8192}]")),
    "batch_schedule order": Row(C, ("train.batch_schedule",), load("train.batch_schedule=[{after: 0.5, batch_tokens: 8192}, {after: 0.1, batch_tokens: 4096}]")),
    "huge batch": Row(C, ("train.batch_tokens", "4294967296"), load(f"train.batch_tokens={32 * 10**19}")),
    "huge length": Row(C, ("train.tokens",), load(f"train.tokens={10**30}")),
    "train.batch_tokens": Row(C, ("=1000", "=256"), load("train.batch_tokens=1000")),
    "epochs of a mixture": Row(C, ("train.epochs=1", "2", "train.tokens"), load("train.epochs=1", TWO % 1)),
    "steps of epochs": Row(C, ("train.epochs=1", "train.tokens"), lambda folder: load("train.epochs=1")(folder).timeline),
    "train.average_from": Row(C, ("train.average_from=0.9", "2"), lambda folder: build_average(nn.Linear(1, 1), load("train.steps=2", "train.average=ema", "train.average_from=0.9")(folder))),
    "profile.steps": Row(C, ("'3'", "10:15"), load("profile.steps='3'")),
    "profile beyond": Row(C, ("profile.steps=4:7", "first < end <= 6"), load("train.steps=5", "profile.steps=4:7")),
    "track": Row(C, ("track=5", "wandb"), load("track.to=5")),
    "a tracker": Row(C, ("wandbb", "wandb"), load("track.to=wandbb")),
    "weights": Row(C, ("model.weights=w", "data.tokenizer"), load("model.weights=w")),
    "parallel": Row(C, ("'zero'", "'fsdp'"), load("parallel.data=zero")),
    "eval": Row(C, ("eval.every=0",), load("eval.every=0")),
    "checkpoint": Row(C, ("checkpoint.marks.0=-1",), load("checkpoint.marks=[-1]")),
    "telemetry": Row(C, ("unknown key telemetry.evry", "every"), load("telemetry.evry=1")),
    "required": Row(C, ("run",), file("model: {preset: llama-pico}")),
    # what only a run shows
    "marks": Row(C, ("5,000",), lambda _: steps_to_keep(load_config("demo", ["train.steps=1", "train.batch_tokens=256", "checkpoint.marks=[5000]"]))),
    "warm-up": Row(C, ("warmup=9",), lambda _: check_schedule(load_config("demo", ["train.steps=5", "schedule.name=wsd", "schedule.warmup=9"]))),
    "noise of chats": Row(C, ("=2",), shares(1, "data.path=a", "data.format=chat", "data.tokenizer=t", "telemetry.noise_scale_every=2")),
    "noise of one": Row(C, ("=2",), shares(1, "telemetry.noise_scale_every=2", "train.batch_tokens=256", "data.sequence_length=256")),
    # models
    "preset": Row(C, ("'llama-pic'", "llama-pico"), looked("model.preset=llama-pic")),
    "no config": Row(C, ("nowhere", "config.json"), lambda _: inspect("demo", ["model.config=nowhere"])),
    "no model": Row(C, ("'lama-nan'",), looked(model="lama-nan")),
    "field": Row(C, ("hidden_sze", "hidden_size"), looked("model.fields.hidden_sze=3")),
    "many layers": Row(C, ("num_hidden_layers=1000000000", "20,000"), looked("model.fields.num_hidden_layers=1000000000")),
    "many layers as a float": Row(C, ("num_hidden_layers", "20,000"), looked("model.fields.num_hidden_layers=1e9")),
    "a wide model": Row(C, ("hidden_size", "at most"), looked(f"model.fields.hidden_size={10**400}")),
    "decided field": Row(C, ("model.fields.vocab_size",), looked("model.fields.vocab_size=3")),
    "refused field": Row(C, ("model.fields", "hidden_size"), looked("model.fields.hidden_size=abc")),
    "unbuildable": Row(C, ("transformers cannot build",), looked("model.fields.hidden_act=gellu")),
    "positions": Row(C, ("8 positions",), looked("model.fields.max_position_embeddings=8")),
    "rope": Row(C, ("rope_theta", "inside rope_parameters"), looked("model.fields.rope_theta=5", "model.fields.rope_parameters={rope_type: default}")),
    "override": Row(GroupingError, ("'nothing.*'",), looked("optimizer.overrides={nothing.*: {rule: adamw}}")),
    "base of transfer": Row(C, ("transfer.base",), looked("transfer.base=llama-pic")),
    # layouts
    "layout": Row(C, ("'tq=2'",), layout("tq=2")),
    "layout twice": Row(C, ("tp",), layout("tp=2,tp=2")),
    "two kinds": Row(C, ("fsdp",), layout("fsdp=2,ddp=2")),
    "sequence": Row(C, ("which is 1",), layout("fsdp=2,sp")),
    "tensor with ddp": Row(C, ("here 2",), layout("ddp=2,tp=2")),
    "expert with tensor": Row(C, ("here 2",), layout("fsdp=2,tp=2,ep=2")),
    "expert with hsdp": Row(C, ("here 2",), layout("hsdp=2x2,ep=2")),
    "expert of ddp": Row(C, ("not over 2", "fsdp"), layout("ddp=4,ep=2")),
    "expert parts": Row(C, ("expert parallelism 3",), layout("fsdp=4,ep=3")),
    "tensor parts": Row(C, ("parallel.tensor=3", "4 processes"), ranks(4, tensor=3)),
    "replicas": Row(C, ("parallel.replicas=2",), ranks(4, replicas=2)),
    "replica parts": Row(C, ("parallel.replicas=3",), ranks(4, data="hsdp", replicas=3)),
    "shares": Row(C, ("train.batch_tokens=4096", "multiples of 1536"), shares(6)),
    "micro": Row(C, ("micro_batch_tokens=768",), shares(1, "train.micro_batch_tokens=768")),
    "sequence parts": Row(C, ("=257",), shares(2, "data.sequence_length=257", "train.batch_tokens=257", "eval.batch_tokens=257", "parallel.tensor=2", "parallel.sequence=true")),
}  # fmt: skip
