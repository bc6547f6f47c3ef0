"""Conversations made from sources."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.instructions import conversations, main
from muonscale.lab.data.chat.conversations import conversation_text

SOURCE = '''
def push(heap, item, *, key=None):
    """Push an item. And more of it."""

class Queue:
    """A queue of items
    in order.

    More."""
    def get(self, block=True):
        """Remove and return an item."""
    def _hidden(self): "Not shown at all."

def _private(): "Not shown at all."
'''


def test_questions_and_answers_by_hand(tmp_path: Path) -> None:
    (tmp_path / "heap.py").write_text(SOURCE)
    (tmp_path / "other.py").write_text("def push(x): pass\n")
    (tmp_path / "broken.py").write_text("def (")
    found = [
        tuple(message["content"] for message in chat if message["role"] != "system")
        for chat in conversations(tmp_path)
    ]
    assert found == [
        ("What are the arguments of heap.push?", "heap.push(heap, item, *, key=None)"),
        (
            "What does heap.push do?",
            "Push an item.",
            "What are the arguments of it?",
            "heap.push(heap, item, *, key=None)",
        ),
        ("What are the arguments of heap.Queue.get?", "heap.Queue.get(block=True)"),
        (
            "What does heap.Queue.get do?",
            "Remove and return an item.",
            "What are the arguments of it?",
            "heap.Queue.get(block=True)",
        ),
        ("What does heap.Queue do?", "A queue of items in order."),
        ("Which module defines Queue?", "heap."),
        ("What are the arguments of other.push?", "other.push(x)"),
        ("Write Queue backwards.", "eueuQ"),
        ("How many characters has get?", "3."),
        ("Write push in capitals.", "PUSH"),
    ]


@pytest.mark.slow
def test_the_library_of_this_python(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(tmp_path)])
    lines = (tmp_path / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    assert 3000 < len(lines) == len(set(lines)) < 30_000
    assert f"{len(lines):,} conversations" in capsys.readouterr().out
    for line in lines:
        conversation_text(json.loads(line)["messages"], field="m", errors="strict", place=line)
    again = tmp_path / "again"
    main([str(again)])
    assert (again / "chat.jsonl").read_text(encoding="utf-8").splitlines() == lines
