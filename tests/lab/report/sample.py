"""A page with every kind of block and chart."""

from __future__ import annotations

import math

from muonscale.lab.report.page import (
    Chart,
    Command,
    Mark,
    Page,
    PageSection,
    Series,
    Surface,
    Table,
    Text,
    Verbatim,
    Verdict,
)

NAN = math.nan
RATES = (0.0025, 0.005, 0.01, 0.02, 0.04)

RATE_CHART = Chart(
    name="lr",
    title="Loss <b>against</b> learning rate",
    x_label="learning rate",
    y_label="loss (nats)",
    series=(
        Series(
            name="Muon",
            x=RATES,
            y=(3.2, 3.05, 1 / 3 + 2.7, 3.02, 3.3),
            low=(3.1, 3.0, 2.9, 3.0, 3.2),
            high=(3.3, 3.1, 3.1, 3.1, 3.4),
            kind="both",
        ),
        Series(name="AdamW", x=RATES, y=(3.1, 3.06, 3.12, NAN, NAN)),
    ),
    marks=(Mark(axis="y", at=3.6, label="bigram"), Mark(axis="x", at=0.01, label="base")),
    log_x=True,
    caption="Five seeds.",
)

BAND_CHART = Chart(
    name="tokens",
    title="Loss against tokens",
    x_label="training tokens",
    y_label="loss (nats)",
    series=(
        Series(
            name="Muon, training",
            group="Muon",
            x=(0.0, 1e6, 2e6, 3e6, 4e6),
            y=(7.0, 5.0, NAN, 4.0, 3.5),
            low=(6.5, 4.5, NAN, 3.5, 3.0),
            high=(7.5, 5.5, NAN, 4.5, 4.0),
        ),
        Series(name="fit", group="Muon", kind="dashed", x=(0.0, 4e6), y=(6.0, 3.4)),
        Series(name="validation", kind="points", x=(2e6, 4e6), y=(4.6, 3.6)),
    ),
)

LOG_CHART = Chart(
    name="loglog",
    title="Tokens to a loss",
    x_label="batch (tokens)",
    y_label="tokens",
    log_x=True,
    log_y=True,
    series=(
        Series(
            name="AdamW",
            kind="points",
            x=(0.0, 4096.0, 8192.0),
            y=(1e6, 1.5e6, 2e6),
            low=(1e6, -1.0, 1.9e6),
            high=(1e6, 2e6, 2.1e6),
        ),
    ),
    marks=(Mark(axis="y", at=-1.0, label="impossible"),),
)

SURFACE_CHART = Chart(
    name="surface",
    title="Loss over both",
    x_label="learning rate",
    y_label="weight decay",
    log_x=True,
    log_y=True,
    surface=Surface(
        x=(0.005, 0.01, 0.02),
        y=(0.01, 0.1),
        z=((3.4, 3.2, 3.3), (3.3, 3.1, NAN)),
        label="loss (nats)",
    ),
    series=(Series(name="path", kind="points", x=(0.005, 0.01), y=(0.01, 0.1)),),
)

EMPTY_CHART = Chart(
    name="empty",
    title="Nothing",
    x_label="x",
    y_label="y",
    series=(Series(name="none", x=(1.0,), y=(NAN,)),),
)

CHARTS = (RATE_CHART, BAND_CHART, LOG_CHART, SURFACE_CHART, EMPTY_CHART)

TABLE = Table(
    head=("variant", "loss", "interval", "tokens"),
    rows=(("Muon", "2.931", "2.92 to 2.94", "1.2M"), ("AdamW <i>", "-0.5", "", "3,000")),
    name="final",
    caption="Final losses.",
)

PAGE = Page(
    title="Muon & AdamW <script>window.injected = true</script>",
    summary="First paragraph.\n\nSecond </script> paragraph.",
    sections=(
        PageSection(
            title="Findings",
            blocks=(
                Text("One.\n\nTwo <em>not emphasised</em>."),
                Verdict(True, "lower"),
                Verdict(False, "higher"),
                Verdict(None, "equal"),
                Command("muonscale train 'a b' && echo \"<done>\""),
                Verbatim(text="  def f():\n    <b>\n", caption="A sample."),
                Verbatim(text='{"a": 1}', caption="config.json", folded=True),
                TABLE,
                Table(head=("a", "b"), rows=()),
            ),
        ),
        PageSection(title="Charts", blocks=CHARTS),
    ),
)
