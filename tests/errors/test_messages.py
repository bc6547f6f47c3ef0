"""Every message of an error names the value that is wrong, and what is accepted or to be done."""

from __future__ import annotations

import re

import pytest

from tests.errors.sites import Site, all_sites

# Words without which a sentence says only what is wrong.
CUES = re.compile(
    r"\baccept(s|ed)\b|\bmust\b|\b(has|have) to\b|\bgoes there\b|\bneed(s|ed)?\b|\bat (least|most)\b|"
    r"\b(give|choose|use|set|take|put|rename|start|continue|go on|finish|convert|restore|remove|repair|mend|"
    r"save|shard|freeze|make|measure|lower|raise|vary|keep|move|export|check|call|build|install|wait|say|"
    r"write|reduce|let|leave|repeat|do|name|mount|watch|search|restart|see|load|group)\b|"
    r"\bpossible\b|\bhave the form\b|\bdid you mean\b|\bspaces?\b",
    re.IGNORECASE,
)
HINTS = ("nearest(", "hint", "ACCEPTED", "advice", "_ADVICE")
"""Parts of a message that hold what is accepted."""

WRAPPED = "its message is that of the error inside, which is checked where it is raised"
OTHERS = {
    "lab/config.py:_marks_in_order: train.batch_schedule: {error}": WRAPPED,
    "lab/fits/groups.py:labelled: {group}: {error}": WRAPPED,
    "lab/sections.py:_chats: data.format=chat needs data.tokenizer, w": "the value is null",
    "lab/studies/base.py:run: run {label} of the study: {error}": WRAPPED,
    "lab/studies/frontier_config.py:_known: frontier.throughput={value} is neither {": WRAPPED,
    "lab/studies/slurm_options.py:make_submitter: executor.slurm: {error}": WRAPPED,
    "lab/studies/throughput.py:of: {name}{env.get('device_name', 'an unname": WRAPPED,
    "lab/training/groups.py:base_shape: {where}{named}{said.startswith(('transfe": WRAPPED,
    "lab/training/initial_state.py:_joined: optimizer.state={path}: {error}": WRAPPED,
    "lab/training/initial_state.py:_load: optimizer.state={path}: {text}{'\\n'.join": WRAPPED,
    "lab/verify/launch.py:take_steps_on: {_reason(error, folder, processes)}{erro": "what a rank said",
    "optim/groups.py:_amended: override {pattern}: {error}": WRAPPED,
    "optim/groups.py:_check_item: {a.name}: {error}": WRAPPED,
    "transfer/parametrization.py:_shapes: {found.name}: {error}": WRAPPED,
}


def lacks(site: Site) -> list[str]:
    """Return what a message lacks: a value, or a word of what is accepted."""
    said = re.sub(r"\{[^{}]*\}", " ", site.text)
    accepts = CUES.search(said) or any(hint in site.text for hint in HINTS)
    return ["the value"] * ("{" not in site.text) + ["what is accepted"] * (not accepts)


SITES = all_sites()


def test_the_scan_finds_the_sites() -> None:
    assert len(SITES) > 450
    assert {s.kind for s in SITES} >= {"ConfigError", "RoutingError", "LayoutError", "ValueError"}


@pytest.mark.parametrize("module", sorted({site.module for site in SITES}))
def test_messages_name_the_value_and_what_is_accepted(module: str) -> None:
    short = {
        f"{site.key} (line {site.first})": lacks(site)
        for site in SITES
        if site.module == module and site.key not in OTHERS and lacks(site)
    }
    assert not short, f"{module}: {short}"


def test_the_exceptions_are_still_there() -> None:
    keys = {site.key for site in SITES}
    assert not OTHERS.keys() - keys
    assert all(lacks(site) for site in SITES if site.key in OTHERS)


@pytest.mark.parametrize(
    ("text", "lack"),
    [
        ("lr is wrong", ["the value", "what is accepted"]),
        ("lr={lr} is wrong", ["what is accepted"]),
        ("lr must be above 0", ["the value"]),
        ("lr={lr} must be above 0", []),
        ("no rule {name!r}; {nearest(name, RULES)}", []),
    ],
)
def test_the_rules_can_fail(text: str, lack: list[str]) -> None:
    assert lacks(Site("a.py", "f", 1, 1, "ConfigError", text)) == lack
