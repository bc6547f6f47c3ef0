"""Files of other people run no code, whichever command reads them."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata

from muonscale.errors import CheckpointError
from muonscale.lab.data.tokenizer_files import read_tokenizer
from muonscale.lab.files import size_and_hash
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.training.checkpoint import find_damage, load_tensors, save_checkpoint
from muonscale.lab.training.checkpoint_reader import read_metadata
from tests.conftest import Muonscale


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A folder that exists only if hostile code ran."""
    return tmp_path / "executed"


def replace_with(checkpoint: Path, name: str, content: bytes) -> None:
    """Replace a file of a checkpoint, and enter it into the manifest as its writer would."""
    (checkpoint / name).write_bytes(content)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest[name] = size_and_hash(checkpoint / name)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def checkpoints(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").iterdir())


def test_the_pickle_of_these_tests_runs_code(trace: Path) -> None:
    pickle.loads(pickle.dumps(Hostile(trace)))
    assert trace.exists()


COMMANDS: dict[str, Callable[[Path], list[Any]]] = {
    "export": lambda run: ["export", run, run.parent / "out"],
    "export a step": lambda run: ["export", f"{run}@12", run.parent / "out"],
    "eval": lambda run: ["eval", run],
    "eval a step": lambda run: ["eval", f"{run}@12"],
    "resume": lambda run: ["train", run, "--resume"],
}


@pytest.mark.parametrize("words", COMMANDS.values(), ids=COMMANDS)
def test_metadata_of_a_foreign_run(
    words: Callable[[Path], list[Any]], finished: Path, trace: Path, muonscale: Muonscale
) -> None:
    (finished / "result.json").unlink()
    for checkpoint in checkpoints(finished):
        replace_with(checkpoint, ".metadata", pickle.dumps(Hostile(trace)))
    found = muonscale(*words(finished))
    assert not trace.exists()
    assert found.code == 2 and "mkdir" in found.out + found.err
    assert "Traceback" not in found.err


def test_the_number_of_a_memo_entry_costs_no_memory(tmp_path: Path) -> None:
    number = b"\x80\x04}r" + (2**24).to_bytes(4, "little")
    (tmp_path / ".metadata").write_bytes(number + b".")
    (tmp_path / "meta.pkl").write_bytes(number + b"X\x04\x00\x00\x00stoi}s.")
    tracemalloc.start()
    try:
        with pytest.raises(pickle.UnpicklingError, match="no metadata"):
            read_metadata(tmp_path)
        read_tokenizer(tmp_path / "meta.pkl")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_length_that_a_pickle_claims_costs_no_memory(tmp_path: Path) -> None:
    content = b"\x80\x05\x96" + (2**45).to_bytes(8, "little") + b"."
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError, match="bytearray"):
        read_metadata(tmp_path)


def saved(root: Path, values: dict[str, Any]) -> Path:
    tensors = {"model": {"w": torch.ones(3)}, "optimizer": values}
    save_checkpoint(root, 12, tensors, {"step": 12}, Processes(), keep=1)
    return root / "step-00000012"


def test_a_value_that_is_no_tensor(tmp_path: Path, trace: Path) -> None:
    folder = saved(tmp_path / "checkpoints", {"lr": Hostile(trace)})
    assert find_damage(folder) is None
    wanted = {"model": {"w": torch.zeros(3)}, "optimizer": {"lr": 0.0}}
    with pytest.raises(CheckpointError, match="mkdir"):
        load_tensors(folder, wanted, Processes())
    assert not trace.exists()


def test_values_that_optimizers_have_come_back(tmp_path: Path) -> None:
    values = {"lr": 0.02, "name": "hidden", "betas": (0.9, 0.95), "none": None, "on": True}
    folder = saved(tmp_path / "checkpoints", values)
    wanted = {"model": {"w": torch.zeros(3)}, "optimizer": dict.fromkeys(values)}
    load_tensors(folder, wanted, Processes())
    assert wanted["optimizer"] == values and torch.equal(wanted["model"]["w"], torch.ones(3))


def refused_metadata() -> dict[str, Any]:
    inside = _StorageInfo("../../secret.distcp", 0, 1)
    return {
        "a function of torch": pickle.dumps(torch.load),
        "an attribute of an allowed class": b"\x80\x04\x8c\x05torch\x8c\x0bSize.__new__\x93.",
        "eval": b"cbuiltins\neval\n(V1\ntR.",
        "no metadata": pickle.dumps({"a": 1}),
        "no tables": pickle.dumps(Metadata({})),
        "a file elsewhere": pickle.dumps(Metadata({}, storage_data={"a": inside})),
        "cut off": pickle.dumps(Metadata({}, storage_data={}))[:-5],
        "another layout": pickle.dumps(torch.sparse_coo),
        "empty": b"",
    }


@pytest.mark.parametrize("content", refused_metadata().values(), ids=refused_metadata())
def test_other_content_of_metadata(content: bytes, tmp_path: Path) -> None:
    (tmp_path / ".metadata").write_bytes(content)
    with pytest.raises(pickle.UnpicklingError):
        read_metadata(tmp_path)


@pytest.mark.parametrize("form", ["torch", "pickle"])
def test_an_optimizer_state(
    form: str, tiny: list[str], tmp_path: Path, trace: Path, muonscale: Muonscale
) -> None:
    state = {"state": {0: {"exp_avg": Hostile(trace)}}, "param_groups": [{"params": [0]}]}
    with (tmp_path / "state.pt").open("wb") as file:
        torch.save(state, file) if form == "torch" else pickle.dump(state, file)
    found = muonscale("train", *tiny, f"optimizer.state={tmp_path / 'state.pt'}")
    assert found.code == 2 and "optimizer.state" in found.err
    assert not trace.exists()


def foreign_code(folder: Path, trace: Path) -> None:
    """Put modules into a model folder that transformers would run if it trusted them."""
    code = f"import os\nos.mkdir({str(trace)!r})\n"
    (folder / "hostile.py").write_text(code)
    for name, auto_map in (
        ("config.json", {"AutoConfig": "hostile.C", "AutoModelForCausalLM": "hostile.M"}),
        ("tokenizer_config.json", {"AutoTokenizer": ["hostile.T", None]}),
        ("generation_config.json", {}),
    ):
        tree = json.loads((folder / name).read_text()) | {"auto_map": auto_map}
        if name == "tokenizer_config.json":
            tree["tokenizer_class"] = "T"
        (folder / name).write_text(json.dumps(tree))


FOLDER_READERS: dict[str, Callable[[Path, list[str]], list[Any]]] = {
    "tokenizer": lambda folder, tiny: ["train", *tiny, f"data.tokenizer={folder}"],
    "weights": lambda folder, tiny: ["train", *tiny[2:3], *tiny[4:], f"model.weights={folder}"],
    "inspect": lambda folder, tiny: ["inspect", folder],
    "generate": lambda folder, tiny: ["generate", folder, "def ", "--tokens", 2],
    "eval": lambda folder, tiny: ["eval", folder, tiny[4], "data.sequence_length=32"],
    "import": lambda folder, tiny: ["import", folder, *tiny[4:6], "--dry-run"],
}


@pytest.mark.parametrize("whole", [True, False], ids=["with tokenizer.json", "without"])
@pytest.mark.parametrize("words", FOLDER_READERS.values(), ids=FOLDER_READERS)
def test_code_in_a_model_folder(
    words: Callable[[Path, list[str]], list[Any]],
    whole: bool,
    tiny: list[str],
    trained_once: Path,
    tmp_path: Path,
    trace: Path,
    muonscale: Muonscale,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained_once / "model", folder)
    foreign_code(folder, trace)
    if not whole:
        (folder / "tokenizer.json").unlink()
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))  # yes to every question
    found = muonscale(*words(folder, tiny))
    assert not trace.exists()
    assert found.code in (0, 2) and "Traceback" not in found.err


def test_weights_in_a_pickle(
    tmp_path: Path, trained_once: Path, trace: Path, muonscale: Muonscale
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(trained_once / "model", folder)
    (folder / "model.safetensors").unlink()
    torch.save({"w": Hostile(trace)}, folder / "pytorch_model.bin")
    found = muonscale("generate", folder, "def ", "--tokens", 2)
    assert found.code == 2 and not trace.exists()
