"""Every GPU kernel compiles for sm_80 and sm_90 and keeps its budget: spills, access widths, registers, instructions.

What is compiled, and what it may cost, stands in variants_<op>.py; the commands to tune with in sass.py.
"""

import pytest
from compiled import operations


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("operation", operations())
def test_kernels_keep_their_budget(operation, capability, compiled):
    mine = [report for report in compiled.reports(operation) if report["capability"] == capability]
    assert mine, f"variants_{operation}.py lists nothing"
    for report in mine:
        print(f"{report['variant']}: {report['summary']}")
    broken = [f"{r['variant']}: {violation}" for r in mine for violation in r["violations"]]
    assert not broken, "\n".join(broken)
