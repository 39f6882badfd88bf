"""The `reference` backend: the oracle. Plain NumPy and torch, float64 where it matters, never fast."""

from bkd_fast.ops.registry import Backend, add_backend

add_backend(Backend("reference", ("cpu",)))
