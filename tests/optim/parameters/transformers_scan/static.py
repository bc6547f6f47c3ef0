"""The scan of the transformers that is installed, once for all tests."""

from __future__ import annotations

import functools
from collections.abc import Mapping

from muonscale.optim.parameters.fused_table import BARE_MATRICES, FUSED
from tests.optim.parameters.transformers_scan.excused import EXCUSED_CUTS
from tests.optim.parameters.transformers_scan.findings import Findings
from tests.optim.parameters.transformers_scan.flow import scan
from tests.optim.parameters.transformers_scan.source import modeling_files
from tests.optim.parameters.transformers_scan.verdict import CutVerdict, Names, judge_cuts

TABLE: frozenset[tuple[str, str]] = frozenset({*FUSED, *BARE_MATRICES})
"""(class, attribute) of what the product knows."""


@functools.cache
def findings() -> Findings:
    """Return every cut and every use of a bare parameter."""
    return scan(modeling_files())


def cut_verdict(table: Names = TABLE, excuses: Mapping[str, str] = EXCUSED_CUTS) -> CutVerdict:
    """Return which cuts are known, excused and new."""
    return judge_cuts(findings(), table, excuses)
