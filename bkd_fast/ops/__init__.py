"""The operations. Each module declares one: its schema, checks, fake implementation and autograd.

Backends (`cpp`, `reference`) implement each under the same module name; `registry` picks one.
"""

from importlib import import_module

from bkd_fast.ops.registry import backends, use_backend

OPERATIONS = ("noise", "langevin", "kd", "sketch", "predictive")
BACKENDS = ("cpp", "reference")  # preferred first

for _backend in BACKENDS:
    import_module(f"bkd_fast.ops.{_backend}")
    for _operation in OPERATIONS:
        import_module(f"bkd_fast.ops.{_backend}.{_operation}")

__all__ = ["backends", "use_backend"]
