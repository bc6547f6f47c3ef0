from __future__ import annotations

import json
import socket
import struct
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from muonscale.errors import ConfigError, StudyError
from muonscale.lab.report.serve import HOST, LivePage, page_server, serve
from tests.lab.report.folders import records, training, write_run
from tests.lab.report.tree import parse


@contextmanager
def served(*paths: Path) -> Iterator[str]:
    """Serve a page and yield its address."""
    server = page_server(paths, 0)
    thread = threading.Thread(target=serve, args=[server])
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()


def read(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def append(folder: Path, step: int) -> None:
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(training(step)) + "\n")


def test_a_page_changes_when_its_run_goes_on(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", records(20), result=None)
    with served(folder) as address:
        first, version = read(f"{address}/"), read(f"{address}/version")
        assert "20 of 40 steps" in first and read(f"{address}/version") == version
        tree = parse(first)
        assert not tree.all("a", "files") and not tree.all("noscript")
        assert all(a.attributes["href"].startswith("#") for a in tree.all("a"))
        append(folder, 21)
        assert read(f"{address}/version") != version
        assert "21 of 40 steps" in read(f"{address}/")


def test_nothing_but_the_page_is_served(tmp_path: Path) -> None:
    with (
        served(write_run(tmp_path / "run", records())) as address,
        pytest.raises(urllib.error.HTTPError, match="404"),
    ):
        read(f"{address}/config.json")


def test_the_last_page_stays_while_a_folder_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", records())
    live = LivePage([folder])
    page = live.html()
    for name in ("metrics.jsonl", "config.json"):
        (folder / name).unlink()
    assert live.html() == page
    assert "not made again" in capsys.readouterr().err


def test_what_cannot_be_served_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StudyError, match="no report can be made"):
        page_server([tmp_path], 0)
    folder = write_run(tmp_path / "run", records(1), result=None)
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        with pytest.raises(ConfigError, match="--port"):
            page_server([folder], taken.getsockname()[1])


def test_a_browser_that_closes_its_connection_prints_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with served(write_run(tmp_path / "run", records())) as address:
        for text in (b"GET / HTTP/1.0\r\n\r\n", b"GET / HT"):
            with socket.create_connection((HOST, int(address.rpartition(":")[2]))) as browser:
                browser.sendall(text)
                browser.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert "</html>" in read(address)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("host", "allowed"), [("localhost:9", True), ("a.example", False)])
def test_only_names_of_this_machine_are_answered(host: str, allowed: bool, tmp_path: Path) -> None:
    with served(write_run(tmp_path / "run", records())) as address:
        request = urllib.request.Request(address, headers={"Host": host})
        if allowed:
            assert urllib.request.urlopen(request, timeout=20).status == 200
        else:
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(request, timeout=20)
