"""What the scan found, held against the table of the product and the excuses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from tests.optim.parameters.transformers_scan.excused import excuse, matching
from tests.optim.parameters.transformers_scan.findings import Cut, Findings

Names = Collection[tuple[str, str]]
"""(class, attribute) pairs."""


@dataclass
class CutVerdict:
    """Which cuts the table knows, which have an excuse, and which are new."""

    known: set[tuple[str, str]] = field(default_factory=set)
    excused: dict[tuple[str, str], str] = field(default_factory=dict)
    """With the reason."""
    unknown: dict[tuple[str, str], list[Cut]] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)
    """Excuses that nothing needs."""

    def report(self) -> str:
        """Return one line for each unknown cut."""
        return "\n".join(
            f"{cls}.{attribute}: {describe(cuts)}"
            for (cls, attribute), cuts in self.unknown.items()
        )

    def table(self, findings: Findings) -> str:
        """Return the counts, a line each."""
        rows = [
            ("classes looked at", findings.classes),
            ("linear layers in them", len(findings.linears)),
            ("of these cut", len(self.known) + len(self.excused) + len(self.unknown)),
            ("  known to muonscale", len(self.known)),
            *((f"  excused: {why}", n) for why, n in Counter(self.excused.values()).most_common()),
            ("  unknown", len(self.unknown)),
        ]
        return "\n".join(f"{count:6d}  {what}" for what, count in rows)


def describe(cuts: list[Cut]) -> str:
    first = [cut for cut in cuts if not cut.part] or cuts
    return "; ".join(f"{cut.how} at {cut.file}:{cut.line}" for cut in first[:4])


def judge_cuts(findings: Findings, table: Names, excuses: Mapping[str, str]) -> CutVerdict:
    """Return the verdict on every cut.

    A cut is known if the table has it, under the class or one of its bases, or if the module says
    itself: expert stacks with the flags of transformers' experts interface, GPT-2's `split_size`.
    """
    verdict = CutVerdict()
    used: set[str] = set()
    for key, cuts in sorted(findings.cut_keys().items()):
        if _in_table(key, table, findings) or _says_itself(key, cuts, findings):
            verdict.known.add(key)
            continue
        name = ".".join(key)
        used |= {glob for globs in excuses.values() for glob in matching(name, globs)}
        if why := excuse(name, excuses):
            verdict.excused[key] = why
        else:
            verdict.unknown[key] = cuts
    every = {glob for globs in excuses.values() for glob in globs.split()}
    verdict.unused = sorted(every - used)
    return verdict


def _in_table(key: tuple[str, str], table: Names, findings: Findings) -> bool:
    cls, attribute = key
    places = {attribute, ".".join(attribute.split(".")[-2:]), attribute.split(".")[-1]}
    if any((base, place) in table for base in findings.lineage[cls] for place in places):
        return True
    # The weight of a linear layer of transformers' own: the places where it stands.
    stands = findings.places.get(cls, [])
    return attribute == "weight" and bool(stands) and all(place in table for place in stands)


def _says_itself(key: tuple[str, str], cuts: list[Cut], findings: Findings) -> bool:
    cls, attribute = key
    experts = attribute == "gate_up_proj" and cls in findings.experts
    return experts or all("split_size" in cut.how for cut in cuts if not cut.part)
