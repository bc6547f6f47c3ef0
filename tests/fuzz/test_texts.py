"""Corpora, tokenizers and prompts of any bytes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import given, settings
from hypothesis import strategies as st

from muonscale.lab.config.sections import DataSection
from muonscale.lab.data.prepare import prepare
from muonscale.lab.data.tokenizer import load_tokenizer
from tests.fuzz.outcome import command, refused_or
from tests.fuzz.strategies import VALUES, damaged, damaged_bytes
from tests.fuzz.tiers import tiers

# Text that a byte-level tokenizer and a cache of pieces may trip over.
PIECES = st.sampled_from(
    ["", "\n", "\r\n", "\0", "a" * 3000, "\u202e", "\ufeff", "\u0301" * 50, "👩‍👩‍👧", "\U0010ffff", "<|endoftext|>",
     "\x1b[31m", "{{ x }}", "\u2028", "word ", "User: ", " " * 200, "\t", "\x85", "\U0001d49c", "ﷺ"]
)  # fmt: skip
TEXT = st.lists(st.one_of(PIECES, st.text(max_size=20)), max_size=12).map("".join)
LONG = st.builds(lambda text: (text or "x") * 60, TEXT)


def parquet(values: list[Any], name: str) -> bytes:
    try:
        table = pa.table({name: values})
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        table = pa.table({name: pa.array(list(map(repr, values)), pa.string())})
    sink = io.BytesIO()
    try:
        pq.write_table(table, sink)
    except pa.ArrowException:
        return b"PAR1"
    return sink.getvalue()


CHAT = {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Hi"},
                     {"role": "assistant", "content": "Ho " * 20}]}  # fmt: skip


def lines(records: list[Any]) -> bytes:
    return "\n".join(json.dumps(record) for record in records).encode()


SPOILT = st.one_of(
    st.just(CHAT),
    damaged(CHAT, st.one_of(VALUES, TEXT)),
    VALUES,
    st.fixed_dictionaries({"text": TEXT}),
)
# Tokens of a small vocabulary, most of which are UTF-8 with NUL bytes in it.
TOKENS = st.lists(st.integers(0, 300), min_size=200, max_size=400).map(
    lambda ids: np.array(ids, "<u2").tobytes()
)
CORPORA = st.one_of(
    st.tuples(st.just("a.txt"), TOKENS),
    st.tuples(st.just("a.txt"), st.one_of(LONG.map(lambda t: t.encode("utf-8", "replace")), st.binary(max_size=200))),
    st.tuples(st.just("a.jsonl"), st.lists(SPOILT, max_size=30).map(lines)),
    st.tuples(st.just("a.jsonl"), damaged_bytes(lines([{"text": "word " * 30}] * 30))),
    st.tuples(st.just("a.jsonl"), st.lists(st.fixed_dictionaries({"text": LONG}), max_size=4).map(lines)),
    st.tuples(st.just("a.parquet"), st.lists(st.one_of(VALUES, LONG), max_size=5).map(lambda v: parquet(v, "text"))),
    st.tuples(st.just("a.parquet"), st.lists(TEXT, max_size=5).map(lambda v: parquet(v, "text")).flatmap(damaged_bytes)),
    st.tuples(st.just("a.parquet"), damaged_bytes(parquet([CHAT["messages"]] * 5, "messages"))),
)  # fmt: skip


@tiers(few=12, many=300)
def test_a_corpus_is_prepared_or_refused(tried: settings, good_run: Path, tmp_path: Path) -> None:
    number = iter(range(10**9))

    @tried
    @given(CORPORA, st.sampled_from(["text", "text", "chat"]), st.sampled_from(["strict", "replace"]),
           st.booleans())  # fmt: skip
    def check(corpus: tuple[str, bytes], form: str, errors: str, own: bool) -> None:
        folder = tmp_path / str(next(number))
        folder.mkdir()
        (folder / corpus[0]).write_bytes(corpus[1])
        chat = {"chat_template": "plain"} if form == "chat" else {}
        given_one = (
            {"tokenizer": str(good_run / "tokenizer")} if own or chat else {"vocab_size": 260}
        )
        data = DataSection(
            path=folder, format=form, errors=errors, sequence_length=8, cache=folder / ".cache",
            **chat, **given_one,
        )  # fmt: skip

        def read() -> None:
            found = next(iter(prepare(data, seed=0, report=lambda *_: None).values()))
            assert found.stats.train.tokens > 0 and found.stats.validation.tokens > 0
            assert corpus[0] != "a.txt" or b"\0" not in corpus[1], "binary data was read as text"

        refused_or(read)

    check()


@tiers(few=20, many=500)
def test_a_tokenizer_loads_or_is_refused(tried: settings, good_run: Path, tmp_path: Path) -> None:
    names = ("tokenizer.json", "tokenizer_config.json")
    contents = {name: (good_run / "tokenizer" / name).read_bytes() for name in names}
    trees = {name: json.loads(content) for name, content in contents.items()}
    folder = tmp_path / "tokenizer"
    folder.mkdir()

    @tried
    @given(st.data(), st.sampled_from(names), st.booleans(), st.booleans())
    def check(data: st.DataObject, name: str, as_bytes: bool, alone: bool) -> None:
        for other, content in contents.items():
            (folder / other).write_bytes(content)
        spoilt = damaged_bytes(contents[name]) if as_bytes else damaged(trees[name]).map(json.dumps)
        drawn = data.draw(spoilt)
        (folder / name).write_bytes(drawn if isinstance(drawn, bytes) else drawn.encode())
        place = folder / "tokenizer.json" if alone else folder

        def use() -> None:
            tokenizer = load_tokenizer(str(place))
            assert tokenizer.eos_token_id is not None

        refused_or(use)

    check()


@tiers(few=5, many=60)
def test_any_prompt_is_continued_or_refused(tried: settings, good_run: Path) -> None:
    @tried
    @given(TEXT.map(lambda text: text.replace("\0", "")), st.sampled_from([0.0, 0.8, 1e-30, 1e30]))
    def check(prompt: str, temperature: float) -> None:
        found = command(
            "generate", good_run, "--tokens", 2, "--temperature", temperature, "--", prompt
        )
        assert found.out or found.err

    check()
