"""Mistakes in corpora, tokenizers, run folders, checkpoints and what is read of them."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from muonscale.cli.arguments import split_arguments
from muonscale.cli.export import split_source
from muonscale.errors import CheckpointError, ConfigError, DataError
from muonscale.lab.config.load import load_config
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.chat.conversations import conversation_text
from muonscale.lab.data.chat.template import ChatTemplate, find_template
from muonscale.lab.data.ngram import fit_ngrams
from muonscale.lab.data.prepare import prepare
from muonscale.lab.data.sources import identify, read_documents
from muonscale.lab.data.token_files import MEGATRON, copy_tokens, find_token_files
from muonscale.lab.data.tokenizer import load_tokenizer
from muonscale.lab.models.convert import check_target, load_hf
from muonscale.lab.models.hub import checkpoint_folder
from muonscale.lab.models.loss import mean_loss
from muonscale.lab.models.moe.gate_scale import gate_scale
from muonscale.lab.models.pretrained import weight_files
from muonscale.lab.parallel.processes import Processes
from muonscale.lab.report.loss_figure import write_loss_figure
from muonscale.lab.run_folder import RunFolder
from muonscale.lab.training.checkpoint import newest_intact_checkpoint, save_checkpoint
from muonscale.lab.training.export import export, find_checkpoint, run_tokenizer, shape_of
from muonscale.lab.training.setup import resolve_device
from tests.errors.row import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

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


WORDS = """{"version": "1.0", "added_tokens": [], "model":
    {"type": "WordLevel", "vocab": {%s}, "unk_token": "a"}}"""
"""A tokenizer.json with a vocabulary."""


def tokenizer(
    content: str | bytes, name: str = "t.json", **others: str
) -> Callable[[Path], object]:
    """Give a file of a tokenizer, and others beside it, the last `_` in their names being the dot."""

    def call(folder: Path) -> object:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        for other, text in others.items():
            (folder / ".".join(other.rsplit("_", 1))).write_text(text)
        is_file = name not in ("tokenizer.json", "config.json")
        return load_tokenizer(str(folder / name if is_file else folder))

    return call


def word_tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer.from_str(WORDS % '"</s>": 0, "a": 1')
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def tokens(
    content: bytes, name: str = "a.bin", index: bytes | None = None, *, whole: bool = False
) -> Callable[[Path], object]:
    """Give a file of tokens, or the folder with it, and an index."""

    def call(folder: Path) -> object:
        (folder / name).write_bytes(content)
        if index is not None:
            (folder / "a.idx").write_bytes(index)
        return find_token_files(token_section(folder if whole else folder / name))

    return call


def token_section(path: Path | str) -> DataSection:
    return DataSection(path=str(path), format="tokens", tokenizer="t")


def index(dtype: int, lengths: tuple[int, ...] = (), starts: tuple[int, ...] = ()) -> bytes:
    """Return an index of Megatron-LM."""
    head = MEGATRON + struct.pack("<QBQQ", 1, dtype, len(lengths), 0)
    return head + np.array(lengths, "<i4").tobytes() + np.array(starts, "<i8").tobytes()


def npy(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, values)
    return file.getvalue()


def remote_tokens(_: Path) -> object:
    import fsspec

    fsspec.filesystem("memory").pipe("/tokens/a.bin", b"aa")
    return find_token_files(token_section("memory://tokens/a.bin"))


def saved_dataset(folder: Path) -> object:
    for name in ("state.json", "dataset_info.json"):
        (folder / name).write_text("{")
    return list(read_documents(DataSection(path=folder)))


def identity(content: bytes, name: str, *, named: bool) -> Callable[[Path], object]:
    """Ask what identifies a corpus of one file, or of a folder with it."""

    def call(folder: Path) -> object:
        (folder / name).write_bytes(content)
        return identify(DataSection(path=folder / name if named else folder))

    return call


def rendered(jinja: str, tools: list[Any] | None = None) -> Callable[[Path], object]:
    template = ChatTemplate(jinja, "t.jinja", {}, ())
    return lambda _: template.render(turn(), tools)


def one_chat(folder: Path) -> object:
    (folder / "t.json").write_text(WORDS % '"</s>": 0, "a": 1')
    (folder / "a.jsonl").write_text(json.dumps({"messages": turn()}))
    data = DataSection(
        path=folder / "a.jsonl", cache=folder / "cache", format="chat", validation=0.5,
        tokenizer=str(folder / "t.json"), chat_template="plain",
    )  # fmt: skip
    return prepare(data, seed=0, report=lambda *_: None)


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
    "other encoding": Row(D, ("a.txt", "UTF-8"), corpus(b"\xe9" * 40)),
    "named file": Row(D, ("a.png",), identity(b"", "a.png", named=True)),
    "no text at all": Row(D, ("a.png", "none of 1 files"), identity(b"", "a.png", named=False)),
    "pattern": Row(D, ("*.md", "no file"), lambda f: list(read_documents(DataSection(path=str(f / "*.md"))))),
    "remote": Row(D, ("nofs://a",), lambda _: list(read_documents(DataSection(path="nofs://a")))),
    "remote folder": Row(D, ("memory://nowhere-at-all",), lambda _: list(read_documents(DataSection(path="memory://nowhere-at-all")))),
    "include": Row(D, ("data.include",), corpus(b"a", include=["!"])),
    "after the array": Row(D, ("a.json",), corpus(b'[{"text": "a"}] x', "a.json")),
    "cells": Row(D, ("3 cells instead of 2", "line 2"), corpus(b"text,b\n1,2,3\n", "a.csv")),
    "quotes": Row(D, ("line 2",), corpus(b'text\n"a"b\n', "a.csv")),
    "gzip": Row(D, ("a.txt.gz", "damaged"), corpus(gzip.compress(b"abc" * 99)[:-9], "a.txt.gz")),
    "zstd": Row(D, ("a.txt.zst",), corpus(b"\x28\xb5\x2f\xfdxxxxxxx", "a.txt.zst")),
    "tar": Row(D, ("a.tar",), corpus(b"abc" * 400, "a.tar")),
    "zip": Row(D, ("a.zip",), corpus(b"PK\3\4abc", "a.zip")),
    "a saved data set": Row(D, ("data",), saved_dataset),
    "content part": Row(D, ("'image'", "row 3", "'text'"), chat(turn(content=[{"type": "image"}]))),
    "from": Row(D, ("'robot'", "gpt", "row 3"), chat([{"from": "robot", "value": "a"}])),
    "tool call": Row(D, ("row 3", "name"), chat([turn()[0], {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}])),
    "tool calls": Row(D, ("not JSON", "row 3"), chat([turn()[0], {"role": "assistant", "content": "", "tool_calls": "["}])),
    "arguments": Row(D, ("list", "dict", "row 3"), chat([turn()[0], {"role": "assistant", "content": "", "tool_calls": [{"name": "a", "arguments": "[1]"}]}])),
    "tools of a template": Row(D, ("'tools'", "'user: Hi'", "data.chat_template=FILE"), rendered("{{ messages }}", tools=[{"name": "a"}])),
    "no marks": Row(D, ("'user: Hi'", "generation"), rendered("{% generation %}{% endgeneration %}")),
    "refusal": Row(D, ("'user: Hi'", "TemplateError: no"), rendered("{{ raise_exception('no') }}")),
    "later messages": Row(D, ("'user: Hi'", "generation"), rendered("{{ messages | length }}")),
    "no template": Row(D, ("data.tokenizer=t", "data.chat_template"), lambda _: find_template(DataSection(path="a", format="chat", tokenizer="t"), word_tokenizer())),
    "few chats": Row(D, ("1 conversations", "data.validation=0.5"), one_chat),
    # files of tokens
    "tokens elsewhere": Row(D, ("memory://tokens/a.bin", "local"), remote_tokens),
    "no file of tokens": Row(D, ("a.txt", ".bin"), tokens(b"a", "a.txt")),
    "no tokens for training": Row(D, ("1 for validation",), tokens(b"aa", "val.bin", whole=True)),
    "empty tokens": Row(D, ("a.bin", "no tokens"), tokens(b"")),
    "wide ids": Row(D, ("uint16", "data.token_dtype=uint32"), tokens(b"\1\0\0\0" * 9)),
    "half an id": Row(D, ("3 bytes", "uint16", "data.token_dtype"), tokens(b"abc")),
    "not NumPy": Row(D, ("a.npy",), tokens(b"abc", "a.npy")),
    "floats": Row(D, ("'float32'", "(2,)"), tokens(npy(np.ones(2, np.float32)), "a.npy")),
    "no index": Row(D, ("a.idx", "a.bin"), tokens(b"aa", index=b"MM")),
    "damaged index": Row(D, ("a.idx", "dtype 99"), tokens(b"aa", index=index(99))),
    "index of other tokens": Row(D, ("a.idx", "a.bin"), tokens(b"aabb", index=index(8, (2,), (6,)))),
    "ids of another tokenizer": Row(D, ("id 9", "vocabulary of 2"), lambda f: copy_tokens([(Path("a.bin"), np.array([0, 9]))], word_tokenizer(), f, "train", silent)),
    "template": Row(D, ("nowhere.jinja", "plain"), lambda f: prepared_chat(f)),
    # tokenizers
    "no tokenizer": Row(D, ("./nowhere.json",), lambda _: load_tokenizer("./nowhere.json")),
    "broken tokenizer": Row(D, ("t.json",), tokenizer("{")),
    "broken folder": Row(D, ("cannot be loaded",), tokenizer("{", "tokenizer.json")),
    "no end": Row(D, ("end-of-text", "</s>"), tokenizer(WORDS % '"a": 0')),
    "end of a folder": Row(D, ("eos_token", "</s>"), tokenizer(WORDS % '"a": 0', "tokenizer.json", tokenizer_config_json="{}")),
    "broken config": Row(D, ("cannot be loaded",), tokenizer("", "config.json")),
    "largest id": Row(D, ("t.json", "4,000,000,000"), tokenizer(WORDS % '"</s>": 0, "a": 4000000000')),
    "largest id of a folder": Row(D, ("4,000,000,000", "1,048,576 ids"), tokenizer(WORDS % '"</s>": 0, "a": 4000000000', "tokenizer.json")),
    "GPT-2": Row(D, ("vocab.json", "<|endoftext|>"), tokenizer('{"a": 0}', "vocab.json", merges_txt="")),
    "broken GPT-2": Row(D, ("vocab.json",), tokenizer("{", "vocab.json", merges_txt="")),
    "ranks": Row(D, ("1 ranks", "cl100k"), tokenizer("YQ== 0", "a.tiktoken")),
    "sentencepiece": Row(D, ("a.model",), tokenizer("", "a.model")),
    "characters": Row(D, ("meta.pkl", "'stoi'"), tokenizer(pickle.dumps({}), "meta.pkl")),
    "pickle": Row(D, ("meta.pkl", "builtins.print"), tokenizer(pickle.dumps(print), "meta.pkl")),
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
    "not whole": Row(K, ("none of the 1", "run.path=FOLDER"), checkpoint(lambda f: newest_intact_checkpoint(cut(f) / "checkpoints", silent))),
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
