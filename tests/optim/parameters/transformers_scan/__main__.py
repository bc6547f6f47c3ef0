"""Print what the scan finds: `python -m tests.optim.parameters.transformers_scan`."""

from __future__ import annotations

import transformers

from tests.optim.parameters.transformers_scan.static import cut_verdict, findings

if __name__ == "__main__":
    verdict = cut_verdict()
    print(f"transformers {transformers.__version__}")
    print(verdict.table(findings()))
    print(verdict.report())
