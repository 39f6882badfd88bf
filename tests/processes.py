"""Tests on several processes of one machine, which talk by gloo."""

import datetime
import multiprocessing
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from bkd_fast import BKDFastWarning

# processes are forked from one that has imported these, which takes seconds
multiprocessing.set_forkserver_preload(
    ["bkd_fast.checkpoint", "torch.distributed.checkpoint.state_dict", "torch.distributed.fsdp", "torch._dynamo"]
)
FORKED = multiprocessing.get_context("forkserver")
TIMEOUT = datetime.timedelta(seconds=60)


def in_processes(count: int, function: Callable[..., None], folder: Path, *arguments: Any) -> None:
    """Call function(*arguments) in `count` new processes that make a process group; what one raises is raised here."""
    store = folder / "store"
    store.unlink(missing_ok=True)
    environment = os.environ.copy()
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        mp.start_processes(_run, (count, function, str(store), arguments), nprocs=count, start_method="forkserver")
    finally:
        os.environ.clear()
        os.environ.update(environment)


def _run(rank: int, count: int, function: Callable[..., None], store: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error", BKDFastWarning)  # as in conftest.py
    warnings.filterwarnings("ignore", "another live sampler", BKDFastWarning)
    dist.init_process_group("gloo", store=dist.FileStore(store, count), rank=rank, world_size=count, timeout=TIMEOUT)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
