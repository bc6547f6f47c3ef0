"""What a report is made of: data alone, drawn by others (the page by `html`, all files by `write`).

A `Page` has sections, a section blocks: paragraphs, verdicts, commands, text as it is, tables and
charts. Studies return pages, and know nothing of how they are drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Numbers = tuple[float, ...]
LineT = Literal["line", "points", "both", "dashed"]


@dataclass(frozen=True, kw_only=True)
class Series:
    """A curve or a cloud of points. NaN is a gap."""

    name: str
    x: Numbers
    y: Numbers
    low: Numbers | None = None
    """Lower end of the interval of every y."""
    high: Numbers | None = None
    kind: LineT = "line"
    group: str = ""
    """Series of one group have one colour on the whole page; the name says the group when it is
    empty. A group that has Muon or AdamW in its name gets that optimizer's colour."""

    @property
    def colored_as(self) -> str:
        """The group, given or not."""
        return self.group or self.name


@dataclass(frozen=True, kw_only=True)
class Mark:
    """A straight line across a chart, such as a baseline."""

    axis: Literal["x", "y"]
    """Which axis it is a value of: "y" is a horizontal line."""
    at: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Surface:
    """Values over a grid, drawn as contours with the smallest marked."""

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
    """File name without suffix; unique on its page."""
    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...] = ()
    marks: tuple[Mark, ...] = ()
    surface: Surface | None = None
    log_x: bool = False
    log_y: bool = False
    y_limits: tuple[float, float] | None = None
    """The part of the y axis that is shown at first; all values and marks when not given."""
    caption: str = ""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text. A column in which all cells are numbers is aligned to the right."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    name: str = ""
    """File name of its CSV without suffix; none is written when empty."""
    caption: str = ""


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Command:
    """What to type in a shell to get what the page shows."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Verbatim:
    """Text with its line breaks and spaces, such as what a model wrote or a configuration."""

    text: str
    caption: str = ""
    folded: bool = False
    """Whether it is hidden behind its caption until that is clicked."""


@dataclass(frozen=True)
class Verdict:
    """A claim that was tested: it holds, it does not, or (None) it is not told apart."""

    passed: bool | None
    text: str

    @property
    def words(self) -> str:
        """What is said of the claim."""
        return {True: "holds", False: "does not hold", None: "not told apart"}[self.passed]


Block = Text | Command | Verbatim | Verdict | Table | Chart


@dataclass(frozen=True, kw_only=True)
class Section:
    """Blocks under a heading."""

    title: str
    blocks: tuple[Block, ...]
    part: str = ""
    """Heading above this section and its neighbours of the same part, on a page about several things."""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A report."""

    title: str
    summary: str
    sections: tuple[Section, ...] = field(default=())

    @property
    def charts(self) -> tuple[Chart, ...]:
        """All charts, in order."""
        blocks = (block for section in self.sections for block in section.blocks)
        return tuple(block for block in blocks if isinstance(block, Chart))

    @property
    def tables(self) -> tuple[Table, ...]:
        """All tables, in order."""
        blocks = (block for section in self.sections for block in section.blocks)
        return tuple(block for block in blocks if isinstance(block, Table))
