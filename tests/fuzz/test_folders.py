"""Run folders that are damaged: no traceback, no good checkpoint lost, no wrong weights."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import Metadata

from muonscale.lab.training.checkpoint_reader import read_metadata
from tests.fuzz.outcome import command
from tests.fuzz.strategies import damaged, damaged_bytes
from tests.fuzz.tiers import tiers

STEPS = ("step-00000001", "step-00000002")
UNFINISHED = ("result.json", "model")


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def files(run: Path, *below: str) -> list[Path]:
    roots = [run / name for name in below] if below else [run]
    found = [p for root in roots for p in ([root] if root.is_file() else sorted(root.rglob("*")))]
    return [p for p in found if p.is_file() and not p.is_symlink()]


def harm(data: st.DataObject, run: Path, names: list[str]) -> None:
    """Do one or two harms to files of a run."""
    for _ in range(data.draw(st.integers(1, 2))):
        name = data.draw(st.sampled_from(names))
        kinds = ["bytes"] * 4 + ["remove", "folder", "link", "swap", "beside", "pipe"]
        kinds += ["json"] * 5 * name.endswith((".json", ".jsonl"))
        apply(data.draw, run, name, data.draw(st.sampled_from(kinds)))


def apply(draw: Any, run: Path, name: str, kind: str) -> None:
    path = run / name
    # An earlier harm may have been to its folder; what a link leads to is not ours to write.
    if path.is_symlink() or not path.is_file():
        return
    if kind == "bytes":
        path.write_bytes(draw(damaged_bytes(path.read_bytes())))
    elif kind == "json":
        _harm_json(draw, path)
    elif kind == "remove":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif kind == "link":
        path.unlink()
        path.symlink_to(
            draw(
                st.sampled_from(
                    ["/dev/null", "/dev/zero", "nowhere", name.split("/")[-1], "../other.txt"]
                )
            )
        )
    elif kind == "swap":
        other = draw(st.sampled_from([str(p.relative_to(run)) for p in files(run)]))
        content = path.read_bytes()
        path.write_bytes((run / other).read_bytes())
        (run / other).write_bytes(content)
    else:
        path.with_name(
            draw(
                st.sampled_from(
                    ["extra", "step-00000009", "step-abcdefgh", ".writing-step-00000003", "x.json"]
                )
            )
        ).write_text("x")


def _harm_json(draw: Any, path: Path) -> None:
    lines = (
        path.read_text(errors="replace").splitlines()
        if path.suffix == ".jsonl"
        else [path.read_text(errors="replace")]
    )
    try:
        trees = [json.loads(line) for line in lines if line.strip()]
    except ValueError:
        return
    if trees:
        at = draw(st.integers(0, len(trees) - 1))
        trees[at] = draw(damaged(trees[at]))
    path.write_text("\n".join(json.dumps(tree) for tree in trees))


def copy(good: Path, to: Path, *without: str) -> Path:
    run = to / "run"
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    shutil.copytree(good, run)
    (to / "other.txt").write_text("a file that is no part of the run")
    for name in without:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    return run


def names_of(run: Path, *below: str) -> list[str]:
    return [str(p.relative_to(run)) for p in files(run, *below)]


@tiers(few=2, many=40)
def test_readers_of_a_damaged_run_say_or_refuse(
    tried: settings, good_run: Path, tmp_path: Path
) -> None:
    top = names_of(good_run, "config.json", "env.json", "metrics.jsonl", "result.json")
    below = names_of(good_run, "checkpoints", "tokenizer", "model")
    verbs = ["report", "report", "export", "generate", "inspect", "plan", "import", "dry"]

    @tried
    @given(st.data(), st.sampled_from(verbs))
    def check(data: st.DataObject, verb: str) -> None:
        run = copy(good_run, tmp_path / "copy")
        reads = top if verb in ("report", "inspect", "plan", "dry") else top + below * 2
        harm(data, run, reads)
        before = {step: digest(run / "checkpoints" / step) for step in STEPS}
        words = {
            "export": ["export", run, tmp_path / "copy" / "out"],
            "generate": ["generate", run, "def ", "--tokens", 2],
            "inspect": ["inspect", run],
            "plan": ["plan", run, "--device", "cpu"],
            "report": ["report", run, "--out", tmp_path / "copy" / "report"],
            "import": [
                "import",
                run / "model",
                f"run.path={tmp_path / 'copy' / 'new'}",
                "--dry-run",
            ],
            "dry": ["train", run, "--dry-run"],
        }[verb]
        command(*words)
        assert {step: digest(run / "checkpoints" / step) for step in STEPS} == before

    check()


@tiers(few=3, many=40)
def test_a_damaged_run_is_resumed_rightly_or_refused(
    tried: settings, good_run: Path, tmp_path: Path
) -> None:
    good = {step: digest(good_run / "checkpoints" / step) for step in STEPS}
    weights = (good_run / "model" / "model.safetensors").read_bytes()
    checkpoints = names_of(good_run, "checkpoints")
    others = names_of(
        good_run, "config.json", "env.json", "metrics.jsonl", "result.json", "tokenizer"
    )

    @tried
    @given(st.data(), st.booleans())
    def check(data: st.DataObject, finished: bool) -> None:
        run = copy(good_run, tmp_path / "copy", *(() if finished else UNFINISHED))
        harm(data, run, checkpoints * 2 + others)
        model = run / "model" / "model.safetensors"
        kept = not model.exists() or model.read_bytes() == weights  # a swap may have reached it
        whole = {step for step in STEPS if digest(run / "checkpoints" / step) == good[step]}
        same = same_settings(run, good_run)
        found = command("train", run, "--resume")
        for step in whole:
            assert digest(run / "checkpoints" / step) == good[step], (step, found)
        if found.code == 0 and same and kept and model.is_file():
            assert model.read_bytes() == weights, found

    check()


def same_settings(run: Path, good: Path) -> bool:
    try:
        return json.loads((run / "config.json").read_text()) == json.loads(
            (good / "config.json").read_text()
        )
    except (OSError, ValueError):
        return False


@tiers(few=200, many=20_000)
def test_damaged_metadata_is_read_or_refused(
    tried: settings, good_run: Path, tmp_path: Path
) -> None:
    good = (good_run / "checkpoints" / STEPS[1] / ".metadata").read_bytes()

    @tried
    @given(damaged_bytes(good))
    def check(content: bytes) -> None:
        (tmp_path / ".metadata").write_bytes(content)
        try:
            assert isinstance(read_metadata(tmp_path), Metadata)
        except pickle.UnpicklingError as error:
            assert str(error)

    check()
