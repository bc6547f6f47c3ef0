"""Every row of the tables of docs/data.md."""

from __future__ import annotations

import base64
import bz2
import gzip
import io
import json
import lzma
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonscale.errors import DataError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.folders import SkippedFiles
from muonscale.lab.data.prepare import Corpus, prepare
from muonscale.lab.data.sources import known_bytes, read_documents
from muonscale.lab.data.tokenizer import END_OF_TEXT, load_tokenizer, token_bytes, train_tokenizer

PAGE = Path(__file__).parents[3] / "docs" / "data.md"
ROWS = [{"n": "1", "text": 'o,n"e\nx'}, {"n": "2", "text": "zw\u00f6lf"}]
TEXTS = [row["text"] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows_of(title: str) -> list[str]:
    """First cells of the first table under a heading of the page."""
    section = PAGE.read_text("utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    lines = section.split("|---|---|\n")[1].split("\n\n")[0].splitlines()
    return [line.split(" | ")[0].removeprefix("| ") for line in lines]


def texts(path: Any, left_out: SkippedFiles | None = None, **options: Any) -> list[str]:
    found: list[str] = []
    for document in read_documents(DataSection(path=path, **options), left_out):
        found[len(found) if document.first else len(found) - 1 :] = [
            ("" if document.first else found[-1]) + document.text
        ]
    return found


def separated(separator: str) -> bytes:
    quoted = TEXTS[0].replace('"', '""')
    return f'n{separator}text\r\n1{separator}"{quoted}"\r\n\r\n2{separator}{TEXTS[1]}'.encode()


def table() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def arrow(maker: Any) -> bytes:
    sink = io.BytesIO()
    with maker(sink, table().schema) as writer:
        writer.write_table(table(), max_chunksize=1)
    return sink.getvalue()


def parquet() -> bytes:
    sink = io.BytesIO()
    pq.write_table(table(), sink)
    return sink.getvalue()


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstd,
}
MEMBERS = {
    "./folder/a.jsonl": LINES,
    "b.txt": b"three",
    "c.png": b"\x89PNG",
    ".hidden": b"x",
    "d.parquet": parquet(),
    "e.txt.gz": gzip.compress(b"four"),
}


def tar(members: dict[str, bytes] = MEMBERS) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members.items():
            item = tarfile.TarInfo(name)
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return sink.getvalue()


def archive(name: str) -> bytes:
    if name == ".zip":
        sink = io.BytesIO()
        with zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as file:
            for member, content in MEMBERS.items():
                file.writestr(member, content)
        return sink.getvalue()
    kind = {".tgz": "gz", ".tar": ""}.get(name, name.rsplit(".", 1)[-1])
    return COMPRESS[kind](tar()) if kind else tar()


def suffixes(row: str) -> list[str]:
    return [word.strip("`,") for word in row.split() if word.startswith("`.")]


FILES: dict[str, Callable[[str], bytes]] = {
    "`.txt`, `.md`, `.py`, any other suffix": lambda _: TEXTS[0].encode(),
    "`.jsonl`, `.ndjson`, `.json` with an object on each line": lambda _: LINES,
    "`.json` with an array": lambda _: json.dumps(ROWS, indent=2).encode(),
    "`.csv`, `.tsv`, `.psv`": lambda name: separated({"c": ",", "t": "\t", "p": "|"}[name[1]]),
    "`.parquet`": lambda _: parquet(),
    "`.arrow`, `.feather`": lambda name: arrow(
        pa.ipc.new_file if name == ".feather" else pa.ipc.new_stream
    ),
    "`.tar`, `.zip`, `.tar.gz`, `.tgz`, `.tar.bz2`, `.tar.xz`, `.tar.zst`": archive,
}


@pytest.mark.parametrize(("row", "suffix"), [(row, s) for row in FILES for s in suffixes(row)])
def test_a_file_is_read_by_its_suffix(row: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(FILES[row](suffix))
    left_out = SkippedFiles()
    found = texts(path, left_out)
    if FILES[row] is archive:
        assert found == [*TEXTS, "three", *TEXTS, "four"]
        assert left_out.counts == {"an image": 1}
    else:
        assert found == (TEXTS[:1] if "any other" in row else TEXTS)


@pytest.mark.parametrize("kind", COMPRESS)
@pytest.mark.parametrize("row", [row for row in FILES if FILES[row] is not archive])
def test_a_compressed_file_is_read(row: str, kind: str, tmp_path: Path) -> None:
    suffix = suffixes(row)[0]
    path = tmp_path / f"x{suffix}.{kind}"
    content = COMPRESS[kind](FILES[row](suffix))
    path.write_bytes(content)
    assert texts(path) == (TEXTS[:1] if "any other" in row else TEXTS)
    assert known_bytes(DataSection(path=path)) is None  # what is in it is longer
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match=r"damaged|cannot be read|can be read"):
        texts(path)


def saved(path: Path) -> list[Path]:
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(path / "one")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk(path / "split")
    return [path / "one", path / "split"]


def test_a_saved_data_set_is_read(tmp_path: Path) -> None:
    one, split = saved(tmp_path)
    assert texts(one) == texts(split) == TEXTS
    assert texts(split, split="test") == TEXTS[1:]
    found = read_documents(DataSection(source=f"hf:{split}"))
    assert [document.text for document in found] == TEXTS
    with pytest.raises(DataError, match="no 'body'"):
        texts(one, field="body")
    with pytest.raises(DataError, match=r"data\.split=none"):
        texts(split, split="none")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A folder as people have it."""
    for name, content in {
        ".gitignore": "build/\n*.log\n!kept.log",
        "README.md": "readme",
        "main.py": "code",
        "package.json": '{\n "name": "x"\n}',
        "sizes.csv": "a,b\n1,2\n",
        "logo.png": "\x89PNG",
        "core": "\0\0",
        "build/out.txt": "built",
        "a.log": "log",
        "kept.log": "kept",
        "sub/.gitignore": "*.txt",
        "sub/a.txt": "ignored",
        "sub/b.md": "below",
        ".git/config": "git",
    }.items():
        path = tmp_path / "repository" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return tmp_path / "repository"


def test_a_folder_is_read_without_what_is_no_text(repository: Path) -> None:
    left_out = SkippedFiles()
    assert texts(repository, left_out) == ["readme", "kept", "code", "below"]
    assert left_out.counts == {
        "ignored by .gitignore": 3,
        "binary data": 1,
        "an image": 1,
        "JSON without records": 1,
        "without 'text'": 1,
    }
    assert "7 files left out" in str(left_out) and "(logo.png)" in str(left_out)


def test_patterns_choose_the_files_of_a_folder(repository: Path) -> None:
    assert texts(repository, include=["*.md"]) == ["readme", "below"]
    assert texts(repository, include=["*.md"], exclude=["sub/"]) == ["readme"]
    assert "built" in texts(repository, gitignore=False)
    assert texts(f"{repository}/**/*.md") == ["readme", "below"]
    assert texts([str(repository / "main.py"), f"{repository}/*.md"]) == ["code", "readme"]
    assert texts(f"{repository}/s*") == ["below"]
    with pytest.raises(DataError, match="matches no file"):
        texts(f"{repository}/*.rst")
    with pytest.raises(DataError, match=r"holds no files; .*left out"):
        texts(repository, include=["*.rst"])
    with pytest.raises(DataError, match=r"data\.exclude"):
        texts(repository, exclude=["!"])


def test_records_without_the_field_among_others_with_it_are_refused(tmp_path: Path) -> None:
    for order in ("ab", "ba"):
        (tmp_path / f"{order[0]}.jsonl").write_text('{"text": "x"}\n')
        (tmp_path / f"{order[1]}.jsonl").write_text('{"body": "x"}\n')
        with pytest.raises(DataError, match=f"{order[1]}.jsonl"):
            texts(tmp_path)


def test_a_url_is_read_through_fsspec(tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe(
        {f"/corpus/{name}": content for name, content in MEMBERS.items() if "/" not in name}
    )
    assert texts("memory://corpus") == ["three", *TEXTS, "four"]
    assert texts("memory://corpus/*.txt") == ["three"]
    assert texts("memory://corpus/b.txt") == ["three"]
    (tmp_path / "x.txt").write_text("local")
    assert texts(f"file://{tmp_path}") == ["local"]
    for url, part in {"memory://nothing": "no such file", "nosuch://x": "cannot be read"}.items():
        with pytest.raises(DataError, match=part):
            texts(url)


# --- tokens

LENGTH = 300
TRAINED = train_tokenizer([f"a word {n}\n" for n in range(99)], 300)
IDS = np.array([0, *TRAINED.backend_tokenizer.encode("a word 7\n" * 40).ids] * 8)


def header(magic: int, version: int, ids: np.ndarray) -> bytes:
    return struct.pack("<3i", magic, version, ids.size).ljust(1024, b"\0") + ids.tobytes()


def nanogpt(path: Path, ids: np.ndarray) -> None:
    path.with_suffix(".bin").write_bytes(ids.astype("<u2").tobytes())


def llm_c(path: Path, ids: np.ndarray) -> None:
    wide = "train" in path.name
    made = (20240801, 7, "<u4") if wide else (20240520, 1, "<u2")
    path.with_suffix(".bin").write_bytes(header(made[0], made[1], ids.astype(made[2])))


def megatron(path: Path, ids: np.ndarray) -> None:
    path.with_suffix(".bin").write_bytes(ids.astype("<i4").tobytes())
    lengths = np.array([3, ids.size - 3], "<i4")
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 2, 3)
    index += lengths.tobytes() + np.array([0, 12], "<i8").tobytes()
    path.with_suffix(".idx").write_bytes(index + np.arange(3, dtype="<i8").tobytes())


def numpy(path: Path, ids: np.ndarray) -> None:
    np.save(path.with_suffix(".npy"), ids)


TOKENS: dict[str, Callable[[Path, np.ndarray], None]] = {
    "nanoGPT's `.bin`": nanogpt,
    "modded-nanogpt's and llm.c's `.bin`": llm_c,
    "Megatron-LM's `.bin` with `.idx`": megatron,
    "`.npy`": numpy,
}


def prepared(path: Path, **options: Any) -> Corpus:
    tokenizer = path.parent / "tokenizer"
    if not tokenizer.exists():
        TRAINED.save_pretrained(str(tokenizer))
    section = {"format": "tokens", "tokenizer": str(tokenizer), "sequence_length": 16} | options
    data = DataSection(path=path, cache=path.parent / "cache", **section)
    return next(iter(prepare(data, seed=0, report=lambda *_: None).values()))


@pytest.mark.parametrize("write", TOKENS.values(), ids=lambda write: write.__name__)
def test_tokens_are_read_with_validation_apart(write: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    write(folder / "x_train_1", IDS)
    write(folder / "x_val_0", IDS[:100])
    write(folder / "x_test_0", IDS[:50])
    corpus = prepared(folder)
    assert np.array_equal(corpus.train.read(0, len(corpus.train)), IDS)
    assert np.array_equal(corpus.validation.read(0, len(corpus.validation)), IDS[:100])
    stats = corpus.stats.train
    assert (stats.documents, stats.tokens, stats.bytes) == (8, IDS.size, 8 * 40 * len("a word 7\n"))
    assert corpus.stats.left_out == {"a test set": 1}


def test_tokens_without_validation_are_cut_at_an_end_of_text(tmp_path: Path) -> None:
    nanogpt(tmp_path / "data", IDS)
    corpus = prepared(tmp_path / "data.bin", validation=0.3)
    assert len(corpus.train) + len(corpus.validation) == IDS.size
    assert corpus.validation.read(0, 1) == [0]
    assert 0.15 <= len(corpus.validation) / IDS.size <= 0.3


def test_tokens_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.bin"
    for content, options, part in [
        (np.array([5, 300, 7] * 50, "<u2").tobytes(), {}, "the id 300 at 1"),
        (IDS.astype("<u4").tobytes(), {}, "data.token_dtype=uint32"),
        (IDS.astype("<u2").tobytes(), {"token_dtype": "uint32"}, "data.token_dtype"),
        (IDS.astype("<u2").tobytes() + b"\0", {}, "bytes"),
        (header(20240520, 1, IDS.astype("<u2"))[:-2], {}, "bytes"),
        (b"", {}, "no tokens"),
    ]:
        path.write_bytes(content)
        with pytest.raises(DataError, match=part):
            prepared(path, **options)
    np.save(tmp_path / "x.npy", np.ones((2, 2)))
    with pytest.raises(DataError, match="1-D integers"):
        prepared(tmp_path / "x.npy")
    megatron(tmp_path / "m", IDS)
    (tmp_path / "m.idx").write_bytes((tmp_path / "m.idx").read_bytes().replace(b"\x0c", b"\x10", 1))
    with pytest.raises(DataError, match="follow one another"):
        prepared(tmp_path / "m.bin")
    (tmp_path / "only").mkdir()
    nanogpt(tmp_path / "only" / "val", IDS)
    with pytest.raises(DataError, match="to train on"):
        prepared(tmp_path / "only")
    for options in ({"tokenizer": None}, {"max_bytes": 9}, {"path": None, "source": "hf:x"}):
        with pytest.raises(ValueError, match=r"data\."):
            DataSection(**{"path": "x", "format": "tokens", "tokenizer": "t"} | options)


# --- tokenizers

SENTENCES = ["def function(self): return 1", " Hello  World\n\tx", "zw\u00f6lf \U0001f600 1234"]


def gpt2_files(folder: Path) -> Path:
    trained = train_tokenizer([f"def function_{n}(self)\n" for n in range(99)], 320)
    trained.backend_tokenizer.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(vocab | {END_OF_TEXT: 0}))
    return folder / "vocab.json"


def tiktoken_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from muonscale.lab.data import tokenizer_files

    ranks = [bytes([n]) for n in range(256)] + [b"de", b"def", b" f", b" fu"]
    lines = (f"{base64.b64encode(token).decode()} {n}\n" for n, token in enumerate(ranks))
    (folder / "x.tiktoken").write_text("".join(lines))
    cl100k = tokenizer_files.ENCODINGS[100256]
    small = tokenizer_files.Encoding("small", cl100k.pattern, {END_OF_TEXT: 262})
    monkeypatch.setitem(tokenizer_files.ENCODINGS, len(ranks), small)
    return folder / "x.tiktoken"


def sentencepiece_file(folder: Path) -> Path:
    from transformers.convert_slow_tokenizer import import_protobuf

    proto = import_protobuf().ModelProto()
    special = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces = [
        *special,
        *((f"<0x{n:02X}>", 6) for n in range(256)),
        ("\u2581", 1),
        ("d", 1),
        ("e", 1),
    ]
    for number, (piece, kind) in enumerate([*pieces, ("de", 1), ("\u2581de", 1)]):
        proto.pieces.add(piece=piece, score=-float(number), type=kind)
    proto.trainer_spec.model_type = 2
    proto.trainer_spec.byte_fallback = True
    proto.normalizer_spec.add_dummy_prefix = False
    proto.normalizer_spec.remove_extra_whitespaces = False
    (folder / "x.model").write_bytes(proto.SerializeToString())
    return folder / "x.model"


def characters_file(folder: Path) -> Path:
    letters = sorted(set("".join(SENTENCES)))
    numbers = {letter: number for number, letter in enumerate(letters)}
    (folder / "meta.pkl").write_bytes(pickle.dumps({"stoi": numbers, "vocab_size": len(letters)}))
    return folder / "meta.pkl"


@pytest.mark.parametrize("make", [gpt2_files, tiktoken_file, sentencepiece_file, characters_file])
def test_tokenizers_of_other_programs_lose_nothing(
    make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make(tmp_path, monkeypatch) if make is tiktoken_file else make(tmp_path)
    tokenizer = load_tokenizer(str(path))
    for text in SENTENCES:
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == text
        assert token_bytes(tokenizer)[ids].sum() == len(text.encode())
    assert tokenizer.eos_token_id not in tokenizer(SENTENCES[0], add_special_tokens=False).input_ids
    assert token_bytes(tokenizer)[tokenizer.eos_token_id] == 0
    if make is not characters_file:  # a merge is used
        assert len(tokenizer("de", add_special_tokens=False).input_ids) == 1
        assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()
    if make is tiktoken_file:
        assert tokenizer.eos_token_id == 262


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"stoi": print}))
    with pytest.raises(DataError, match=r"builtins\.print"):
        load_tokenizer(str(tmp_path / "meta.pkl"))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({}))
    with pytest.raises(DataError, match="no vocabulary"):
        load_tokenizer(str(tmp_path / "meta.pkl"))


def test_other_ranks_of_tiktoken_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.tiktoken").write_text("IQ== 0\n")
    with pytest.raises(DataError, match=r"1 ranks.*cl100k_base \(100,256\)"):
        load_tokenizer(str(tmp_path / "x.tiktoken"))


# --- the page

OTHER_FILES = {
    "a folder of `save_to_disk`",
    "any of these as `.gz`, `.bz2`, `.xz`, `.zst`",
    "a folder",
    "a pattern such as `books/**/*.md`",
    "a list of paths",
    "a URL such as `s3://bucket/folder`",
}


def test_the_page_has_the_rows_that_are_tested_here() -> None:
    assert set(rows_of("Files")) == OTHER_FILES | FILES.keys()
    assert set(rows_of("Tokens")) == TOKENS.keys()
    assert len(rows_of("Tokenizers")) == 6 and len(rows_of("Chats")) == 5
