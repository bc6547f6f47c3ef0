from __future__ import annotations

import base64
import json
import re
from dataclasses import replace

import pytest
from plotly.offline import get_plotlyjs

from muonscale.lab.console import is_number
from muonscale.lab.report.html import page_html
from muonscale.lab.report.page import (
    Block,
    Chart,
    Page,
    PageSection,
    Series,
    Table,
    Text,
    Verdict,
)
from muonscale.lab.report.palette import styles
from tests.lab.report.sample import CHARTS, PAGE, RATE_CHART
from tests.lab.report.tree import Node, parse

SVG = b"<svg/>"


def rendered(page: Page) -> str:
    return page_html(page, styles(page.charts), {chart.name: SVG for chart in page.charts})


def page_of(*blocks: Block) -> Page:
    return Page(title="t", summary="s", sections=(PageSection(title="one", blocks=blocks),))


@pytest.fixture(scope="module")
def text() -> str:
    return rendered(PAGE)


@pytest.fixture(scope="module")
def tree(text: str) -> Node:
    return parse(text)


def only(node: Node, tag: str, of_class: str = "") -> Node:
    (found,) = node.all(tag, of_class)
    return found


def test_nothing_of_the_data_becomes_markup(tree: Node) -> None:
    assert only(tree, "title").text == PAGE.title
    assert only(tree, "h1").text == PAGE.title
    assert not tree.all("em") and not tree.all("b") and not tree.all("i")
    assert [p.text for p in tree.all("p", "summary")] == [
        "First paragraph.",
        "Second </script> paragraph.",
    ]
    figures = {figure.attributes["id"]: figure for figure in tree.all("figure", "chart")}
    assert only(figures["figure-lr"], "h4").text == "Loss <b>against</b> learning rate"


def test_every_kind_of_block_is_drawn(tree: Node) -> None:
    section = tree.all("section")[0]
    assert [p.text for p in section.all("p")[:2]] == ["One.", "Two <em>not emphasised</em>."]
    verdicts = [(v.attributes["class"], v.text) for v in section.all("p", "verdict")]
    assert verdicts == [
        ("verdict holds", "Holds. lower"),
        ("verdict fails", "Does not hold. higher"),
        ("verdict open", "Undecided. equal"),
    ]
    assert only(section, "code").text == "muonscale train 'a b' && echo \"<done>\""
    assert only(section, "button").text == "Copy"
    assert [v.text for v in section.all("pre", "verbatim")] == [
        "  def f():\n    <b>\n",
        '{"a": 1}',
    ]
    assert only(only(section, "details"), "summary").text == "config.json"
    assert len(tree.all("figure", "chart")) == len(CHARTS)


def test_columns_of_numbers_are_aligned(tree: Node) -> None:
    table = tree.all("table")[0]
    heads = [(th.text, th.attributes.get("class")) for th in table.all("th")]
    numbers = "number"
    assert heads == [
        ("variant", None), ("loss", numbers), ("interval", numbers), ("tokens", numbers),
    ]  # fmt: skip
    cells = [td.text for td in table.all("td")]
    assert cells == ["Muon", "2.931", "2.92 to 2.94", "1.2M", "AdamW <i>", "-0.5", "", "3,000"]
    assert all("class" not in th.attributes for th in tree.all("table")[1].all("th"))


@pytest.mark.parametrize(
    "cell",
    ["0", "-1.5", "\u22121.5", "+0.3", "1,234", "1e-05", "2.5E+3", ".5", "12 %", "12%", "1.2M", "3 s",
     "2.9 to 3.1", "-0.1 to 0.1", "1.0 \u00b1 0.2", "nan", "1.5x", "$5"],
)  # fmt: skip
def test_numbers_are_known(cell: str) -> None:
    assert is_number(cell)


@pytest.mark.parametrize(
    "cell", ["", "llama-nano", "1.2.3", "step 5", "5 of 6", "2024-01-01", "1-2"]
)
def test_what_is_no_number_is_known(cell: str) -> None:
    assert not is_number(cell)


def test_contents_are_there_for_several_sections_only(tree: Node) -> None:
    links = [(a.attributes["href"], a.text) for a in only(tree, "nav").all("a")]
    assert links == [("#section-1", "Findings"), ("#section-2", "Charts")]
    assert [s.attributes["id"] for s in tree.all("section")] == ["section-1", "section-2"]
    assert not parse(rendered(page_of(Text("x")))).all("nav")


def test_parts_have_headings_above_their_sections() -> None:
    sections = [
        PageSection(title=t, blocks=(), part=p) for t, p in [("a", "P"), ("b", "P"), ("c", "Q")]
    ]
    tree = parse(rendered(Page(title="t", summary="", sections=tuple(sections))))
    assert [h.text for h in tree.all("h2", "part")] == ["P", "Q"]
    assert [h.text for h in tree.all("h3")] == ["a", "b", "c"]
    assert [a.text for a in only(tree, "nav").all("a")] == ["P", "a", "b", "Q", "c"]


def test_figures_link_to_their_files_and_have_an_image_without_scripts(tree: Node) -> None:
    figure = tree.all("figure", "chart")[0]
    links = [a.attributes["href"] for a in figure.all("a")]
    assert links == ["figures/lr.png", "figures/lr.svg", "figures/lr.csv"]
    source = only(only(figure, "noscript"), "img").attributes["src"]
    assert base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")) == SVG
    assert [a.attributes["href"] for a in tree.all("figure", "table")[0].all("a")] == [
        "figures/final.csv"
    ]
    captions = {f.attributes["id"]: only(f, "figcaption").text for f in tree.all("figure", "chart")}
    assert captions["figure-lr"].startswith("Five seeds. ")
    # x = 0, y below 0 of the mark: two values.
    assert captions["figure-loglog"].startswith("2 values are left out")


def test_figures_are_json_with_the_numbers_of_the_chart(tree: Node) -> None:
    figure = json.loads(only(tree.all("figure", "chart")[0], "script").text)
    lines = [trace for trace in figure["data"] if trace["name"] in ("Muon", "AdamW")]
    assert lines[0]["x"] == list(RATE_CHART.series[0].x)
    assert lines[0]["y"] == list(RATE_CHART.series[0].y)
    assert lines[1]["y"] == [3.1, 3.06, 3.12, None, None]
    assert figure["layout"]["xaxis"]["ticktext"] == ["0.0025", "0.005", "0.01", "0.02", "0.04"]


def test_a_name_that_closes_a_script_does_not() -> None:
    chart = Chart(
        name="c",
        title="</script>",
        x_label="</script>",
        y_label="y",
        series=(Series(name="</script><b>&amp;", x=(1.0,), y=(1.0,)),),
    )
    figure = parse(rendered(page_of(chart))).all("figure", "chart")[0]
    trace = json.loads(only(figure, "script").text)["data"][0]
    assert trace["name"] == "&lt;/script&gt;&lt;b&gt;&amp;amp;"  # plotly reads names as HTML


def test_the_page_needs_no_network(text: str, tree: Node) -> None:
    for node in tree.nodes:
        for name in ("src", "srcset", "poster", "data", "action", "background"):
            assert node.attributes.get(name, "data:").startswith("data:"), node
        assert node.tag not in ("link", "iframe", "object", "embed", "base")
        if node.tag == "a":
            assert re.match(r"#|figures/", node.attributes["href"])
    assert "url(" not in only(tree, "style").text and "@import" not in only(tree, "style").text
    policy = next(n.attributes["content"] for n in tree.all("meta") if "http-equiv" in n.attributes)
    assert "default-src 'none'" in policy and "http" not in policy
    assert text.count(get_plotlyjs()) == 1


def test_a_page_without_charts_has_no_plotly() -> None:
    assert len(rendered(page_of(Text("x")))) < 20_000


def test_the_page_is_for_phones_and_for_both_schemes(tree: Node) -> None:
    contents = [node.attributes.get("content", "") for node in tree.all("meta")]
    assert "width=device-width, initial-scale=1" in contents and "light dark" in contents
    style = only(tree, "style").text
    assert "prefers-color-scheme: dark" in style and "@media print" in style


def test_code_in_a_sentence_is_code_and_nothing_else_is_markup() -> None:
    tree = parse(rendered(page_of(Text("Use `muonscale eval <b>` & more."))))
    assert only(tree, "code").text == "muonscale eval <b>"
    assert not tree.all("b")


def test_consecutive_charts_are_beside_each_other() -> None:
    one, two, three = (replace(RATE_CHART, name=name) for name in "abc")
    tree = parse(rendered(page_of(one, two, Text("x"), three)))
    assert len(only(tree, "div", "pair").all("figure", "chart")) == 2


def test_consecutive_verdicts_and_tables_are_beside_each_other() -> None:
    tables = [Table(head=("x",), rows=((str(n),),)) for n in range(3)]
    blocks = (Verdict(True, "a"), Verdict(None, "b"), *tables[:2], Text("x"), tables[2])
    tree = parse(rendered(page_of(*blocks)))
    assert len(only(tree, "div", "verdicts").all("p", "verdict")) == 2
    assert len(only(tree, "div", "side").all("figure", "table")) == 2
