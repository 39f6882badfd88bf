"""`make bench`: threads as a parameter, tables on the terminal, and the run's figures in benchmarks/results/cpu.json."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import interleaved

from bkd_fast import _native as native

RESULTS = Path(__file__).parent / "results"


@pytest.fixture(params=[1, 2], ids=["1-thread", "2-threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def show(capsys):
    """Print a table past pytest's capture."""

    def printer(table):
        with capsys.disabled():
            print(f"\n{table}")

    return printer


def pytest_sessionfinish(session):
    if interleaved.ROWS:
        RESULTS.mkdir(exist_ok=True)
        about = {"instruction_set": native.isa(), "threading": native.threading(), "torch": torch.__version__}
        rows = [json.dumps(row) for row in interleaved.ROWS]
        body = ",\n  ".join(rows)
        text = f'{{"about": {json.dumps(about)},\n "rows": [\n  {body}\n]}}\n'
        (RESULTS / "cpu.json").write_text(text)
