"""Errors as users meet them: each is provoked, and its class, value and key are checked."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from traceback import walk_tb

import pytest
from pydantic import ValidationError

from muonscale.errors import MuonscaleError
from tests.errors import config_rows, data_rows, optim_rows, study_rows
from tests.errors.row import Row
from tests.errors.sites import SRC, Site, all_sites

TABLES = {
    "data": data_rows.ROWS,
    "optim": optim_rows.ROWS,
    "config": config_rows.ROWS,
    "studies": study_rows.ROWS,
}
ROWS = {f"{area}: {name}": row for area, rows in TABLES.items() for name, row in rows.items()}


def provoke(row: Row, folder: Path) -> MuonscaleError:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            row.call(folder)
        except MuonscaleError as error:
            return error
    raise AssertionError("no error was raised")


@pytest.mark.parametrize("name", ROWS)
def test_the_error_has_its_class_and_names_value_and_key(name: str, tmp_path: Path) -> None:
    row = ROWS[name]
    error = provoke(row, tmp_path)
    assert type(error) is row.error, error
    assert not [words for words in row.said if words not in str(error)], str(error)


def raised_at(error: BaseException) -> list[tuple[str, int]]:
    """Return module and line of the innermost frames of ours.

    They are those of an error and of the errors whose text it repeats, in pydantic's too.
    """
    found = []
    for end in read_errors(error):
        frames = [(f.f_code.co_filename, line) for f, line in walk_tb(end.__traceback__)]
        ours = [(name, line) for name, line in frames if name.startswith(str(SRC))]
        found += [(Path(name).relative_to(SRC).as_posix(), line) for name, line in ours[-1:]]
    return found


def read_errors(error: BaseException) -> Iterator[BaseException]:
    yield error
    inner = error.__cause__ or error.__context__
    behind: list[BaseException] = [] if inner is None else [inner]
    if isinstance(inner, ValidationError):
        behind = [e["ctx"]["error"] for e in inner.errors() if "error" in e.get("ctx", {})]
    for one in behind:
        if str(one) in str(error):
            yield from read_errors(one)


@pytest.mark.slow
def test_most_sites_are_provoked(tmp_path_factory: pytest.TempPathFactory) -> None:
    sites = all_sites()
    covered: set[Site] = set()
    for row in ROWS.values():
        for module, line in raised_at(provoke(row, tmp_path_factory.mktemp("row"))):
            covered |= {s for s in sites if s.module == module and s.first <= line <= s.last}
    count, all_of = Counter(s.module for s in covered), Counter(s.module for s in sites)
    for module in all_of:
        print(f"{count[module]:3} of {all_of[module]:3}  {module}")
    print(f"{len(covered)} of {len(sites)}")
    assert len(covered) >= 0.58 * len(sites)
