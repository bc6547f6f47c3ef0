"""A page in the browser that is made again while runs go on."""

from __future__ import annotations

import sys
import threading
from collections.abc import Sequence
from hashlib import sha256
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from muonscale.errors import ConfigError, MuonscaleError
from muonscale.lab.report.check import check_page
from muonscale.lab.report.folders import page_of
from muonscale.lab.report.html import page_html
from muonscale.lab.report.palette import styles

HOST = "127.0.0.1"
"""Only this machine sees the page."""

NAMES = (HOST, "localhost")
"""Names of this machine. A site whose name resolves to it is refused: its scripts would read the
page."""

WATCHED = ("*.json", "*.jsonl")
"""The files of a run or a study that a page is made of."""


class LivePage:
    """The page of some folders. It is made again when one of their files has changed."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """Make the page for the first time.

        Raises:
            StudyError: for a folder of which no page can be made.
        """
        self._paths = paths
        self._lock = threading.Lock()
        self._state = self._files()
        self._html, self._version = self._made()

    def html(self) -> str:
        """Return the page. While a folder cannot be read, this is the last page of it."""
        return self._current()[0]

    def version(self) -> str:
        """Return a text that changes with the page."""
        return self._current()[1]

    def _current(self) -> tuple[str, str]:
        with self._lock:
            if (state := self._files()) != self._state:
                try:
                    (self._html, self._version), self._state = self._made(), state
                except MuonscaleError as error:
                    print(f"the page is not made again: {error}", file=sys.stderr)
            return self._html, self._version

    def _made(self) -> tuple[str, str]:
        """Return the page and its digest."""
        page = page_of(self._paths)
        check_page(page)
        html = page_html(page, styles(page.charts))
        return html, sha256(html.encode()).hexdigest()

    def _files(self) -> list[tuple[Path, int, int]]:
        """Return the watched files with their times and sizes."""
        files = (file for path in self._paths for kind in WATCHED for file in path.rglob(kind))
        found = []
        for file in sorted(files):
            try:
                facts = file.stat()
            except OSError:  # removed in between
                continue
            found.append((file, facts.st_mtime_ns, facts.st_size))
        return found


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about a browser that has closed its connection."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def page_server(paths: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """Return a server of the page of some folders: the page at `/`, its version at `/version`.

    Args:
        paths: folders as for `page_of`.
        port: of localhost; 0 is any free one.

    Raises:
        StudyError: for a folder of which no page can be made.
        ConfigError: if the port cannot be used.
    """
    live = LivePage(paths)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            contents = {"/": ("text/html", live.html), "/version": ("text/plain", live.version)}
            if self.headers.get("Host", HOST).partition(":")[0] not in NAMES:
                self.send_error(HTTPStatus.FORBIDDEN, f"open the page at http://{HOST}")
                return
            if self.path not in contents:
                self.send_error(HTTPStatus.NOT_FOUND)
                return
            kind, content = contents[self.path]
            data = content().encode()
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: a page asks every few seconds."""

    try:
        return _Server((HOST, port), Handler)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"--port {port} cannot be used: {error}; give another one, or 0 for any free one"
        ) from error


def serve(server: ThreadingHTTPServer) -> None:
    """Serve until Ctrl-C."""
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
