"""Values near and far from what a recipe holds."""

from __future__ import annotations

import copy
from typing import Any

from hypothesis import strategies as st

ODD_NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 7, 0.5, -0.5, 1e-300, 1e300, 10**18, 10**30, 10**400, -(10**30), 2**31, 2**63,
     float("nan"), float("inf"), float("-inf"), 0.1, 0.999, 1.5]
)  # fmt: skip
ODD_TEXT = st.sampled_from(
    ["", " ", "null", "é", "日本", "😀", "a" * 300, "a" * 1000, "\x00", "a\x00b", "\ud800", "../..", "~", "/",
     "/dev/null", "hf:", "hf::", "{}", "%s", "{0}", "\n", "auto", "demo", "*", "[", "-1", "1e5"]
)  # fmt: skip
SCALARS = st.one_of(
    st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXT, st.integers(-5, 5000), st.text(max_size=8)
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=5), ODD_TEXT, st.integers(0, 9)), inner, max_size=3
        ),
    ),
    max_leaves=6,
)


def places(tree: Any, prefix: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the path of every value in a tree of dicts and lists."""
    found = [prefix] if prefix else []
    items = (
        tree.items()
        if isinstance(tree, dict)
        else enumerate(tree)
        if isinstance(tree, list)
        else ()
    )
    for key, value in items:
        found += places(value, (*prefix, key))
    return found


def _parent(tree: Any, place: tuple[Any, ...]) -> Any:
    for key in place[:-1]:
        tree = tree[key]
    return tree


@st.composite
def damaged(draw: st.DrawFn, tree: Any, values: st.SearchStrategy[Any] = VALUES) -> Any:
    """Draw a copy of a tree with one to three values replaced, renamed, removed or moved."""
    tree = copy.deepcopy(tree)
    for _ in range(draw(st.integers(1, 3))):
        known = places(tree)
        if not known:
            return draw(values)
        place = draw(st.sampled_from(known))
        parent, key = _parent(tree, place), place[-1]
        kind = draw(st.sampled_from(["replace", "replace", "replace", "rename", "remove", "add"]))
        if kind == "replace":
            parent[key] = draw(values)
        elif kind == "remove":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(draw(values))
        elif kind == "rename":
            parent[str(key) + draw(st.sampled_from(["s", "_", "", "X", "."]))] = parent.pop(key)
        else:
            parent[draw(st.one_of(st.text(max_size=6), st.integers(0, 3)))] = draw(values)
    return tree


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw a copy of a file that is cut, flipped, extended, repeated or replaced."""
    kind = draw(
        st.sampled_from(["cut", "flip", "flip", "insert", "append", "empty", "other", "twice"])
    )
    at = draw(st.integers(0, max(0, len(content) - 1)))
    if kind == "cut":
        return content[:at]
    if kind == "flip" and content:
        return (
            content[:at] + bytes([content[at] ^ (1 << draw(st.integers(0, 7)))]) + content[at + 1 :]
        )
    if kind == "insert":
        return content[:at] + draw(st.binary(min_size=1, max_size=8)) + content[at:]
    if kind == "append":
        return content + draw(st.binary(min_size=1, max_size=8))
    if kind == "empty":
        return b""
    if kind == "twice":
        return content + content
    return draw(
        st.one_of(
            st.binary(max_size=40),
            st.sampled_from(
                [b"null", b"[]", b"{}", b"5", b'"x"', b"NaN", b"\xff\xfe", b"\x00", b"[" * 100_000,
                 b'{"a":' * 50_000, b"1" * 6000]
            ),
        )
    )  # fmt: skip
