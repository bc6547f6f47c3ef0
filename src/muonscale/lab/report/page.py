"""What a report is made of. These classes hold data; `html`, `markdown` and `write` render it.

A `Page` has sections. A section has blocks: paragraphs, verdicts, commands, verbatim text, tiles,
tables and charts. Whatever draws a chart or prints a table starts from a `Chart` or a `Table`.
Between two backticks of a paragraph, a caption or a verdict is code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Numbers = tuple[float, ...]
LineT = Literal["line", "points", "both", "dashed", "faint"]
"""How a series is drawn; "faint" are small points behind the lines, without a name of their own."""


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve or a set of points. NaN is a gap."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    """The lower end of the interval around each y; `high` is the upper end."""
    high: Numbers | None = None
    kind: LineT = "line"
    group: str = ""
    """Series of one group share a color on the whole page; an empty group means the name. Muon,
    AdamW or "reference" in the name of a group decides the color (`palette.OWN`)."""
    smoothings: tuple[tuple[str, Numbers], ...] = ()
    """Names of kinds of smoothing with the y of each, from none to strong. HTML has a slider for
    them; all series of a chart that have them have the same names."""

    @property
    def color_group(self) -> str:
        """The group that decides the color."""
        return self.group or self.name


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A straight line across a chart, such as a baseline."""

    axis: Literal["x", "y"]
    """The axis that `at` is a value of; "y" makes a horizontal line."""
    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Values over a grid, drawn as contours with the smallest value marked."""

    x: Numbers
    y: Numbers
    z: tuple[Numbers, ...]
    """z[row][column] is the value at (x[column], y[row]); NaN is unknown."""
    label: str
    """What z is, with its unit."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One pair of axes."""

    name: str
    """The file name without suffix; unique on its page."""
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...] = ()
    marks: tuple[Mark, ...] = ()
    surface: Surface | None = None
    bars: tuple[str, ...] = ()
    """Names of stacked bars at x = 0, 1, ...; each series is then a layer of the stacks."""
    log_x: bool = False
    log_y: bool = False
    y_limits: tuple[float, float] | None = None
    """The initial range of the y axis; by default it includes all values and marks."""
    legend: Literal["series", "groups"] = "series"
    """What the legend names: every series, or every group, which many series may share."""
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class ChartViews:
    """One chart against several x axes. HTML shows one at a time and has a switch."""

    views: tuple[tuple[str, Chart], ...]
    """What the switch calls a view, and its chart. Charts of all views have the same series."""

    @property
    def charts(self) -> tuple[Chart, ...]:
        """The charts without their names."""
        return tuple(chart for _, chart in self.views)


@dataclass(frozen=True, kw_only=True)
class Tile:
    """A number to be seen first."""

    label: str
    value: str
    """The number with its unit."""
    note: str = ""
    """What the number is compared with, or whose it is."""


@dataclass(frozen=True)
class Tiles:
    """Numbers in large type."""

    tiles: tuple[Tile, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text. HTML and the console align a column of numbers to the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    name: str = ""
    """The file name of its CSV without suffix; an empty name writes none."""
    caption: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Command:
    """A shell command that reproduces what the page shows."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Verbatim:
    """Text that keeps its line breaks and spaces, such as a model's output or a configuration."""

    text: str
    caption: str = ""
    folded: bool = False
    """Whether the text is hidden until its caption is clicked."""


@dataclass(frozen=True)
class Verdict:
    """A claim that was tested. It holds (True), does not hold (False) or is undecided (None)."""

    passed: bool | None
    text: str

    @property
    def outcome(self) -> str:
        """The verdict in words."""
        return {True: "holds", False: "does not hold", None: "undecided"}[self.passed]


Block = Text | Command | Verbatim | Verdict | Table | Chart | ChartViews | Tiles


@dataclass(frozen=True, kw_only=True)
class PageSection:
    """Blocks under a heading."""

    title: str
    blocks: tuple[Block, ...]
    part: str = ""
    """A heading above all consecutive sections of the same part."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report."""

    title: str
    summary: str
    sections: tuple[PageSection, ...] = ()

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks, in order."""
        return tuple(block for section in self.sections for block in section.blocks)

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All charts, in order."""
        return tuple(
            chart
            for block in self.blocks
            for chart in (block.charts if isinstance(block, ChartViews) else (block,))
            if isinstance(chart, Chart)
        )

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        """All verdicts, in order."""
        return tuple(block for block in self.blocks if isinstance(block, Verdict))

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables, in order."""
        return tuple(block for block in self.blocks if isinstance(block, Table))
