"""The rules by which a Langevin step moves an element: what each keeps and is given. csrc/langevin.h has their maths."""

from dataclasses import dataclass

OWN_NUMBERS = 6  # at most


@dataclass(frozen=True)
class Rule:
    """What a rule needs beside theta, its gradient, lr, decay and sigma.

    Attributes:
        states: arrays that it keeps, like theta in the type of the arithmetic.
        own: numbers of its own, in the order of csrc/langevin.h.
    """

    states: int
    own: int


RULES = {
    "sgld": Rule(states=0, own=0),
    "sghmc": Rule(states=1, own=2),
    "nesterov": Rule(states=1, own=2),
    "rmsprop": Rule(states=1, own=3),
    "adam": Rule(states=2, own=6),
    "sgnht": Rule(states=2, own=2),
    "baoab": Rule(states=1, own=2),
}


def bytes_per_parameter(rule: str, size: int = 4) -> int:
    """Bytes of memory that one step of a rule moves for a parameter of `size` bytes, without prior mean, moments or master:
    theta and every state read and written, the gradient read."""
    real = 8 if size == 8 else 4
    return 3 * size + 2 * real * RULES[rule].states
