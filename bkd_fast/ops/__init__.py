"""The operations. Each module declares one: its schema, checks, fake implementation and autograd.

Backends implement each under the same module name; `registry` picks one. Those of the GPU are loaded at their first use.
"""

from importlib import import_module

from bkd_fast.ops.registry import backends, use_backend

OPERATIONS = ("noise", "langevin", "kd", "sketch", "predictive", "head")
BACKENDS = ("cpp", "triton", "cuda", "reference")  # preferred first

for _backend in BACKENDS:
    import_module(f"bkd_fast.ops.{_backend}")
for _operation in OPERATIONS:
    import_module(f"bkd_fast.ops.cpp.{_operation}")
    import_module(f"bkd_fast.ops.reference.{_operation}")

__all__ = ["backends", "use_backend"]
