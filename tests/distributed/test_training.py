"""The trainer in every row of the layout table: 20 steps, with the losses of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muonscale.lab.config.load import Config, load_config
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.parallel.topology import Topology, parse_layout
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.console import RunConsole
from muonscale.lab.training.export import export
from muonscale.lab.training.loop import train, train_together
from tests.cli.jobs import losses, records
from tests.distributed.trained import ROWS, STEPS, TOLERANCE, VARIANT_ROWS, VARIANTS
from tests.optim.conftest import causal_lm


@pytest.fixture
def words(tiny: list[str], tmp_path: Path) -> list[str]:
    """Overrides of the demo, for a model whose configuration is in a file."""
    (tmp_path / "shapes").mkdir()
    drop = ("run.path", "model.preset", "train.", "eval.every", "demo")
    return [
        *(word for word in tiny if not word.startswith(drop)),
        "optimizer.ns_dtype=float32",
        "optimizer.eps=1e-4",  # gradients that are 0 but for rounding must not become whole updates
        f"train.steps={STEPS}",
        "train.tokens=null",
        "train.batch_tokens=384",
        "eval.every=10",
    ]


def config_of(kind: str, run: Path, words: list[str]) -> Config:
    shape = run.parent / "shapes" / f"{kind}.json"
    config = causal_lm(kind).config.to_dict()  # type: ignore[operator]
    shape.write_text(json.dumps(config | {"attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}))
    return load_config("demo", [*words, f"run.path={run}", f"model.config={shape}"])


def together(config: Config, topology: Topology, resume: bool = False) -> None:
    """Train on this rank of a world whose group is there already."""
    torch.set_num_threads(1)
    store = dist.PrefixStore(str(config.run.path), dist.distributed_c10d._get_default_store())
    rank = dist.get_rank()
    processes = Processes(topology, rank, rank, torch.device("cpu"), store)
    folder = RunFolder(config.run.path)
    if rank == 0:
        folder.path.mkdir(exist_ok=True)
    train_together(config, folder, RunConsole.silent(), processes, resume=resume)


def check_equal(run: Path, expected: Path, rel: float) -> None:
    assert len(losses(run)) == STEPS
    assert losses(run) == pytest.approx(losses(expected), rel=rel)
    for kind, keys in {"eval": ("validation_loss",), "train": ("update_rms",)}.items():
        for key in keys:
            values = [record[key] for record in records(run, kind)]
            assert values == pytest.approx(
                [r[key] for r in records(expected, kind)], rel=2 * rel
            ), key
    norms = [record["grad_norm"] for record in records(run, "train")]
    for norm, theirs in zip(
        norms, [r["grad_norm"] for r in records(expected, "train")], strict=True
    ):
        assert norm == pytest.approx(theirs, rel=20 * rel)


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp=2", "fsdp=2", "tp=2,sp", "fsdp=2,tp=2"])
def test_passes_in_bfloat16_train_nearly_as_in_float32(
    world: Any, layout: str, words: list[str], tmp_path: Path
) -> None:
    run_both(world, "llama", layout, [*words, "train.precision=bfloat16"], tmp_path, rel=2e-2)
    env = json.loads((tmp_path / "many" / "env.json").read_text())
    assert env["precision"] == "bfloat16" and env["layout"] == layout


def run_both(
    world: Any, kind: str, layout: str, words: list[str], folder: Path, rel: float = TOLERANCE
) -> None:
    train(config_of(kind, folder / "one", words), resume=False, console=RunConsole.silent())
    topology = parse_layout(layout)
    config = config_of(kind, folder / "many", words)
    world(topology.world).run(together, config, topology)
    check_equal(folder / "many", folder / "one", rel)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "layout"), ROWS)
def test_every_row_of_the_table_trains_as_one_process(
    world: Any, kind: str, layout: str, words: list[str], tmp_path: Path
) -> None:
    run_both(world, kind, layout, words, tmp_path)
    check_export(tmp_path / "many", tmp_path / "out")


def check_export(run: Path, folder: Path) -> None:
    """See that the last checkpoint has the weights that the ranks had gathered themselves."""
    export(RunFolder(run), None, folder, report=pytest.fail)
    name = "model.safetensors"
    assert (folder / name).read_bytes() == (run / "model" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("kind", "layout"), VARIANT_ROWS)
def test_other_options_train_as_one_process_too(
    world: Any, kind: str, layout: str, variant: str, words: list[str], tmp_path: Path
) -> None:
    run_both(world, kind, layout, [*words, *VARIANTS[variant]], tmp_path)
    seen, theirs = (records(tmp_path / run, "telemetry") for run in ("many", "one"))
    assert len(seen) == len(theirs) == (4 if variant == "telemetry" else 0)
    for record, expected in zip(seen, theirs, strict=True):
        for group, figures in expected["groups"].items():
            assert record["groups"][group] == pytest.approx(figures, rel=1e-2), group
        assert record["matrices"].keys() == expected["matrices"].keys() != set()
        for kind, figures in expected["matrices"].items():
            assert record["matrices"][kind] == pytest.approx(figures, rel=1e-2), kind
