from __future__ import annotations

from muonscale.lab.report.markdown import markdown
from muonscale.lab.report.page import (
    Chart,
    Command,
    Page,
    PageSection,
    Series,
    Table,
    Text,
    Tile,
    Tiles,
    Verbatim,
    Verdict,
)

CHART = Chart(
    name="loss",
    title="Loss",
    x_label="x",
    y_label="y",
    series=(Series(name="a", x=(1,), y=(2,)),),
    caption="As measured.",
)


def test_every_block_is_written() -> None:
    blocks = (
        Text("a < b and *c*"),
        Command("muonscale study run mine"),
        Verdict(True, "it is so"),
        Verdict(None, "who knows"),
        Verbatim(text="def f():\n    pass"),
        Table(head=("a", "b"), rows=(("1", "x|y"),), caption="Numbers."),
        Table(head=("empty",), rows=()),
        CHART,
    )
    page = Page(title="T", summary="S", sections=(PageSection(title="One", blocks=blocks),))
    assert markdown(page, "pictures") == (
        "# T\n\nS\n\n## One\n\na &lt; b and \\*c\\*\n\n```sh\nmuonscale study run mine\n```\n\n"
        "- **holds**: it is so\n\n- **undecided**: who knows\n\n"
        "```text\ndef f():\n    pass\n```\n\n"
        "| a | b |\n| --- | --- |\n| 1 | x\\|y |\n\nNumbers.\n\n"
        "![Loss](pictures/loss.png)\n\nAs measured.\n"
    )


def test_parts_have_headings_above_their_sections() -> None:
    sections = tuple(
        PageSection(title=t, blocks=(), part=p)
        for t, p in (("a", "P"), ("b", "P"), ("c", "Q"), ("d", ""))
    )
    text = markdown(Page(title="T", summary="S", sections=sections))
    assert text == "# T\n\nS\n\n## P\n\n### a\n\n### b\n\n## Q\n\n### c\n\n## d\n"


def test_tiles_and_code_are_written() -> None:
    tiles = Tiles((Tile(label="loss", value="3.250", note="nats"), Tile(label="runs", value="2")))
    page = Page(
        title="T",
        summary="S",
        sections=(
            PageSection(title="One", blocks=(tiles, Text("Use `muonscale eval a_b`, not ` or *."))),
        ),
    )
    assert markdown(page).split("## One")[1] == (
        "\n\n- loss: **3.250** nats\n- runs: **2**\n\nUse `muonscale eval a_b`, not \\` or \\*.\n"
    )
