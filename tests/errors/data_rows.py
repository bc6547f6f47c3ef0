"""Mistakes in corpora, tokenizers, run folders, checkpoints and what is read of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from muonscale.cli.arguments import split_arguments
from muonscale.cli.export import split_source
from muonscale.errors import CheckpointError, ConfigError, DataError
from muonscale.lab.config.load import load_config
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.chat.conversations import conversation_text
from muonscale.lab.data.ngram import fit_ngrams
from muonscale.lab.data.prepare import prepare
from muonscale.lab.data.sources import identify, read_documents
from muonscale.lab.data.tokenizer import load_tokenizer
from muonscale.lab.models.convert import check_target, load_hf
from muonscale.lab.models.hub import checkpoint_folder
from muonscale.lab.models.loss import mean_loss
from muonscale.lab.models.moe.gate_scale import gate_scale
from muonscale.lab.models.pretrained import weight_files
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.report.loss_figure import write_loss_figure
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.checkpoint import save_checkpoint, whole_checkpoint
from muonscale.lab.training.export import export, find_checkpoint, run_tokenizer, shape_of
from muonscale.lab.training.setup import resolve_device
from tests.errors.row import Row

C, D, K = ConfigError, DataError, CheckpointError


def corpus(content: bytes | None, name: str = "a.txt", **keys: Any) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / "data").mkdir()
        if content is not None:
            (folder / "data" / name).write_bytes(content)
        return list(read_documents(DataSection(path=folder / "data", **keys)))

    return call


def parquet(values: list[Any], column: str = "text", **keys: Any) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        pq.write_table(pa.table({column: values}), folder / "a.parquet")
        return list(read_documents(DataSection(path=folder / "a.parquet", **keys)))

    return call


def chat(value: Any) -> Callable[[Path], object]:
    return lambda _: conversation_text(value, field="messages", errors="strict", place="row 3")


def turn(**item: Any) -> list[Any]:
    return [{"role": "user", "content": "Hi"} | item, {"role": "assistant", "content": "Ho"}]


def prepared(text: str, **keys: Any) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / "a.txt").write_text(text)
        data = DataSection(path=folder / "a.txt", cache=folder / "cache", **keys)
        return prepare(data, seed=0, report=lambda *_: None)

    return call


def tokenizer(content: str, name: str = "t.json") -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        (folder / name).write_text(content)
        return load_tokenizer(str(folder / name if name == "t.json" else folder))

    return call


def run(call: Callable[[RunFolder], object], **files: str) -> Callable[[Path], object]:
    """Give a run folder with the files, `_` in their names being the dot."""

    def with_files(folder: Path) -> object:
        for name, content in files.items():
            (folder / name.replace("_", ".")).write_text(content)
        return call(RunFolder(folder))

    return with_files


def lock(folder: RunFolder) -> None:
    with folder.locked(), folder.locked():
        pass


def checkpoint(then: Callable[[Path], object]) -> Callable[[Path], object]:
    def call(folder: Path) -> object:
        root = folder / "checkpoints"
        save_checkpoint(root, 5, {"model": {}}, {"step": 5}, Processes(), keep=1)
        return then(folder)

    return call


def cut(folder: Path) -> Path:
    facts = folder / "checkpoints" / "step-00000005" / "facts.json"
    facts.write_text("{")
    return folder


def silent(_: str) -> None: ...


METRICS = '{"kind": "train", "step": 1}\n'
ROWS: dict[str, Row] = {
    # corpora
    "no path": Row(D, ("nowhere", "data.path"), lambda f: list(read_documents(DataSection(path=f / "nowhere")))),
    "no states": Row(D, ("nowhere", "data.path"), lambda f: identify(DataSection(path=f / "nowhere"))),
    "a device": Row(D, ("/dev/null", "data.path"), lambda _: list(read_documents(DataSection(path=Path("/dev/null"))))),
    "no files": Row(D, ("data.path",), corpus(None)),
    "empty": Row(D, ("data.path",), corpus(b"")),
    "a source": Row(D, ("'python-stdlb'", "python-stdlib"), lambda _: list(read_documents(DataSection(source="python-stdlb")))),
    "UTF-8": Row(D, ("a.txt", "UTF-16"), corpus(b"\xff\xfea")),
    "JSON": Row(D, ("line 1",), corpus(b"{", "a.jsonl")),
    "JSON array": Row(D, ("JSON int", "record 1"), corpus(b"[1]", "a.jsonl")),
    "field": Row(D, ("no 'text'", "'txt'", "data.field"), corpus(b'{"txt": "a"}', "a.jsonl")),
    "no text": Row(D, ("int",), corpus(b'{"text": 5}', "a.jsonl")),
    "surrogate": Row(D, (r"'\ud800'", "data.errors=replace"), corpus(rb'{"text": "\ud800"}', "a.jsonl")),
    "parquet": Row(D, ("a.parquet",), corpus(b"PAR1", "a.parquet")),
    "column": Row(D, ("'text' of",), parquet([1, 2])),
    "no column": Row(D, ("no 'text'", "'txt'"), parquet(["a"], "txt")),
    "chat text": Row(D, ("a.txt", ".jsonl"), corpus(b"a", format="chat", tokenizer="t")),
    "chat parquet": Row(D, ("no 'messages'", "'txt'"), parquet(["a"], "txt", format="chat", tokenizer="t")),
    "messages": Row(D, ("'messages' is", "row 3"), chat(5)),
    "a message": Row(D, ("row 3", "role"), chat([5])),
    "no role": Row(D, ("no 'role'", "row 3"), chat([{"content": "a"}])),
    "content": Row(D, ("'content' is",), chat(turn(content=5))),
    "role": Row(D, ("'robot'", "assistant"), chat(turn(role="robot"))),
    "no answer": Row(D, ("no turn of the assistant",), chat(turn()[:1])),
    "only spaces": Row(D, ("data.sequence_length=256", "data.validation"), prepared("a", vocab_size=257)),
    "template": Row(D, ("nowhere.jinja", "plain"), lambda f: prepared_chat(f)),
    # tokenizers
    "no tokenizer": Row(D, ("./nowhere.json",), lambda _: load_tokenizer("./nowhere.json")),
    "broken tokenizer": Row(D, ("t.json",), tokenizer("{")),
    "broken folder": Row(D, ("cannot be loaded",), tokenizer("{", "tokenizer.json")),
    "no end": Row(D, ("end-of-text", "</s>"), tokenizer(json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}))),
    # evaluation and models
    "no validation": Row(D, ("0 validation", "data.validation"), lambda _: mean_loss(0.0, 0)),
    "no pairs": Row(D, ("got 0",), lambda _: fit_ngrams([], 5)),
    "token ids": Row(D, ("[0, 3)", "9"), lambda _: fit_ngrams([np.array([[1, 9]])], 3)),
    "gate": Row(C, ("k=5", "4"), lambda _: gate_scale(4, 5)),
    "no checkpoint": Row(K, ("no config.json", "export"), lambda f: load_hf(f)),
    "broken checkpoint": Row(K, ("cannot be loaded",), run(lambda r: load_hf(r.path), config_json="{}")),
    "a place": Row(K, ("not an exported model",), run(lambda r: check_target(r.path), a_txt="x")),
    "no folder": Row(K, ("./nowhere",), lambda _: checkpoint_folder("./nowhere")),
    "no weights": Row(K, ("model.weights", "nowhere"), lambda f: weight_files(f / "nowhere")),
    "other weights": Row(K, ("model.safetensors",), lambda f: weight_files(f)),
    "index": Row(K, ("cannot be read",), run(lambda r: weight_files(r.path), model_safetensors_index_json="{")),
    "no shards": Row(K, ("lacks 1 of its 1",), run(lambda r: weight_files(r.path), model_safetensors_index_json='{"weight_map": {"a": "b.safetensors"}}')),
    # run folders and checkpoints
    "result": Row(K, ("result.json",), run(lambda r: r.result(), result_json="[")),
    "result list": Row(K, ("[1]", "a JSON object"), run(lambda r: r.result(), result_json="[1]")),
    "config": Row(K, ("config.json",), run(lambda r: r.saved_config())),
    "another config": Row(K, ("['a']", "`run`"), run(lambda r: r.saved_config(), config_json='{"a": 1}')),
    "environment": Row(K, ("env.json",), run(lambda r: r.environment(), env_json="null")),
    "exists": Row(K, ("run.path=FOLDER",), run(lambda r: r.check_free(resume=False), a_txt="x")),
    "no run": Row(K, ("run.path=FOLDER",), run(lambda r: r.check_free(resume=True), a_txt="x")),
    "another run": Row(K, ("optimizer.lr", "--resume"), run(lambda r: r.check_same(load_config("demo")), config_json='{"run": {}}')),
    "held": Row(K, ("run.path=FOLDER",), run(lock)),
    "not writable": Row(K, ("/proc/run", "run.path=FOLDER"), lambda _: RunFolder(Path("/proc/run")).locked().__enter__()),
    "not created": Row(K, ("/proc/run", "run.path=FOLDER"), lambda _: RunFolder(Path("/proc/run")).create(load_config("demo"))),
    "no metrics": Row(K, ("metrics.jsonl",), lambda f: write_loss_figure(f)),
    "no records": Row(K, ("metrics.jsonl",), run(lambda r: write_loss_figure(r.path), metrics_jsonl="")),
    "not whole": Row(K, ("none of the 1", "run.path=FOLDER"), checkpoint(lambda f: whole_checkpoint(cut(f) / "checkpoints", silent))),
    "no checkpoints": Row(K, ("--resume",), run(lambda r: find_checkpoint(r, None, silent))),
    "no step": Row(K, ("step 7", "those of 5"), checkpoint(lambda f: find_checkpoint(RunFolder(f), 7, silent))),
    "damaged step": Row(K, ("is damaged",), checkpoint(lambda f: find_checkpoint(RunFolder(cut(f)), 5, silent))),
    "dtype": Row(C, ("--dtype int8", "bfloat16"), lambda f: export(RunFolder(f), None, f, dtype="int8", max_shard_size="5GB", report=silent)),
    "shard size": Row(C, ("--max-shard-size 5", "GB"), lambda f: export(RunFolder(f), None, f, dtype="float32", max_shard_size="5 apples", report=silent)),
    "no tokenizer of a run": Row(K, ("no folder `tokenizer`", "--resume"), run(lambda r: run_tokenizer(r))),
    "a model": Row(K, ("env.json",), lambda f: shape_of({"model_type": "none"}, f)),
    "device": Row(C, ("run.device=cuda",), lambda _: resolve_device("cuda")),
    # words on the command line
    "recipes": Row(C, ("a and b",), lambda _: split_arguments(["a", "b"])),
    "step": Row(C, ("'x'", "RUN@STEP"), lambda _: split_source("run@x")),
}  # fmt: skip


def prepared_chat(folder: Path) -> object:
    from muonscale.lab.data.chat.template import read_template

    data = DataSection(
        path=folder, format="chat", tokenizer="t", chat_template=folder / "nowhere.jinja"
    )
    return read_template(data)
