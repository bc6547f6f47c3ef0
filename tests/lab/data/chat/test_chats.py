"""Conversations from files to marked rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from muonscale.errors import ConfigError, DataError
from muonscale.lab.config.load import load_config
from muonscale.lab.config.sections import DataSection
from muonscale.lab.data import prepare
from muonscale.lab.data.chat.conversations import conversation_text
from muonscale.lab.data.chat.store import PackedChats
from muonscale.lab.data.chat.template import PLAIN, find_template
from muonscale.lab.data.chat.tokenize import ChatEncoder
from muonscale.lab.data.loss_mask import BEGIN, IDS, NO_TARGET
from muonscale.lab.data.prepare import Corpus
from muonscale.lab.data.sources import read_documents
from muonscale.lab.data.tokenizer import load_tokenizer
from tests.lab.data.chat.chats import (
    CHATML,
    MARKED,
    characters_tokenizer,
    conversations,
    turns,
    write_chats,
)

HELLO = turns("Hi", "Ho!", "a é?", "b", system="Be")


def encoded(tmp_path: Path, template: str | None, chat: Any, **section: Any) -> tuple[str, str]:
    """Return the text of all tokens, and of the targets with a dot for every other token."""
    name = characters_tokenizer(tmp_path / "tokenizer", template)
    data = DataSection(path=tmp_path, format="chat", tokenizer=name, **section)
    tokenizer = load_tokenizer(name, own_begin=True)
    encoder = ChatEncoder(tokenizer, find_template(data, tokenizer))
    text = conversation_text(chat, field="messages", errors="strict", place="here")
    ((ids, inside),) = encoder.encode([text])
    shown = [tokenizer.decode([i]) if t else "." for i, t in zip(ids.tolist(), inside, strict=True)]
    return tokenizer.decode(ids), "".join(shown)


BY_HAND = (
    "<|start|>system\nBe<|end|>\n<|start|>user\nHi<|end|>\n<|start|>assistant\nHo!<|end|>\n"
    "<|start|>user\na é?<|end|>\n<|start|>assistant\nb<|end|>\n"
)
# the tokens: a marker is one, é is two, any other character is one
TARGETS = (
    "." * (1 + 7 + 2 + 1 + 1) + "." * (1 + 5 + 2 + 1 + 1) + "." * 11 + "Ho!<|end|>."
    + "." * (1 + 5 + 5 + 1 + 1) + "." * 11 + "b<|end|>."
)  # fmt: skip


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_the_assistants_words_and_the_end_of_its_turn_are_targets(
    tmp_path: Path, template: str
) -> None:
    assert encoded(tmp_path, template, HELLO) == (BY_HAND, TARGETS)


def test_a_template_file_takes_the_place_of_the_tokenizers(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(MARKED)
    assert encoded(tmp_path, "{{ nonsense }}", HELLO, chat_template=file) == (BY_HAND, TARGETS)


def test_the_plain_template_by_hand(tmp_path: Path) -> None:
    text, targets = encoded(tmp_path, None, HELLO, chat_template="plain")
    assert text == (
        "<|begin|>System:\nBe\nUser:\nHi\nAssistant:\nHo!<|endoftext|>\n"
        "User:\na é?\nAssistant:\nb<|endoftext|>\n"
    )
    before = 1 + len("System:\nBe\nUser:\nHi\nAssistant:\n")
    between = 1 + len("User:\na e?\nAssistant:\n") + 1
    assert targets == "." * before + "Ho!<|endoftext|>" + "." * between + "b<|endoftext|>."


def test_special_tokens_that_a_message_spells_stay_text(tmp_path: Path) -> None:
    chat = turns("say <|end|> \U000f0000", "<|end|><|start|>x")
    for template in (CHATML, MARKED):
        text, targets = encoded(tmp_path, template, chat)
        assert text == (
            "<|start|>user\nsay <|end|> \U000f0000<|end|>\n<|start|>assistant\n"
            "<|end|><|start|>x<|end|>\n"
        )
        # spelled ones are a token for every character: 7 and 9; the one that ends the turn is one
        said = len("user\nsay <|end|> ") + 4
        assert targets == "." * (1 + said + 2 + 11) + "<|end|><|start|>x<|end|>."
        data = DataSection(path=tmp_path, format="chat", tokenizer=str(tmp_path / "tokenizer"))
        tokenizer = load_tokenizer(str(data.tokenizer))
        encoder = ChatEncoder(tokenizer, find_template(data, tokenizer))
        ((ids, _),) = encoder.encode([json.dumps(chat)])
        ends = int(tokenizer.convert_tokens_to_ids("<|end|>"))
        assert np.count_nonzero(ids == ends) == 2


def test_a_template_whose_beginning_changes_is_refused(tmp_path: Path) -> None:
    last = "{% for m in messages %}{{ 'LAST ' if loop.last }}{{ m['content'] }}\n{% endfor %}"
    with pytest.raises(DataError, match="differently") as caught:
        encoded(tmp_path, last, HELLO)
    for part in (f"data.tokenizer={tmp_path}", "{% generation %}", "data.chat_template", "Be"):
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        (None, ["has no chat template", "data.chat_template=plain"]),
        ("{{ raise_exception('no system here') }}", ["no system here", "'system: Be'"]),
        ("{{ messages[9]['x'] }}", ["refuses", "data.chat_template", "UndefinedError: list"]),
        ("{{ raise_exception('') }}", ["refuses", "TemplateError"]),
        ("{{ 1 / 0 }}", ["refuses", "ZeroDivisionError: division"]),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", ["refuses", "RecursionError"]),
        ("{% for", ["'system: Be'"]),
        ("x{% generation %}{% endgeneration %}", ["marks no words", "{% endgeneration %}"]),
    ],
)
def test_templates_that_do_not_work_are_named(
    tmp_path: Path, template: str | None, parts: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        encoded(tmp_path, template, HELLO)
    for part in parts:
        assert part in str(caught.value)


def test_a_missing_template_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jinja cannot be read.*plain"):
        encoded(tmp_path, CHATML, HELLO, chat_template=tmp_path / "none.jinja")


GOOD = turns("q", "a")
MALFORMED: list[tuple[Any, str]] = [
    ("text", "'messages' is str"),
    (None, "'messages' is null"),
    ([], "no turn of the assistant"),
    (turns("q"), "no turn of the assistant"),
    (["q"], "message 1 of 'messages'"),
    ([*GOOD, {"role": "robot", "content": "x"}], "role 'robot'"),
    ([*GOOD, {"from": "robot", "value": "x"}], "'from' is 'robot' in message 3"),
    ([*GOOD, {"role": "assistant", "tool_calls": [{"id": "1"}]}], "no function with a name"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "a content part in message 1"),
    ([*GOOD, {"role": "user"}], "no 'content' in message 3"),
    ([*GOOD, {"content": "x", "from": 1}], "no 'role' in message 3"),
    ([*GOOD, {"role": "user", "content": None}], "'content' is null in message 3"),
    ([*GOOD, {"role": "user", "content": ["x"]}], "a content part in message 3"),
    (turns("\ud800", "a"), "lone surrogate"),
]


@pytest.mark.parametrize(("value", "part"), MALFORMED)
def test_malformed_conversations_are_named(tmp_path: Path, value: Any, part: str) -> None:
    path = write_chats(tmp_path / "x.jsonl", [GOOD, value])
    with pytest.raises(DataError) as caught:
        list(read_documents(DataSection(path=path, format="chat", tokenizer="t")))
    assert part in str(caught.value) and f"{path}, line 2" in str(caught.value)


def test_json_lines_parquet_and_a_dataset_give_the_same_documents(tmp_path: Path) -> None:
    chats = conversations(5)
    lines = write_chats(tmp_path / "x.jsonl", chats)
    table = tmp_path / "parquet" / "x.parquet"
    table.parent.mkdir()
    pq.write_table(pa.table({"messages": chats, "id": list(range(5))}), table)
    found = [
        [document.text for document in read_documents(DataSection(**where, format="chat", tokenizer="t"))]
        for where in ({"path": lines}, {"path": table}, {"source": f"hf:{table.parent}"})
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]
    assert [json.loads(text) for text in found[0]] == chats
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"messages": [chats[0], None]}), bad)
    with pytest.raises(DataError, match="row 1"):
        list(read_documents(DataSection(path=bad, format="chat", tokenizer="t")))


def test_other_keys_and_their_order_do_not_make_another_conversation() -> None:
    plain = conversation_text(GOOD, field="m", errors="strict", place="")
    other = [{"id": 1, "content": m["content"], "role": m["role"]} for m in GOOD]
    assert conversation_text(other, field="m", errors="strict", place="") == plain


def test_text_files_and_bytes_beyond_the_limit(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("hello")
    with pytest.raises(DataError, match=r"accepts \.json, \.jsonl"):
        list(read_documents(DataSection(path=tmp_path, format="chat", tokenizer="t")))
    path = write_chats(tmp_path / "x.jsonl", [GOOD, GOOD[:2], GOOD])
    size = len(conversation_text(GOOD, field="m", errors="strict", place=""))
    section = DataSection(path=path, format="chat", tokenizer="t", max_bytes=2 * size + 5)
    assert [document.text[-3:] for document in read_documents(section)] == ['"}]'] * 2


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["data.format=chat"], "needs data.tokenizer"),
        (["data.format=chat", "data.tokenizer=t"], "python-stdlib holds no conversations"),
        (["data.chat_template=plain"], "data.format=chat"),
        (["data.format=chats"], "data.format='chats'"),
    ],
)
def test_settings_that_do_not_go_together(words: list[str], part: str) -> None:
    given = ["data.path=x"] if words == ["data.format=chat"] else []
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [*given, *words])
    assert part in str(caught.value)


def prepared(tmp_path: Path, chats: list[Any], **section: Any) -> Corpus:
    folder = tmp_path / "tokenizer"
    name = str(folder) if folder.exists() else characters_tokenizer(folder, CHATML)
    settings = {
        "path": write_chats(tmp_path / "x.jsonl", chats),
        "format": "chat",
        "tokenizer": name,
        "cache": tmp_path / "cache",
        "sequence_length": 200,
    }
    data = DataSection.model_validate(settings | section)
    return next(iter(prepare.prepare(data, seed=0, report=lambda *report: None).values()))


def row_texts(corpus: Corpus, row: Any) -> list[str]:
    """Cut a row where conversations begin, and decode it."""
    cuts = np.flatnonzero(row & BEGIN).tolist()
    assert cuts[:1] == [0]
    ends = [*cuts[1:], len(row)]
    return [
        corpus.tokenizer.decode((row[a:b] & IDS).tolist()) for a, b in zip(cuts, ends, strict=True)
    ]


def chatml(chat: list[dict[str, str]]) -> str:
    return "".join(f"<|start|>{m['role']}\n{m['content']}<|end|>\n" for m in chat)


def test_rows_hold_every_conversation_once_and_targets_are_the_assistants(tmp_path: Path) -> None:
    chats = conversations(60)
    corpus = prepared(tmp_path, [*chats, chats[3]])
    assert corpus.stats.duplicates == 1
    texts: list[str] = []
    said = 0
    for store in (corpus.train, corpus.validation):
        rows = store.rows(200)
        batch = rows.batch(np.arange(len(rows)))
        assert batch.dtype == np.int64 and batch.shape == (len(rows), 201)
        for row in batch:
            for text in row_texts(corpus, row):
                if set(text.split("<|endoftext|>")) != {""}:
                    texts.append(text)
            targets = row[(row & NO_TARGET) == 0]
            assert not (row & BEGIN)[(row & NO_TARGET) == 0].any()
            said += len(targets)
    assert sorted(texts) == sorted(map(chatml, chats))
    words = [m["content"] for chat in chats for m in chat if m["role"] == "assistant"]
    assert said == sum(len(text) + 1 for text in words)
    assert said == (corpus.stats.train.targets or 0) + (corpus.stats.validation.targets or 0)


def test_long_conversations_are_cut_and_those_without_targets_left_out(tmp_path: Path) -> None:
    chats = conversations(40)
    long = turns("question", "answer " * 60)
    late = turns("question " * 40, "answer")
    corpus = prepared(tmp_path, [*chats, long, late], validation=0.1)
    stores = (corpus.train, corpus.validation)
    found = {
        key: sum(store.rows(200).facts()[key] for store in stores) for key in ("cut", "left_out")
    }
    whole = [len(chatml(c).replace("<|start|>", "#").replace("<|end|>", "#")) for c in chats]
    assert found == {"cut": 1 + sum(size > 201 for size in whole), "left_out": 1}
    rows = [store.rows(200) for store in stores]
    texts = [t for r in rows for row in r.batch(np.arange(len(r))) for t in row_texts(corpus, row)]
    start = [text for text in texts if text.startswith("<|start|>user\nquestion")]
    assert start == [chatml(long)[: len(start[0])]] and 201 <= len(start[0]) < 230


def test_short_rows_without_any_target_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no conversation of the training split.*sequence_length=8"
    ):
        prepared(tmp_path, conversations(40), sequence_length=8)


def test_few_conversations_are_validation_whole_or_refused(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, conversations(8), validation=0.25)
    assert corpus.stats.train.documents + corpus.stats.validation.documents == 8
    with pytest.raises(DataError, match=r"^8 .*data.validation=0.01"):
        prepared(tmp_path, conversations(8), validation=0.01)


def test_the_template_is_part_of_the_fingerprint_and_of_the_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "mine.jinja"
    file.write_text(MARKED)
    chats = conversations(30)
    own, mine, plain = (
        prepared(tmp_path, chats, chat_template=template) for template in (None, file, "plain")
    )
    assert len({own.fingerprint, mine.fingerprint, plain.fingerprint}) == 3
    assert [c.tokenizer.chat_template for c in (own, mine, plain)] == [CHATML, MARKED, PLAIN]
    assert plain.tokenizer.bos_token == "<|begin|>"
    file.write_text(MARKED + " ")
    assert prepared(tmp_path, chats, chat_template=file).fingerprint != mine.fingerprint
    assert prepared(tmp_path, chats).fingerprint == own.fingerprint


def test_the_streams_do_not_depend_on_the_length(tmp_path: Path) -> None:
    short, long = (prepared(tmp_path, conversations(30), sequence_length=n) for n in (150, 300))
    assert short.folder == long.folder
    rows = [short.train.rows(150), long.train.rows(300)]
    assert all(isinstance(r, PackedChats) for r in rows) and len(rows[0]) > len(rows[1])


def test_a_mixture_of_text_and_chats(tmp_path: Path) -> None:
    name = characters_tokenizer(tmp_path / "tokenizer", CHATML)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{number} lines of text\n" for number in range(400)))
    chats = write_chats(tmp_path / "x.jsonl", conversations(30))
    mixture = [{"path": text, "weight": 1}, {"path": chats, "weight": 1, "format": "chat"}]
    data = DataSection.model_validate(
        {"mixture": mixture, "tokenizer": name, "cache": tmp_path / "cache", "sequence_length": 100}
    )
    plain, chat = prepare.prepare(data, seed=0, report=lambda *report: None).values()
    assert plain.tokenizer.chat_template == chat.tokenizer.chat_template == CHATML
    assert plain.train.rows(100).batch(np.arange(3)).max() < 300
    assert (chat.train.rows(100).batch(np.arange(3))[:, 0] & BEGIN).all()
