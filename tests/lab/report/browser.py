"""Headless Chromium, spoken to over its DevTools protocol through a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any, Self

MISSING = "no Chromium on this machine, which the pages are tested in; install it: apt-get install chromium"

FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]

EMPTY_FIGURES = """
[...document.querySelectorAll("figure.chart")].filter((figure) => {
  const plot = figure.querySelector("svg.main-svg");
  const drawn = figure.querySelectorAll(".plot path.js-line, .plot .point, .plot .contourlayer path, .plot .annotation");
  return !plot || !drawn.length || plot.getBoundingClientRect().height < 100;
}).map((figure) => figure.id)
"""
"""Figures in which nothing is drawn: neither a line nor a point, a contour or the words `no values`."""


class Browser:
    """One page in a browser of its own."""

    def __init__(self, profile: Path) -> None:
        program = shutil.which("chromium")
        assert program is not None, MISSING
        there, self._out = os.pipe()
        self._in, back = os.pipe()
        # The protocol is read from descriptor 3 and written to 4, whatever they are called here.
        shell = f'exec "$@" 3<&{there} 4>&{back}'
        flags = [*FLAGS, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        command = ["bash", "-c", shell, "browser", program, *flags]
        self._process = subprocess.Popen(
            command, pass_fds=(there, back), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        os.close(there)
        os.close(back)
        self._buffer, self._number, self._session = b"", 0, None
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._loaded, self._scripts = False, True
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None
        os.write(self._out, json.dumps({"id": 0, "method": "Browser.close"}).encode() + b"\0")
        self._process.wait(timeout=20)
        os.close(self._out)
        os.close(self._in)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return what it answers; events that come first are looked at."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._receive()).get("id") != self._number:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def open(self, path: Path, *, width: int = 1280, dark: bool = False) -> None:
        """Open a file and wait until it is loaded and drawn. Below 600 pixels it is a phone."""
        phone = width < 600
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": phone}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        self.scheme(dark=dark)
        self._loaded = False
        answer = self.call("Page.navigate", url=path.resolve().as_uri())
        assert "errorText" not in answer, answer
        while not self._loaded:
            self._receive()
        self.settle()

    def scheme(self, *, dark: bool) -> None:
        """Prefer a dark or a light page, as the system of a reader does."""
        value = "dark" if dark else "light"
        features = [{"name": "prefers-color-scheme", "value": value}]
        self.call("Emulation.setEmulatedMedia", features=features)

    def scripts(self, *, on: bool) -> None:
        """Switch scripts on or off for what is opened next."""
        self.call("Emulation.setScriptExecutionDisabled", value=not on)
        self._scripts = on

    def settle(self) -> None:
        """Wait until what was asked for is on the screen."""
        time.sleep(0.3)
        if not self._scripts:
            return
        frames = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.call("Runtime.evaluate", expression=frames, awaitPromise=True)

    def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression in the page."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Save a picture of the whole page, at most 12,000 pixels long."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 12_000)}
        options = {"clip": clip | {"scale": 1}, "captureBeyondViewport": True}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", **options)["data"]))

    def empty_figures(self) -> list[str]:
        """Return the ids of figures in which nothing is drawn."""
        return self.evaluate(EMPTY_FIGURES)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            data = os.read(self._in, 1 << 16)
            assert data, "Chromium has ended"
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        self._look(message.get("method"), message.get("params", {}))
        return message

    def _look(self, method: str | None, event: dict[str, Any]) -> None:
        """Take note of errors in scripts, of what the browser complains about, and of requests."""
        if method == "Page.loadEventFired":
            self._loaded = True
        elif method == "Runtime.exceptionThrown":
            details = event["exceptionDetails"]
            self.problems.append(details.get("exception", details).get("description", str(details)))
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.problems.append(f"console: {event['args']}")
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(event["entry"]["text"])
        elif method == "Network.requestWillBeSent":
            self.requests.append(event["request"]["url"])
