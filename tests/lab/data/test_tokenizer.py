"""Tokenizers: trained ones lose nothing, loaded ones are checked."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from muonscale.errors import DataError
from muonscale.lab.data.tokenizer import (
    END_OF_TEXT,
    load_tokenizer,
    open_tokenizer,
    tokenizer_identity,
    train_tokenizer,
)

TEXTS = [f"def function_{n}(self, value): return value + {n}\n" for n in range(200)]
TRAINED = train_tokenizer(TEXTS, 300)


def word_level(folder: Path, *special: str) -> Path:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@settings(deadline=None)  # a busy machine is no failure
@given(st.text())
def test_every_text_survives_a_trained_tokenizer(text: str) -> None:
    ids = TRAINED(text).input_ids
    assert TRAINED.decode(ids) == text
    assert all(0 <= token < len(TRAINED) for token in ids)


def test_trained_tokenizer_has_the_size_asked_for_and_ends_texts() -> None:
    assert len(TRAINED) == 300
    assert TRAINED.eos_token == TRAINED.bos_token == END_OF_TEXT
    assert TRAINED.eos_token_id == 0
    assert len(TRAINED("def function_7(self, value)").input_ids) < 15


def test_training_again_gives_the_same_tokenizer() -> None:
    again = train_tokenizer(iter(TEXTS), 300)
    assert again.backend_tokenizer.to_str() == TRAINED.backend_tokenizer.to_str()


def test_small_sample_gives_a_smaller_vocabulary() -> None:
    assert len(train_tokenizer(["abcdef"], 1000)) == 257


def test_saved_tokenizer_opens_equal(tmp_path: Path) -> None:
    TRAINED.save_pretrained(tmp_path)
    for loaded in (
        open_tokenizer(tmp_path),
        load_tokenizer(str(tmp_path)),
        load_tokenizer(str(tmp_path / "tokenizer.json")),
    ):
        assert loaded("def x: \n\u20ac").input_ids == TRAINED("def x: \n\u20ac").input_ids
        assert loaded.eos_token_id == loaded.bos_token_id == 0


def test_loaded_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    path = word_level(tmp_path, "</s>")
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    assert load_tokenizer(str(path)).backend_tokenizer.encode("a a a").ids == [0, 0, 0]


def test_end_of_text_comes_from_the_folders_config(tmp_path: Path) -> None:
    word_level(tmp_path, "<stop>")
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<stop>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path)).eos_token == "<stop>"


@pytest.mark.parametrize("as_folder", [False, True])
def test_tokenizer_without_end_of_text_is_refused(tmp_path: Path, as_folder: bool) -> None:
    path = word_level(tmp_path)
    with pytest.raises(DataError, match=re.escape(str(tmp_path))) as caught:
        load_tokenizer(str(tmp_path if as_folder else path))
    assert END_OF_TEXT in str(caught.value)


def test_missing_and_broken_tokenizers_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import transformers

    with pytest.raises(DataError, match=r"none\.json .*data\.tokenizer"):
        load_tokenizer(str(tmp_path / "none.json"))
    broken = tmp_path / "broken.json"
    broken.write_text("{}")
    with pytest.raises(DataError, match=r"broken\.json"):
        load_tokenizer(str(broken))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        load_tokenizer(str(tmp_path / "empty"))

    def unreachable(_: str, **options: object) -> None:
        raise OSError("no network\nmore")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", unreachable)
    with pytest.raises(DataError, match=r"gpt2 .*no network"):
        load_tokenizer("gpt2")


def test_identity_of_a_tokenizer_file_changes_with_it(tmp_path: Path) -> None:
    path = word_level(tmp_path)
    before = tokenizer_identity(str(path))
    assert tokenizer_identity(str(path)) == before
    word_level(tmp_path, "</s>")
    assert tokenizer_identity(str(path)) != before
    assert tokenizer_identity("gpt2") == "gpt2"
    assert tokenizer_identity(None) is None


@pytest.mark.parametrize("as_folder", [False, True])
def test_a_tokenizer_that_loads_and_cannot_be_copied_is_refused(
    as_folder: bool, tmp_path: Path
) -> None:
    TRAINED.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text())
    first, second = ("".join(tree["model"]["merges"][number]) for number in (0, 1))
    tree["model"]["vocab"][first] = tree["model"]["vocab"][second]  # an id for two tokens
    path.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=r"data\.tokenizer"):
        load_tokenizer(str(tmp_path if as_folder else path))


def test_an_id_that_would_fill_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before transformers reads the file: some releases copy the tokenizer while they do."""
    TRAINED.save_pretrained(tmp_path)
    monkeypatch.setattr(PreTrainedTokenizerFast, "from_pretrained", lambda *_: 1 / 0)
    path = tmp_path / "tokenizer.json"
    tree = json.loads(path.read_text(encoding="utf-8"))
    tree["model"]["vocab"][next(iter(tree["model"]["vocab"]))] = 2**25
    path.write_text(json.dumps(tree), encoding="utf-8")
    with pytest.raises(DataError, match=r"33,554,432.* 300 "):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("code", [errno.EIO, errno.EACCES])
def test_a_disk_that_fails_is_not_a_wrong_tokenizer(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json"
    train_tokenizer(["a text"], 300).save_pretrained(tmp_path)

    def fail(path: Path) -> str:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr("muonscale.lab.data.tokenizer.read_text", fail)
    for load in (load_tokenizer, lambda name: open_tokenizer(Path(name).parent)):
        with pytest.raises(DataError, match="remove the cause") as caught:
            load(str(path))
        assert "without it a tokenizer is trained" not in str(caught.value)
