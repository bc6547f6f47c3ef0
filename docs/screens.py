"""Pictures of what a user sees: the console, a report and a plan, from runs that it does itself.

    python -m docs.screens [FOLDER]

Writes docs/images/{console.svg,plan.png,report-light.png,report-dark.png,report-phone.png}, some
minutes on two cores. Reports are photographed in Chromium.
"""

from __future__ import annotations

import base64
import contextlib
import io
import re
import sys
import tempfile
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from rich.console import Console, RenderableType

from muonscale.lab.config.load import load_config
from muonscale.lab.estimate.estimate import estimate
from muonscale.lab.estimate.figure import write_figure
from muonscale.lab.estimate.resolve import PlanRequest
from muonscale.lab.report.folders import page_of
from muonscale.lab.report.write import write_page
from muonscale.lab.training import console as of_training
from muonscale.lab.training.loop import train
from tests.lab.report.browser import Browser

IMAGES = Path(__file__).parent / "images"
COLUMNS = 80
SHOWN = 0.6
"""The part of the run that is done when the console is shown."""
RUN = ["train.tokens=240_000", "eval.every=20", "eval.sample_tokens=0"]
PLAN = PlanRequest(
    target="muon-plus-llama-1b", devices=8, overrides=["train.micro_batch_tokens=16384"]
)
FONTS = re.compile(r"@font-face {.*?}|<!-- Generated with Rich.*?-->", flags=re.S)
"""Parts of rich's pictures that name other servers, which a page does not ask."""
COLORS = 128
"""Colors of a photograph: enough for text and lines, and a third of the bytes."""


class Watched(of_training.RunConsole):
    """The console of a run on a terminal of 80 columns, whose screen is kept as a picture."""

    def __init__(self) -> None:
        terminal = Console(
            width=COLUMNS, force_terminal=True, highlight=False, soft_wrap=True, file=io.StringIO()
        )
        super().__init__(terminal)
        self._printed: list[str] = []
        self.svg = ""

    def log(self, text: str) -> None:
        """Print a message, and remember it."""
        self._printed.append(text)
        super().log(text)

    @contextlib.contextmanager
    def steps(self, done: int, total: int, *, every: int | None = None) -> Generator[Any]:
        """Show the steps, and keep the screen at one of them."""
        with super().steps(done, total, every=every) as show:
            live = self.console._live_stack[-1]

            def watch(record: dict[str, Any], more: Sequence[str] = ()) -> None:
                show(record, more)
                if record["step"] == round(SHOWN * total):
                    self.svg = self._screen(live.get_renderable())

            yield watch

    def _screen(self, bar: RenderableType) -> str:
        screen = Console(
            width=COLUMNS, record=True, force_terminal=True, highlight=False, file=io.StringIO()
        )
        screen.print("[bold]$[/] muonscale train")
        for line in self._printed:
            screen.print(line, markup=False)
        screen.print(bar)
        svg = screen.export_svg(title="muonscale")
        return FONTS.sub("", svg)


def trained(folder: Path, *words: str) -> Watched:
    """Train the demo in a folder, shorter, and return its console."""
    console = Watched()
    config = load_config("demo", [*RUN, f"run.path={folder}", *words])
    train(config, resume=False, console=console)
    return console


def photograph(page: Path, folder: Path) -> None:
    """Write the first screen of a page in light, in dark, and on a phone."""
    with tempfile.TemporaryDirectory() as profile, Browser(Path(profile)) as browser:
        for name, width, dark in (
            ("light", 1280, False),
            ("dark", 1280, True),
            ("phone", 390, False),
        ):
            browser.open(page, width=width, dark=dark)
            data = base64.b64decode(browser.call("Page.captureScreenshot")["data"])
            picture = Image.open(io.BytesIO(data)).convert("RGB").quantize(COLORS)
            picture.save(folder / f"report-{name}.png", optimize=True)


def main(folder: Path = IMAGES) -> None:
    """Draw all pictures into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    write_figure(estimate(PLAN), folder / "plan.png")
    folder = folder.resolve()
    with tempfile.TemporaryDirectory() as made, contextlib.chdir(made):
        demo, half = Path("runs/demo"), Path("runs/half-lr")
        (folder / "console.svg").write_text(trained(demo).svg, encoding="utf-8")
        trained(half, "optimizer.lr=0.01")
        photograph(write_page(page_of([demo, half]), Path("compared")), folder)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:2]))
