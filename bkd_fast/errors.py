"""The warnings and errors of our own; everything else raises Python's ValueError, TypeError and RuntimeError."""


class BKDFastWarning(UserWarning):
    """Something legal that makes the posterior another one than it looks, or much slower."""


class NonFiniteError(ArithmeticError):
    """A gradient or a logit is NaN or infinite; the message names the tensor. Nothing was changed."""


class BackendUnavailableError(RuntimeError):
    """The backend that was asked for cannot run here; the message says what is missing and how to get it."""
