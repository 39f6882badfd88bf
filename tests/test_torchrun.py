"""Under torchrun: a process that dies ends the run with its name, within seconds, and the run goes on where it was saved."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = f"""
    import os, signal, sys
    sys.path.insert(0, {str(HERE)!r})
    import torch, torch.distributed as dist
    from bkd_fast import chain_mesh
    from bkd_fast.sampling import Callback
    import test_checkpoint_processes as other

    class Die(Callback):
        def on_step(self, record):
            if record.step == 17 and dist.get_rank() == 1 and "die" in sys.argv:
                os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    begin, end, posterior = other.run(sys.argv[1], chain_mesh(replicas=2), follow_also=(Die(),))
    if dist.get_rank() == 0:
        torch.save(end, "end.pt")
    dist.destroy_process_group()
"""


def torchrun(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (folder / "saved").mkdir(exist_ok=True)
    return subprocess.run(
        [*launch, str(script), str(folder / "saved"), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_process_that_dies_is_named_and_the_run_goes_on(tmp_path) -> None:
    import torch
    from test_checkpoint_processes import run

    begin = time.monotonic()
    died = torchrun(tmp_path, "die")
    assert died.returncode != 0 and time.monotonic() - begin < 100
    assert "local_rank: 1" in died.stderr and "Signal 9 (SIGKILL)" in died.stderr
    assert (tmp_path / "saved" / "step-000000015").is_dir() and not (tmp_path / "end.pt").exists()
    resumed = torchrun(tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    _, alone, _ = run(None)
    for name, value in torch.load(tmp_path / "end.pt").items():
        torch.testing.assert_close(value, alone[name], rtol=1e-4, atol=1e-5)
