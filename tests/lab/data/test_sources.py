"""Files, folders, the Python library and Hugging Face folders as documents."""

from __future__ import annotations

import io
import json
import os
import re
import sysconfig
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muonscale.errors import DataError
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data import files, folders, sources
from muonscale.lab.data.folders import Patterns, SkippedFiles
from muonscale.lab.data.readers import Selection
from muonscale.lab.data.sources import identify, known_bytes, read_documents


def read(path: Path | None = None, **options: Any) -> list[tuple[str, str]]:
    """Names and whole texts of a corpus."""
    whole: list[tuple[str, str]] = []
    for document in read_documents(DataSection(path=path, **options)):
        if document.first:
            whole.append((document.name, document.text))
        else:
            whole[-1] = (whole[-1][0], whole[-1][1] + document.text)
    return whole


def failure(path: Path | None = None, **options: Any) -> str:
    with pytest.raises(DataError) as caught:
        read(path, **options)
    return str(caught.value)


def write_lines(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def stream_of(content: bytes) -> files.Stream:
    selection = Selection(SkippedFiles(), Patterns.of(DataSection(path="x")))
    convert = files.TextField("text", "strict")
    return files.Stream("x", "x", "x", io.BytesIO(content), convert, "strict", selection)


def test_folder_is_read_sorted_and_without_hidden_files(tmp_path: Path) -> None:
    for name in ("b/two.md", "a.txt", ".hidden/x.txt", "c", ".secret"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    assert read(tmp_path) == [
        ("a.txt", "text of a.txt"),
        ("b/two.md", "text of b/two.md"),
        ("c", "text of c"),
    ]


def test_linked_folder_is_read_and_a_loop_of_links_ends(tmp_path: Path) -> None:
    real, corpus = tmp_path / "real", tmp_path / "corpus"
    real.mkdir()
    corpus.mkdir()
    (real / "x.txt").write_text("far away")
    (corpus / "link").symlink_to(real)
    (real / "loop").symlink_to(corpus)
    assert ("link/x.txt", "far away") in read(corpus)


def test_line_ends_are_kept_and_a_byte_order_mark_is_not(tmp_path: Path) -> None:
    path = tmp_path / "dos.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    assert read(path) == [("dos.txt", "one\r\ntwo\r\n")]


@settings(deadline=None)  # a busy machine is no failure
@given(st.text(alphabet="a\n\u00e9\u20ac\U0001f600", max_size=60), st.integers(1, 9))
def test_large_file_in_pieces_is_one_unchanged_document(text: str, piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "PIECE_BYTES", piece_bytes)
        found = list(files.read_text(stream_of(text.encode())))
    assert "".join(document.text for document in found) == text
    assert [document.first for document in found] == [True] * bool(text) + [False] * max(
        0, len(found) - 1
    )


def test_bad_bytes_are_named_by_file_offset_line_and_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", 8)  # the error lies pieces after the first
    path = tmp_path / "bad.txt"
    path.write_bytes(b"first line\nsecond line\nthe \xff\xfe third\n")
    message = failure(path)
    for part in (str(path), "byte 27", "line 3", "ff", "data.errors=replace"):
        assert part in message
    assert read(path, errors="replace")[0][1].endswith("the \ufffd\ufffd third\n")


def tar_of_text() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.txt")
        member.size = 5
        archive.addfile(member, io.BytesIO(b"hello"))
    return buffer.getvalue()


TOKENS = np.arange(5, 60, dtype="<u2")  # of a small vocabulary, as nanoGPT writes them
FOREIGN = {
    "UTF-16": "text".encode("utf-16"),
    "gzip": b"\x1f\x8b\x08\x00\xff",
    "zstd": b"\x28\xb5\x2f\xfd\x00",
    "zip": b"PK\x03\x04rest",
    "bzip2": b"BZh91AY&SY",
    "tar": tar_of_text(),
    "PDF": b"%PDF-1.4\nall of it is ASCII",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "NumPy": b"\x93NUMPY\x01\x00v\x00",
    "a file of tokens": np.array([20240520, 1, 9], "<i4").tobytes() + TOKENS.tobytes(),
    "NUL byte": TOKENS.tobytes(),
    "NUL": "no mark".encode("utf-16-le"),
}


@pytest.mark.parametrize("errors", ["strict", "replace"])
@pytest.mark.parametrize("suffix", [".txt", "", ".jsonl"])
@pytest.mark.parametrize("kind", FOREIGN)
def test_files_that_are_not_text_are_refused_by_their_bytes(
    tmp_path: Path, kind: str, suffix: str, errors: Any
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(FOREIGN[kind])
    message = failure(path, errors=errors)
    assert str(path) in message and "data.errors" not in message
    assert kind in message or (suffix == ".jsonl" and "JSON" in message)


def test_a_word_that_begins_like_a_format_is_text(tmp_path: Path) -> None:
    for name, text in {
        "a": "BZh is no archive",
        "b": "GIF is a word",
        "c": "PK are letters",
    }.items():
        (tmp_path / name).write_text(text)
    assert [text[:2] for _, text in read(tmp_path)] == ["BZ", "GI", "PK"]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("t.XLSX", "a table"),
        ("a.7z", "an archive"),
        ("a.jsonl.lz4", "compressed"),
        ("train.bin", "tokens"),
        ("t.npy", "tokens"),
        ("m.safetensors", "a checkpoint"),
        ("p.jpeg", "an image"),
        ("b.epub", "a document"),
    ],
)
def test_files_that_are_not_text_are_refused_by_their_names(
    tmp_path: Path, name: str, what: str
) -> None:
    """All of these hold ASCII here, so that nothing but the name says what they are."""
    path = tmp_path / name
    path.write_text("id,text\n1,hello\n")
    message = failure(path, errors="replace")
    assert str(path) in message and what in message and "files of data.path" not in message
    with pytest.raises(DataError, match=re.escape(what)):  # also where tokens are cached
        identify(DataSection(path=path))


def test_files_of_a_folder_that_are_not_text_are_left_out_and_counted(tmp_path: Path) -> None:
    for name in ("a.txt", "train.bin", "val.bin", "c.png"):
        (tmp_path / name).write_text("text")
    (tmp_path / "data").write_bytes(b"a\0b")
    (tmp_path / "b.txt").write_bytes(b"\x89PNG\r\n\x1a\n")
    left_out = SkippedFiles()
    documents = list(read_documents(DataSection(path=tmp_path), left_out))
    assert [document.name for document in documents] == ["a.txt"]
    kinds = {"binary data, such as tokens": 2, "an image": 1, "a PNG image": 1, "binary data": 1}
    assert left_out.counts == kinds
    assert "5 files left out" in str(left_out) and "2 binary data, such as" in str(left_out)
    assert identify(DataSection(path=tmp_path))


def test_a_folder_without_text_is_refused_by_a_file_of_it(tmp_path: Path) -> None:
    (tmp_path / "b.txt").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert str(tmp_path / "b.txt") in failure(tmp_path)
    (tmp_path / "b.txt").rename(tmp_path / "b.png")
    assert "none of 1 files" in failure(tmp_path)


def test_text_in_another_encoding_is_not_replaced(tmp_path: Path) -> None:
    """A few replacement characters leave a text; half of them do not."""
    path = tmp_path / "x.txt"
    path.write_bytes(("\u0442\u0435\u043a\u0441\u0442 " * 2000).encode("koi8-r"))
    for errors in ("strict", "replace"):
        message = failure(path, errors=errors)
        assert "another encoding" in message and "data.errors" not in message
        assert f"{path}, byte 0, line 1" in message
    path.write_bytes(("ma\xefs ou\xef, un texte assez long " * 500).encode("latin-1"))
    assert "data.errors=replace" in failure(path)
    assert read(path, errors="replace")[0][1].startswith("ma\ufffds ou\ufffd, un")


@pytest.mark.parametrize("piece_bytes", [3, 1 << 20])
def test_the_records_of_a_json_array_are_documents(
    tmp_path: Path, piece_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "PIECE_BYTES", piece_bytes)
    path = tmp_path / "x.json"
    records = [{"text": f"[{n}] {{\u20ac"} for n in range(3)]
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), "utf-8")
    assert read(path) == [(f"x.json:{n + 1}", f"[{n}] {{\u20ac") for n in range(3)]
    path.write_text("[]")
    assert read(path) == []
    for content, part in {
        '[{"text": "a"}, {"text": ': "record 2",
        '[{"text": "a"}] x': "after",
        "[1]": "a JSON int",
        '[{"b": "a"}]': "no 'text'",
    }.items():
        path.write_text(content)
        assert part in failure(path)


def test_missing_empty_and_special_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "folder" / "pipe")
    assert "No such file" in failure(tmp_path / "none.txt")
    assert "is empty" in failure(tmp_path / "empty.txt")
    assert "neither a file nor a folder" in failure(Path("/dev/null"))
    assert "not a regular file" in failure(tmp_path / "folder")
    (tmp_path / "folder" / "pipe").unlink()
    assert "holds no files" in failure(tmp_path / "folder")


def test_failing_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.txt"
    path.write_text("text")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(folders, "open_regular", refuse)
    message = failure(path)
    for part in (str(path), "Permission denied", "data.path"):
        assert part in message


def test_json_lines_are_read_by_field(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.jsonl", {"body": "one", "n": 1}, {"body": "two"})
    path.write_text(path.read_text().replace("\n", "\n\n", 1))
    assert read(path, field="body") == [("x.jsonl:1", "one"), ("x.jsonl:3", "two")]


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ('{"text": ', ["line 2", "not JSON"]),
        ("[1]", ["line 2", "list", "one JSON object"]),
        ('{"body": "x", "id": 1}', ["line 2", "no 'text'", "'body', 'id'", "data.field"]),
        ('{"text": 5}', ["line 2", "'text' is int"]),
        ('{"text": null}', ["line 2", "'text' is null"]),
        ('{"text": "\\ud800"}', ["line 2", "lone surrogate", "data.errors=replace"]),
        ('{"text": "\xff"}', ["line 2", "not UTF-8", "byte 27"]),
    ],
)
def test_bad_json_line_is_named(tmp_path: Path, line: str, parts: list[str]) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line.encode("latin-1") + b"\n")
    message = failure(path)
    for part in (str(path), *parts):
        assert part in message


def test_lone_surrogate_is_replaced_on_request(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "x.json", {"text": "a\ud800b"})
    assert read(path, errors="replace")[0][1] == "a\ufffdb"


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_parquet_column_is_read_row_group_wise(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "x.parquet"
    texts = pa.array([f"row {n}" for n in range(5)]).cast(kind)
    pq.write_table(pa.table({"id": range(5), "text": texts}), path, row_group_size=2)
    assert read(path) == [(f"x.parquet:{n}", f"row {n}") for n in range(5)]


def test_bad_parquet_is_named(tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"id": [1, 2], "text": ["one", None]}), path)
    assert "'text' is null" in failure(path)
    assert "row 1" in failure(path)
    assert "no 'body'" in failure(path, field="body")
    assert "'id', 'text'" in failure(path, field="body")
    assert "int64" in failure(path, field="id")
    path.write_bytes(b"not parquet at all")
    assert "not a parquet file" in failure(path)


def test_reading_stops_at_max_bytes_between_characters(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("12345")
    (tmp_path / "b").write_text("12\u20ac45", encoding="utf-8")
    (tmp_path / "c").write_text("never")
    assert read(tmp_path, max_bytes=9) == [("a", "12345"), ("b", "12")]
    assert known_bytes(DataSection(path=tmp_path, max_bytes=9)) == 9
    assert known_bytes(DataSection(path=tmp_path)) == 17


def test_python_library_is_source_without_tests_and_tables() -> None:
    names = [name for name, _ in read(source="python-stdlib")]
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names)
    parts = {part for name in names for part in Path(name).parts}
    assert not parts & {"test", "tests", "idle_test", "encodings", "site-packages", "pydoc_data"}


def test_the_language_reference_is_prose() -> None:
    documents = dict(read(source="python-reference"))
    assert "assert" in documents and len(documents) > 50
    words = documents["assert"].split()
    assert sum(word.isalpha() for word in words) > len(words) / 2
    assert identify(DataSection(source="python-reference"))["python"]
    size = known_bytes(DataSection(source="python-reference"))
    assert size == sum(len(text.encode()) for text in documents.values())


def test_python_without_library_source_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    assert str(tmp_path) in failure(source="python-stdlib")


def test_library_file_in_another_coding_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    (tmp_path / "x.py").write_bytes(b"# -*- coding: latin-1 -*-\n# \xe9\n")
    assert read(source="python-stdlib") == [("x.py", "# -*- coding: latin-1 -*-\n# \u00e9\n")]


def test_unknown_source_gets_the_nearest_name() -> None:
    assert "python-stdlib" in failure(source="python-stdlb")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_lines(folder / "train.jsonl", *({"text": f"row {n}", "id": n} for n in range(3)))
    return folder


def test_local_hugging_face_folder_is_read(hub_folder: Path) -> None:
    source = f"hf:{hub_folder}"
    assert read(source=source) == [("0", "row 0"), ("1", "row 1"), ("2", "row 2")]
    assert "'text', 'id'" in failure(source=source, field="body")
    assert "'id' is int" in failure(source=source, field="id")
    assert "split 'test'" in failure(source=source, split="test")
    before = identify(DataSection(source=source))
    write_lines(hub_folder / "train.jsonl", {"text": "another"})
    assert identify(DataSection(source=source)) != before


def test_unreachable_hugging_face_dataset_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'no/such' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = failure(source="hf:no/such:small")
    assert "'no/such:small'" in message
    assert "Couldn't reach" in message
    assert "network" in message


def test_config_and_split_reach_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    calls: list[Any] = []

    def load(*args: object, **options: object) -> list[dict[str, str]]:
        calls.append((args, options))
        return [{"text": "row"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read(source="hf:org/name:small", split="validation") == [("0", "row")]
    assert calls == [(("org/name", "small"), {"split": "validation", "streaming": True})]


def test_identity_changes_with_a_file_and_not_by_looking(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("one")
    data = DataSection(path=path)
    before = identify(data)
    assert identify(data) == before
    path.write_text("two!")
    assert identify(data) != before
    assert sources.identify(DataSection(source="python-stdlib"))["python"]
