from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from muonscale.errors import StudyError
from muonscale.lab.fits.tables import RunTable, choose_baseline, read_table


def written(tmp_path: Path, text: str, name: str = "runs.csv") -> Path:
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "header", ["N,D,Loss", "params,tokens,loss", "parameters,training_tokens,val_loss"]
)
def test_columns_have_several_names(header: str, tmp_path: Path) -> None:
    table = read_table(written(tmp_path, f"\ufeff{header}\n1e8, 2e9 ,3.5\n\n1_000,20,2\n"))
    assert table.numbers("parameters").tolist() == [1e8, 1000]
    assert table.numbers("tokens").tolist() == [2e9, 20]
    assert table.numbers("loss").tolist() == [3.5, 2]
    assert table.name("flops") is None and len(table) == 2


def test_tabs_json_lines_and_quotes_are_read(tmp_path: Path) -> None:
    tabs = read_table(written(tmp_path, 'C\tL\tnote\n1e18\t3\t"a\nb"\n1e19\t2\tc\n', "a.tsv"))
    assert tabs.numbers("flops").tolist() == [1e18, 1e19] and tabs.labels("note") == ("a\nb", "c")
    lines = '{"flops": 1e18, "loss": 3}\n\n{"loss": 2, "flops": 1e19, "rule": "muon"}\n'
    table = read_table(written(tmp_path, lines, "a.jsonl"))
    assert table.numbers("flops").tolist() == [1e18, 1e19] and table.lines == (1, 3)


REFUSED = {
    "a suffix": ("runs.xlsx", "a", "'.xlsx'"),
    "nothing": ("a.csv", "", "no line with text"),
    "a NUL": ("a.csv", "N,loss\n1,\0\n", "line 2: NUL"),
    "a huge number": ("a.jsonl", '{"N": ' + "1" * 5000 + "}", "line 1: not JSON"),
    "a huge cell": ("a.csv", "N\n" + "1" * 200_000, "line 2: field larger"),
    "a header alone": ("a.csv", "N,loss\n", "has no rows"),
    "a name twice": ("a.csv", "N,N\n1,2\n", "a name of its own"),
    "a short row": ("a.csv", "N,loss\n1,2\n3\n", "line 3: 1 cells"),
    "two names for one thing": (
        "a.csv",
        "N,params,loss\n1,2,3\n",
        "N and params both name parameters",
    ),
    "no column": ("a.csv", "tokens,loss\n1,2\n", "no column for parameters"),
    "a word": ("a.csv", "N,loss\n1,2\nbig,3\n", "line 3, column N: 'big'"),
    "separated thousands": ("a.csv", 'N,loss\n"1,200",2\n', "'1,200' is not a number; write"),
    "a unit": ("a.csv", "N,loss\n1.5M,2\n", "separators of thousands and units"),
    "a key twice": (
        "a.jsonl",
        '{"N": 1, "loss": 2, "loss": 3}\n',
        "line 1: not JSON (a key occurs",
    ),
    "an empty cell": ("a.csv", "N,loss\n1,2\n,3\n", "line 3, column N: ''"),
    "a loss that diverged": ("a.csv", "N,loss\n1,nan\n", "line 2, column loss: 'nan'"),
    "zero": ("a.csv", "N,loss\n0,1\n", "'0' is not a positive"),
    "not JSON": ("a.jsonl", '{"N": 1, "loss": 2}\n{"N": \n', "line 2: not JSON"),
    "no object": ("a.jsonl", "[1, 2]\n", "line 1 is [1, 2]; every"),
    "null": ("a.jsonl", '{"N": null, "loss": 2}\n', "line 1, column N"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_is_refused(case: str, tmp_path: Path) -> None:
    name, text, said = REFUSED[case]
    with pytest.raises(StudyError) as error:
        table = read_table(written(tmp_path, text, name))
        table.numbers("parameters")
        table.numbers("loss")
    assert said in str(error.value) and name in str(error.value)


def test_text_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("N,loss,Größe\n".encode("latin-1"))
    with pytest.raises(StudyError, match="not UTF-8"):
        read_table(path)


def table(**columns: list[object]) -> RunTable:
    rows = len(next(iter(columns.values())))
    text = {name: tuple(map(str, cells)) for name, cells in columns.items()}
    return RunTable(Path("runs.csv"), text, tuple(range(2, rows + 2)))


def test_groups_keep_their_rows_and_lines() -> None:
    groups = table(loss=[1, 2, 3], rule=["muon", "adamw", "muon"]).split("rule")
    assert list(groups) == ["muon", "adamw"]
    assert groups["muon"].numbers("loss").tolist() == [1, 3] and groups["muon"].lines == (2, 4)
    assert list(table(loss=[1]).split(None)) == [""]


def test_groups_need_a_column_and_full_cells() -> None:
    with pytest.raises(StudyError, match="no column ruel; did you mean rule"):
        table(rule=["a"]).split("ruel")
    with pytest.raises(StudyError, match="line 3, column rule"):
        table(rule=["a", ""]).split("rule")


def test_the_baseline_is_adamw_unless_another_is_asked_for() -> None:
    assert choose_baseline(["muon", "AdamW"], None) == "AdamW"
    assert choose_baseline(["muon", "lion"], None) == "muon"
    assert choose_baseline(["muon", "adamw"], "muon") == "muon"
    with pytest.raises(StudyError, match="no group sgd"):
        choose_baseline(["muon", "adamw"], "sgd")


def test_select_takes_rows() -> None:
    chosen = table(loss=[1, 2, 3]).select(np.array([False, True, False]))
    assert chosen.columns == {"loss": ("2",)} and chosen.lines == (3,)
