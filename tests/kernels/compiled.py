"""Compile every variant of tests/kernels/variants_*.py for every architecture, in parallel; print one JSON object per line.

A program, not a module of tests: it must run where TRITON_INTERPRET is not set. sass.py says how to use it.
"""

import argparse
import contextlib
import json
import os
import pickle
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

from sass import CAPABILITIES, summary, violations  # noqa: E402

PINNED = (
    "3.6.0"  # the Triton whose instruction counts the budgets state; nvrtc's are held where its version is NVRTC_PINNED
)
NVRTC_PINNED = (13, 0)


def operations() -> list[str]:
    return sorted(path.stem.removeprefix("variants_") for path in HERE.glob("variants_*.py"))


def file_name(operation: str, variant: str, capability: int) -> str:
    """What a variant's files are called, less their suffix."""
    return "".join(c if c.isalnum() else "_" for c in f"{operation} {variant} sm_{capability}")


def report(operation: str, index: int, capability: int, listings: str | None) -> dict[str, object]:
    """Compile one variant; what it breaks, and a line about it."""
    variant = import_module(f"variants_{operation}").VARIANTS[index]
    result = {"operation": operation, "variant": variant.name, "capability": capability}
    try:
        # compilers print what they like: standard output is the JSON's
        with contextlib.redirect_stdout(sys.stderr):
            code = variant.compile(capability)
    except Exception as error:  # a failure to compile is a result: the test prints it
        return {**result, "summary": "", "violations": [f"does not compile: {type(error).__name__}: {error}"]}
    if listings is not None:
        name = file_name(operation, variant.name, capability)
        Path(listings, name + ".sass").write_text(code.listing)
        Path(listings, name + ".pickle").write_bytes(pickle.dumps(code))
    return {
        **result,
        "summary": summary(code, variant.budget),
        "violations": violations(code, variant.budget, is_pinned(variant)),
    }


def is_pinned(variant: object) -> bool:
    if hasattr(variant, "source"):
        from cupy_backends.cuda.libs import nvrtc

        return tuple(nvrtc.getVersion()) == NVRTC_PINNED
    import triton

    return bool(triton.__version__ == PINNED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("operations", nargs="*", default=operations(), help="of variants_<operation>.py; all of them")
    parser.add_argument("--json", action="store_true", help="one JSON object per line, for the test")
    parser.add_argument("--sass", metavar="DIR", help="write each listing into DIR, and its MachineCode as a pickle")
    arguments = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1 is set: Triton would interpret its kernels instead of compiling them")
    if arguments.sass:
        Path(arguments.sass).mkdir(parents=True, exist_ok=True)
    jobs = [
        (operation, index, capability, arguments.sass)
        for operation in arguments.operations
        for index in range(len(import_module(f"variants_{operation}").VARIANTS))
        for capability in CAPABILITIES
    ]
    with ProcessPoolExecutor(max(1, min(os.cpu_count() or 1, len(jobs))), mp_context=get_context("spawn")) as pool:
        for result in pool.map(report, *zip(*jobs, strict=True)):
            if arguments.json:
                print(json.dumps(result), flush=True)
            else:
                print(f"sm_{result['capability']} {result['operation']}, {result['variant']}: {result['summary']}")
                for violation in result["violations"]:
                    print(f"    {violation}", flush=True)


if __name__ == "__main__":
    main()
