"""A page as files: report.html, report.md, and every figure as PNG, SVG and CSV."""

from __future__ import annotations

from pathlib import Path

from muonscale.errors import StudyError
from muonscale.lab.files import write_atomic
from muonscale.lab.report.check import check_page
from muonscale.lab.report.html import page_html
from muonscale.lab.report.markdown import markdown
from muonscale.lab.report.matplotlib_charts import draw
from muonscale.lab.report.page import Page
from muonscale.lab.report.palette import styles
from muonscale.lab.report.tables import chart_files, table_file

ANOTHER = "choose another folder with --out"


def write_page(page: Page, folder: Path, advice: str = ANOTHER) -> Path:
    """Write a page and its figures. The same page gives the same bytes.

    `report.html` needs no other file; `report.md` refers to the PNGs. `figures/` has NAME.png,
    NAME.svg and NAME.csv of every chart, and NAME.csv of every table that has a name.

    Args:
        page: the report.
        folder: created if it does not exist. Files of the same names are replaced.
        advice: what the user can do if the folder cannot be written.

    Returns:
        The path of report.html.

    Raises:
        StudyError: if two charts or tables have the same name, a chart cannot be drawn, or the
            folder cannot be written.
    """
    check_page(page)
    looks = styles(page.charts)
    svg: dict[str, bytes] = {}
    files: dict[str, bytes] = {}
    for chart in page.charts:
        drawing = draw(chart, looks)
        svg[chart.name] = drawing["svg"]
        files |= {f"{chart.name}.{kind}": data for kind, data in drawing.items()}
        files |= {name: text.encode() for name, text in chart_files(chart).items()}
    files |= {
        f"{table.name}.csv": table_file(table).encode() for table in page.tables if table.name
    }
    text = page_html(page, looks, svg)
    path = folder / "report.html"
    try:
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            write_atomic(folder / "figures" / name, data)
        write_atomic(folder / "report.md", markdown(page))
        write_atomic(path, text)  # last, so that a page never lacks its figures
    except OSError as error:
        raise StudyError(f"the report cannot be written to {folder}: {error}; {advice}") from error
    return path
