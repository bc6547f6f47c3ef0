"""Mistakes in studies, tables, fits, pages and plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.devices import find_device
from muonscale.lab.estimate.estimate import estimate
from muonscale.lab.estimate.figure import check_format
from muonscale.lab.estimate.resolve import PlanRequest
from muonscale.lab.fits.bootstrap import check_degrees, check_resamples
from muonscale.lab.fits.crossing import find_crossing
from muonscale.lab.fits.fit_table import FitRequest, fit_table
from muonscale.lab.fits.frontier import trace_iso_loss
from muonscale.lab.fits.laws.quadratic import fit_minimum
from muonscale.lab.fits.result import check_count, check_positive
from muonscale.lab.fits.steps_to_loss import StepsToLoss
from muonscale.lab.fits.tables import read_table
from muonscale.lab.fits.token_optimal import find_token_optimal
from muonscale.lab.report.check import check_page
from muonscale.lab.report.folders import page_of
from muonscale.lab.report.page import Chart, Page, PageSection, Series, Surface, Table
from muonscale.lab.report.write import write_page
from muonscale.lab.studies.analysis.seed_blocks import fit_blocks
from muonscale.lab.studies.batch.analysis import read_steps
from muonscale.lab.studies.execute.executor import make_executor
from muonscale.lab.studies.execute.slurm.options import check_options
from muonscale.lab.studies.frontier.step_time import fit_step
from muonscale.lab.studies.kinds import load_study
from tests.errors.row import Row

C, S = ConfigError, StudyError


def study(kind: str, *overrides: str) -> Callable[[Path], object]:
    name = "muon-adamw-nano" if kind == "compare" else f"{kind}-nano"
    return lambda _: load_study(name, overrides)


def study_file(content: str) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / "study.yaml").write_text(content)
        return load_study(str(folder / "study.yaml"))

    return call


def executor(kind: str, **options: Any) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        section = load_study("transfer-nano").config.executor
        return make_executor(section.model_copy(update={"kind": kind, **options}), folder)

    return call


HEAD = "optimizer,n,d,loss\n"
GOOD = "".join(f"muon,{n}e5,{(5 * n) % 9}e6,{3 / n}\n" for n in range(1, 9))


def table(content: str | bytes, name: str = "runs.csv", **asked: Any) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        data = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(data)
        return fit_table(read_table(folder / name), FitRequest(**asked))

    return call


def batch_table(content: str) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / "b.csv").write_text(content)
        return fit_table(read_table(folder / "b.csv"), FitRequest(measured="steps"))

    return call


ONES = np.ones(3)


def steps(batches: Any = (1.0, 2.0, 4.0), freedom: int = 0) -> StepsToLoss:
    error = np.full(3, np.nan)
    return StepsToLoss(
        batches=np.asarray(batches),
        log_steps=np.log([9.0, 6.0, 4.0]),
        error=error,
        freedom=freedom,
    )


def page(*blocks: Any) -> Callable[[Path], object]:
    section = PageSection(title="s", blocks=blocks)
    return lambda _: check_page(Page(title="t", summary="s", sections=(section,)))


def chart(name: str = "c", **parts: Any) -> Chart:
    return Chart(name=name, title="t", x_label="x", y_label="y", **parts)


def curve(x: tuple[float, ...] = (1, 2), y: tuple[float, ...] = (1, 2), **ends: Any) -> Chart:
    return chart(series=(Series(name="s", x=x, y=y, **ends),))


def plan(**asked: Any) -> Callable[[Path], object]:
    return lambda _: estimate(PlanRequest(target="demo", **asked))


def written(folder: Path) -> object:
    (folder / "file").write_text("x")
    return write_page(Page(title="t", summary="s", sections=()), folder / "file" / "report")


ROWS: dict[str, Row] = {
    # studies
    "a study": Row(C, ("'compar'", "a .yaml file"), lambda _: load_study("compar")),
    "no file": Row(C, ("none.yaml",), lambda _: load_study("none.yaml")),
    "no YAML": Row(C, ("not valid YAML",), study_file("a: [")),
    "a list": Row(C, ("[1]",), study_file("[1]")),
    "a kind": Row(C, ("'compar'", "compare"), study_file("study: compar")),
    "a word": Row(C, ("'=3'", "key=value"), study("compare", "=3")),
    "no value": Row(C, ("'seeds=['",), study("compare", "seeds=[")),
    "no keys": Row(C, ("executor.kind",), study("compare", "executor.kind.x=1", "executor.kind.x.y=1")),
    "unknown key": Row(C, ("sed",), study("compare", "sed=1")),
    "a nested key": Row(C, ("executor.workrs", "workers"), study("compare", "executor.workrs=1")),
    "required": Row(C, ("path=VALUE",), study_file("study: compare")),
    "set": Row(C, ("set=5",), study("compare", "set=5")),
    "key of set": Row(C, ("'lr'", "train.tokens"), study("compare", "set={lr: 5}")),
    "own key": Row(C, ("set.run.seed",), lambda _: load_study("muon-adamw-nano", ["set.run.seed=1"]).plan({})),
    "a variant no file could have": Row(
        C,
        ("variants", "'my base'", "letters"),
        study("compare", 'variants={"my base": {optimizer.lr: 0.1}}', "baselines=[my base]"),
    ),
    "an axis value no file could have": Row(
        C, ("axes.size", "'a/b'"), study("compare", 'axes={"size": {"a/b": {train.steps: 2}}}')
    ),
    "variants that are one file": Row(
        C,
        ("'A' and 'a'", "case"),
        study("compare", "variants={A: {optimizer.lr: 0.1}, a: {optimizer.lr: 0.2}}"),
    ),
    "variants": Row(C, ("=5",), study("compare", "variants=5")),
    "a variant": Row(C, ("'muonn'", "muon"), study("compare", "variants=[muonn]")),
    "baselines": Row(C, ("'sgd'", "adamw"), study("compare", "baselines=[sgd]")),
    "axes": Row(C, ("axes=5",), study("compare", "axes=5")),
    "baselines twice": Row(C, ("baselines", "repeats muon"), study("compare", "baselines=[muon, muon]")),
    "lengths twice": Row(C, ("tokens_per_parameter", "repeats 5"), study("compare", "tokens_per_parameter=[5, 5]")),
    "seed below 0": Row(C, ("seeds.0=-1",), study("compare", "seeds=[-1]")),
    "search seed": Row(C, ("search.seeds.0=99999999999999999999",), study("compare", "search.seeds=[99999999999999999999]")),
    "search ratio": Row(C, ("search.keys.lr.ratio=1.0000001",), study("compare", "search.keys.lr.ratio=1.0000001")),
    "search ratio of ever": Row(C, ("search.keys.lr.ratio=1e+300",), study("compare", "search.keys.lr.ratio=1e300")),
    "seeds": Row(C, ("seeds", "repeats 0"), study("compare", "seeds=[0, 0]")),
    "search name": Row(C, ("search.keys.seed", "another name"), study("compare", "search.keys={seed: {key: optimizer.lr, start: 1}}")),
    "search key": Row(C, ("'lr'", "section.key"), study("compare", "search.keys.lr.key=lr")),
    "search own": Row(C, ("search.keys.lr.key=run.seed",), study("compare", "search.keys.lr.key=run.seed")),
    "search twice": Row(C, ("search.keys.lr.key=optimizer.adamw_lr",), study("compare", "search.keys.lr.key=optimizer.adamw_lr")),
    "search most": Row(C, ("search.most=3", "search.settings=9"), study("compare", "search.most=3")),
    "search seeds": Row(C, ("[1, 1]",), study("compare", "search.seeds=[1, 1]")),
    "search start": Row(C, ("'sgd'", "start_of"), study("compare", "search.keys.lr.start_of={sgd: 1}")),
    "search nothing": Row(C, ("no key", "adamw"), study("compare", "search.keys={lr: {key: optimizer.lr, start: 1, variants: [muon]}}")),
    "search given": Row(C, ("variants.mine", "optimizer.lr", "search.keys.lr"), study("compare", "variants={adamw: {}, mine: {optimizer.lr: 1}}")),
    "search axis": Row(C, ("search.keys.lr", "another name"), study("compare", "axes={lr: {a: {train.batch_tokens: 256}}}")),
    "search of batches": Row(C, ("train.batch_tokens",), study("batch", "search.keys.lr.key=train.batch_tokens")),
    "search of a rule": Row(C, ("lr: ", "optimizer.lr"), study("scaling", "lr=0.1")),
    "search of transfer": Row(C, ("search.keys.lr", "optimizer.lr"), study("transfer", "search.keys.lr.key=optimizer.momentum")),
    "widths": Row(C, ("[64, 32]",), study("transfer", "widths=[64, 32]")),
    "values": Row(C, ("0.3, 0.2]",), study("transfer", "values=[0.1, 0.3, 0.2]")),
    "batches": Row(C, ("[4096, 1024, 2048]",), study("batch", "batches=[4096, 1024, 2048]")),
    "batch multiple": Row(C, ("1000",), lambda _: load_study("batch-nano", ["batches=[1000, 2048, 4096]"]).plan({})),
    "batch seeds": Row(C, ("[1, 1]",), study("batch", "seeds=[1, 1]")),
    "batch set": Row(C, ("set.run.path",), lambda _: load_study("batch-nano", ["set.run.path=x"]).plan({})),
    "frontier devices": Row(C, ("[4, 2]",), study("batch", "frontier.devices=[4, 2]")),
    "frontier device": Row(C, ("'h10'", "h100"), study("batch", "frontier.throughput=h10")),
    "frontier mfu": Row(C, ("0.2", "h100"), study("batch", "frontier.mfu=0.2")),
    "frontier work": Row(C, ("repeated",), study("batch", "frontier.throughput=h100", "frontier.optimizer_work=repeated")),
    "ladder": Row(C, ("other_tokens",), study("scaling", "ladder=[{width: 32, tokens: 5000}, {width: 32, tokens: 9000}, {width: 64, tokens: 9000}]")),
    "lengths": Row(C, ("other_tokens", "5000"), study("scaling", "ladder=[{width: 32, tokens: 5000, other_tokens: [5000]}, {width: 64, tokens: 9000}, {width: 96, tokens: 9000}]")),
    "scaling lr": Row(C, ("[0.2, 0.1]", "search"), study("scaling", "lr=[0.2, 0.1]")),
    "scaling choice": Row(C, ("'x'",), study("scaling", "lr=x")),
    "scaling baseline": Row(C, ("'sgd'", "adamw"), study("scaling", "baseline=sgd")),
    "scaling seeds": Row(C, ("[1, 1]",), study("scaling", "seeds=[1, 1]")),
    "calibration": Row(C, ("=100", "base_width=32"), study("telescope", "calibration_width=100")),
    "target": Row(C, ("target_width=64",), study("telescope", "target_width=64")),
    "telescope file": Row(C, ("hyperparameters", "'l r'"), study("telescope", "hyperparameters={l r: {key: optimizer.lr, center: 1, ratio: 2}}")),
    "telescope name": Row(C, ("hyperparameters.width",), study("telescope", "hyperparameters={width: {key: optimizer.lr, center: 1, ratio: 2}}")),
    "telescope key": Row(C, ("'lr'", "section.key"), study("telescope", "hyperparameters={a: {key: lr, center: 1, ratio: 2}}")),
    "telescope own": Row(C, ("run.seed",), study("telescope", "hyperparameters={a: {key: run.seed, center: 1, ratio: 2}}")),
    "telescope twice": Row(C, ("optimizer.lr",), study("telescope", "hyperparameters={a: {key: optimizer.lr, center: 1, ratio: 2}, b: {key: optimizer.lr, center: 1, ratio: 2}}")),
    "telescope set": Row(C, ("set.optimizer.lr",), study("telescope", "set.optimizer.lr=1")),
    "telescope seeds": Row(C, ("[1, 1]",), study("telescope", "seeds=[1, 1]")),
    "slurm options": Row(S, ("kind=inline",), executor("inline", slurm={"mem": 1})),
    "workers": Row(S, ("workers=3",), executor("inline", workers=3)),
    "slurm option": Row(S, ("'slurm_tme'", "slurm_time"), lambda _: check_options({"slurm_tme": 3})),
    "findings": Row(S, ("['x']",), lambda _: read_steps({"x": 1})),
    "no losses": Row(S, ("1 groups",), lambda _: fit_blocks({"muon": {}})),
    "no seed in common": Row(S, ("[0, 1]",), lambda _: fit_blocks({"muon": {0: 1.0}, "adamw": {1: 2.0}})),
    "step times": Row(S, ("2 tokens", "5 s"), lambda _: fit_step(np.array([1.0, 2.0]), np.array([5.0, 1.0]), np.array([1.0, 1.0]))),
    # tables and fits
    "suffix": Row(S, (".xlsx", ".csv"), table("", "runs.xlsx")),
    "bytes": Row(S, ("byte 0",), table(b"\xff\xfe")),
    "NUL": Row(S, ("line 2",), table(HEAD + "a\0,1,1,1")),
    "empty": Row(S, ("no line with text",), table("")),
    "no rows": Row(S, ("no rows",), table(HEAD)),
    "names": Row(S, ("['a', 'a']",), table("a,a\n1,2")),
    "cells": Row(S, ("line 2: 1 cells", "4 columns"), table(HEAD + "1")),
    "JSON": Row(S, ("line 1: not JSON",), table("{", "runs.jsonl")),
    "no object": Row(S, ("[1]",), table("[1]", "runs.jsonl")),
    "column": Row(S, ("compute",), table("a\n1")),
    "two columns": Row(S, ("loss and val_loss",), table("n,d,loss,val_loss\n1,1,1,1")),
    "by": Row(S, ("optimizer",), table(HEAD + GOOD, by="optimiser")),
    "an empty cell": Row(S, ("line 2", "empty"), table(HEAD + ",1,1,1")),
    "a number": Row(S, ("line 2", "'inf'"), table(HEAD + "muon,1,1,inf")),
    "law": Row(C, ("'kaplan'", "chinchilla"), table(HEAD + GOOD, law="kaplan")),
    "group": Row(S, ("sgd", "muon"), table(HEAD + GOOD, reference="sgd")),
    "few points": Row(S, ("muon", "6 runs", "got 1"), table(HEAD + "muon,1,1,1\n")),
    "few batches": Row(S, ("3 different", "got 1"), batch_table("batch,steps\n1,2\n")),
    "resamples": Row(S, ("resamples=5",), lambda _: check_resamples(5)),
    "degrees": Row(S, ("got 2",), lambda _: check_degrees(2, 2)),
    "shapes": Row(S, ("(3,)",), lambda _: check_positive(x=ONES, y=np.ones(2))),
    "positive": Row(S, ("point 1 is -1",), lambda _: check_positive(x=-ONES)),
    "enough": Row(S, ("got 2",), lambda _: check_count("a law", "points", 2, 3)),
    "collinear": Row(S, ("N and D", "1.0000"), table("n,d,loss\n" + "".join(f"{n},{20 * n},{3 / n}\n" for n in range(1, 9)))),
    "order": Row(S, ("measurement 1",), lambda _: find_crossing(1.0, [2.0, 1.0], [1.0, 2.0])),
    "edge": Row(S, ("the lowest x, 1",), lambda _: fit_minimum([1, 2, 3, 4], [1, 2, 3, 4])),
    "diverged": Row(S, ("none of the 3",), lambda _: fit_minimum([1, 2, 3], [np.inf] * 3)),
    "diverged beside": Row(S, ("diverged",), lambda _: fit_minimum([1, 2, 3], [2, 1, np.inf])),
    "as many": Row(S, ("(2,)", "(3,)"), lambda _: fit_minimum([1, 2, 3], [1, 2])),
    "steps": Row(S, ("[1.0, 1.0, 2.0]",), lambda _: steps((1.0, 1.0, 2.0))),
    "noise": Row(S, ("0 degrees",), lambda _: steps().draw(100)),
    "tolerance": Row(S, ("-1",), lambda _: find_token_optimal([1, 2, 3], ONES, -1)),
    "seconds": Row(S, ("(3,)",), lambda _: trace_iso_loss(steps(), ONES, [1], 8)),
    "devices": Row(S, ("[0]",), lambda _: trace_iso_loss(steps(), ONES[None], [0], 8)),
    # pages
    "name of a chart": Row(S, ("'a b'",), page(chart("a b", series=(Series(name="s", x=(1,), y=(1,)),)))),
    "two charts": Row(S, ("2 charts",), page(curve(), curve())),
    "no series": Row(S, ("'c'",), page(chart())),
    "limits": Row(S, ("(2, 1)", "(low, high)"), page(chart(series=(Series(name="s", x=(1,), y=(1,)),), y_limits=(2, 1)))),
    "interval": Row(S, ("low and high",), page(curve(low=(1, 2)))),
    "lengths of a series": Row(S, ("'x': 2",), page(curve(y=(1,)))),
    "surface": Row(S, ("rows of",), page(chart(surface=Surface(x=(1, 2), y=(1, 2), z=((1,),), label="l")))),
    "contours": Row(S, ("1 x 1",), page(chart(surface=Surface(x=(1,), y=(1,), z=((1,),), label="l")))),
    "table": Row(S, ("2 cells",), page(Table(head=("a",), rows=(("1", "2"),)))),
    "page of": Row(S, ("coordcheck.json",), lambda folder: page_of([folder])),
    "report": Row(S, ("--out",), written),
    # plans
    "device": Row(C, ("'h10'", "h100"), lambda _: find_device("h10")),
    "figure": Row(C, ("f.gif", ".png"), lambda _: check_format(Path("f.gif"))),
    "figure folder": Row(C, ("nowhere",), lambda _: check_format(Path("nowhere/f.png"))),
    "mfu": Row(C, ("2",), plan(mfu=2)),
    "bandwidth": Row(C, ("-1",), plan(bandwidth=-1e9)),
    "number of devices": Row(C, ("2 devices", "is 4"), plan(layout="fsdp=2", devices=4)),
    "many devices": Row(C, ("99999",), plan(devices=99999)),
}  # fmt: skip
