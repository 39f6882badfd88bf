"""The warnings and errors of our own; everything else raises Python's ValueError, TypeError and RuntimeError."""

import sys
import warnings


class BKDFastWarning(UserWarning):
    """Something legal that makes the posterior another one than it looks, or much slower."""


class NonFiniteError(ArithmeticError):
    """A gradient or a logit is NaN or infinite; the message names the tensor. Nothing was changed."""


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message says what is missing and how to get it."""


class MissingLibraryError(ImportError):
    """A library that only this call needs is not installed; the message says how to get it."""


class KernelError(RuntimeError):
    """A GPU kernel cannot be compiled or loaded; the message names it, the architecture and what the compiler said."""


def warn(message: str) -> None:
    """A BKDFastWarning that points at the user's line: the first caller outside this package and torch."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("bkd_fast", "torch"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, BKDFastWarning, stacklevel=level)


class StateFileError(RuntimeError):
    """A saved state cannot be written, or what is on disk is not what was saved; the message names the file and why."""
