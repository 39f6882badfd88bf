"""What can be wrong with the numbers of a row of the KD energy, and how it is told: at once, or from a register on the device.

On a CPU an operation raises before anything has happened. On a GPU that would make the host wait, so there the rule is to
record: the row gets energy NaN and gradient 0, and its fault goes as one word into a register of the device, where the first
call's first row stays (kernels/faults.py has the layout). `check_faults` reads the registers, and raises.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bkd_fast.errors import NonFiniteError
from bkd_fast.ops.topk import TopKLogits

# Each fault of csrc/kd.h, whose code is its place here from 1: the error's type, the argument to blame, and what is allowed.
FAULTS: dict[str, tuple[type[Exception], str, str]] = {
    "logits_not_finite": (NonFiniteError, "logits", "must be finite, or -inf where a class is masked"),
    "logits_all_masked": (NonFiniteError, "logits", "must have at least one class that is not masked by -inf"),
    "teacher_not_finite": (NonFiniteError, "teacher", "must be finite, or -inf where a class is masked"),
    "teacher_all_masked": (NonFiniteError, "teacher", "must have at least one class that is not masked by -inf"),
    "teacher_not_probabilities": (ValueError, "teacher", "must be probabilities: not negative, with sum 1"),
    "teacher_on_masked_class": (ValueError, "teacher", "must give no probability to a class whose logit is -inf"),
    "teacher_excludes_class": (
        ValueError,
        "teacher",
        "must give every class that logits do not mask some probability: this prior takes its logarithm",
    ),
    "weights_not_probabilities": (ValueError, "mixture_weights", "must be probabilities: not negative, with sum 1"),
    "target_out_of_range": (ValueError, "target", "must be a class"),
    "target_not_probabilities": (ValueError, "target", "must be probabilities: not negative, with sum 1"),
    "target_on_masked_class": (ValueError, "target", "must not be on a class whose logit is -inf"),
    "teacher_index_out_of_range": (ValueError, "teacher_logits.indices", "must be a class"),
    "teacher_index_repeated": (ValueError, "teacher_logits.indices", "must be distinct in a row"),
    "target_sum_not_one": (ValueError, "target", "must be finite, with sum 1"),
}

LAST_CALL = 4095  # calls are numbered from 0; this number and all above are one


@dataclass(frozen=True, slots=True)
class Fault:
    """An unusable row: which call, chain (leading dimensions of logits, flattened) and row, and what is wrong with it."""

    name: str
    chain: int
    row: int
    call: int
    form: "Form"


@dataclass(frozen=True, slots=True)
class Form:
    """What of a call decides how its rows are called."""

    teacher_is_probs: bool = False
    several_teachers: bool = False
    weights_per_row: bool = False

    def stamp(self, call: int) -> int:
        """The call's number and its form, for the register."""
        return 8 * call + self.teacher_is_probs + 2 * self.several_teachers + 4 * self.weights_per_row


def decode(word: int) -> Fault | None:
    """What a register's word says (kernels/faults.py has the layout)."""
    if word == 0:
        return None
    flags = word >> 4 & 7
    return Fault(
        name=list(FAULTS)[(word & 15) - 1],
        chain=4095 - (word >> 39 & 4095),
        row=2**32 - 1 - (word >> 7 & 2**32 - 1),
        call=4095 - (word >> 51),
        form=Form(bool(flags & 1), bool(flags & 2), bool(flags & 4)),
    )


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a call, as far as they are at hand: logits (..., rows, classes), and as in `kd_energy`; `teacher` holds the
    values of a top-k one."""

    logits: Tensor | None = None
    target: Tensor | None = None
    teacher: Tensor | None = None
    indices: Tensor | None = None
    rest: Tensor | None = None
    weights: Tensor | None = None
    ignore_index: int = -100
    teacher_by_label: bool = False


def error_of(fault: Fault, inputs: Inputs | None = None) -> Exception:
    """The error that names the argument and the row, and its value where it is at hand."""
    error, argument, allowed = FAULTS[fault.name]
    row, form, inputs = fault.row, fault.form, inputs or Inputs()
    where, value = f"{argument}[{row}]", None
    if argument == "logits":
        index = [fault.chain] if fault.chain else []
        if inputs.logits is not None:
            index = _unravel(fault.chain, inputs.logits.shape[:-2])
            value = inputs.logits[(*index, row)]
        where = f"logits{[*index, row]}"
    elif argument == "teacher":
        name = "teacher_probs" if form.teacher_is_probs else "teacher_logits"
        where = f"{name}[:, {row}]" if form.several_teachers else f"{name}[{row}]"
        value = _teacher_row(inputs, row, form)
    elif argument == "teacher_logits.indices":
        place, value = _first_bad_index(fault, inputs)
        where = f"{argument}{[row, *place]}"
        if inputs.logits is not None and fault.name == "teacher_index_out_of_range":
            allowed = f"must be a class in [0, {inputs.logits.shape[-1]})"
    elif argument == "mixture_weights":
        where = f"mixture_weights[{row}]" if form.weights_per_row else "mixture_weights"
        if inputs.weights is not None:
            value = inputs.weights[row] if form.weights_per_row else inputs.weights
    elif inputs.target is not None:
        value = inputs.target[row]
        if fault.name == "target_out_of_range":
            classes = "" if inputs.logits is None else f" in [0, {inputs.logits.shape[-1]})"
            allowed = f"must be a class{classes} or ignore_index = {inputs.ignore_index}"
    return error(f"{where}: {allowed}" if value is None else f"{where} = {_shown(value)}: {allowed}")


def _teacher_row(inputs: Inputs, row: int, form: Form) -> Tensor | None:
    if inputs.teacher is None:
        return None
    if inputs.indices is not None:
        if inputs.logits is None or inputs.rest is None:
            return None
        return TopKLogits(inputs.teacher[row], inputs.indices[row], inputs.rest[row]).dense(inputs.logits.shape[-1])
    if inputs.teacher_by_label:
        if inputs.target is None:
            return None
        row = int(inputs.target[row])
    rows = inputs.teacher.reshape(-1, *inputs.teacher.shape[-2:])
    return rows[:, row] if form.several_teachers else rows[0, row]


def _first_bad_index(fault: Fault, inputs: Inputs) -> tuple[list[int], Tensor | None]:
    """Where in its row of a top-k teacher the class is that cannot be used, and the class; nothing where it is not at hand."""
    if inputs.indices is None or inputs.logits is None:
        return [], None
    before: set[int] = set()
    for place, index in enumerate(inputs.indices[fault.row].tolist()):
        if index in before if fault.name == "teacher_index_repeated" else not 0 <= index < inputs.logits.shape[-1]:
            return [place], inputs.indices[fault.row, place]
        before.add(index)
    return [], None


def _unravel(chain: int, leading: Sequence[int]) -> list[int]:
    index: list[int] = []
    for size in reversed(leading):
        chain, i = divmod(chain, size)
        index.insert(0, i)
    return index


def _shown(value: Tensor) -> str:
    """A row's values, shortened in the middle."""
    if value.dim() == 0:
        return str(value.item())
    if value.dim() > 1:
        return "[" + ", ".join(_shown(row) for row in value) + "]"
    numbers = [f"{x:.6g}" for x in value.tolist()]
    return "[" + ", ".join(numbers if len(numbers) <= 12 else [*numbers[:6], "...", *numbers[-5:]]) + "]"


class Register:
    """The fault register of a device: its word, and of the last call enough to show the row if its tensors still live.

    Attributes:
        word: int64 (1,), on the device as long as the process lives, as captured graphs write to it; 0: no fault.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False):  # the first use may be inside: the word would be read-only for ever
            self.word = torch.zeros(1, dtype=torch.int64, device=device)
        if self.word.is_cuda:  # once: kernels of any stream write to it from now on
            torch.cuda.current_stream(device).synchronize()
        self.calls = 0
        self._last: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._ignore_index, self._teacher_by_label = -100, False

    def begin(self, form: Form, inputs: Inputs) -> int:
        """Number a call; returns its stamp."""
        call = min(self.calls, LAST_CALL)
        if _capturing(self.word):
            return form.stamp(LAST_CALL)  # its numbers are those of whichever replay
        self.calls += 1
        self._ignore_index, self._teacher_by_label = inputs.ignore_index, inputs.teacher_by_label
        named = {name: getattr(inputs, name) for name in ("logits", "target", "teacher", "indices", "rest", "weights")}
        self._last = {
            name: (weakref.ref(tensor), tensor._version)
            for name, tensor in named.items()
            if tensor is not None and not tensor.is_inference()
        }
        return form.stamp(call)

    def take(self) -> Exception | None:
        """The error of the first fault since the last look, if there was one. Waits for the device; clears the register."""
        if _capturing(self.word):
            raise RuntimeError("check() waits for the device: must not be called while a CUDA graph is being captured")
        if self.word.is_cuda:
            torch.cuda.synchronize(self.word.device)
        fault = decode(int(self.word.item()))
        last_call, self.calls = self.calls - 1, 0
        if fault is None:
            return None
        self.word.zero_()
        # what was written to since then is no longer what was faulty
        alive = {name: tensor for name, (ref, version) in self._last.items() if (tensor := ref()) is not None
                 and tensor._version == version}  # fmt: skip
        at_hand = fault.call == last_call < LAST_CALL
        inputs = Inputs(**alive, ignore_index=self._ignore_index, teacher_by_label=self._teacher_by_label)
        return error_of(fault, inputs if at_hand else None)


_REGISTERS: dict[torch.device, Register] = {}


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def records(device: torch.device) -> bool:
    """Whether faults on a device are recorded, not raised at once."""
    return device.type == "cuda"


def register_of(device: torch.device) -> Register:
    """The register of a device, made at its first use.

    Raises:
        RuntimeError: that use is inside a CUDA graph's capture, whose memory the register must not be part of.
    """
    register = _REGISTERS.get(device)
    if register is None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                f"the first KD energy on {device} is being captured into a CUDA graph: must run once before the capture, so "
                "that its kernels are compiled and its fault register exists"
            )
        register = _REGISTERS.setdefault(device, Register(device))
    return register


def check_faults() -> None:
    """Raise the error of the first unusable row since the last call, on any device, once. Waits for the devices that have
    computed KD energies.

    Raises:
        ValueError, NonFiniteError: as the operation raises on a CPU, with the row's values if they still exist.
    """
    errors = [register.take() for register in _REGISTERS.values()]
    for error in errors:
        if error is not None:
            raise error
