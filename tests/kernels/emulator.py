"""Executes the machine code of a kernel in NumPy, all threads of a launch at once: what a GPU would compute, without a GPU.

    memory = Memory()
    x = memory.put(numpy_array)
    launch(code, memory, grid=2, block=128, arguments=[np.uint64(x), np.int32(n)], capability=90)
    result = memory.get(x)

It knows the instructions that this project's kernels are made of (sm_80 and sm_90, as nvdisasm prints them) and raises on any
other. Registers are arrays with an entry per thread, the uniform ones too: where a kernel moves a value to a uniform register it
checks that the threads of a warp agree. Threads that part at a branch wait at the higher address until the others arrive.
Every access to global memory must be aligned and inside an array that was `put`: a memory checker comes for free.

The approximate reciprocal root is the only instruction whose result NVIDIA does not define; `rsqrt_ulps` shifts it from the
correctly rounded one (its documented error is 2^-22.9, relative: at most 2 units in the last place).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sass import MachineCode, parse

from bkd_fast.kernels.exact import fma

Words = NDArray[np.uint32]

WARP = 32
PARAMETERS = {80: 0x160, 90: 0x210}  # where a kernel's arguments begin in constant bank 0
_GAP = 256  # bytes between arrays that nobody may touch
_BASE = 0x7F0000000000  # of global memory; high, so that dropped upper words are noticed


class Memory:
    """Global memory: arrays at addresses, with forbidden gaps between them."""

    def __init__(self) -> None:
        self.bytes = np.zeros(0, np.uint8)
        self.allowed = np.zeros(0, bool)
        self._arrays: dict[int, tuple[int, np.dtype[Any], tuple[int, ...]]] = {}

    def put(self, array: NDArray[Any], misaligned_by: int = 0) -> int:
        """The address of a copy: a multiple of 256, plus `misaligned_by`."""
        begin = self.bytes.size + _GAP + misaligned_by
        end = begin + array.nbytes
        size = -(-(end + _GAP) // 256) * 256
        bytes_, allowed = np.zeros(size, np.uint8), np.zeros(size, bool)
        bytes_[: self.bytes.size], allowed[: self.allowed.size] = self.bytes, self.allowed
        bytes_[begin:end] = np.frombuffer(array.tobytes(), np.uint8)
        allowed[begin:end] = True
        self.bytes, self.allowed = bytes_, allowed
        self._arrays[_BASE + begin] = (array.nbytes, array.dtype, array.shape)
        return _BASE + begin

    def get(self, address: int) -> NDArray[Any]:
        """What lies there now."""
        size, dtype, shape = self._arrays[address]
        begin = address - _BASE
        return np.frombuffer(self.bytes[begin : begin + size].tobytes(), dtype).reshape(shape)


def launch(
    code: MachineCode,
    memory: Memory,
    *,
    grid: int,
    block: int,
    arguments: Sequence[Any],
    capability: int,
    rsqrt_ulps: int = 0,
) -> None:
    """Run `grid` blocks of `block` threads; `arguments` are NumPy scalars, laid out as a C struct would be."""
    constants = bytearray(PARAMETERS[capability])
    constants[0:4] = np.uint32(block).tobytes()
    for argument in arguments:
        value = np.asarray(argument)
        constants.extend(bytes(-(len(constants) - PARAMETERS[capability]) % value.itemsize))
        constants.extend(value.tobytes())
    constants.extend(bytes(64))  # what compilers add behind: scratch addresses, which our kernels do not use
    with np.errstate(all="ignore"):  # as the hardware, which does not complain
        _Threads(code, memory, grid, block, bytes(constants), rsqrt_ulps).run()


@dataclass(frozen=True)
class _Step:
    """An instruction, read."""

    predicate: str | None  # "P0", "!UP1"
    opcode: str  # the uniform datapath's opcodes without their U: registers say the rest
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]
    target: int | None  # of a jump
    text: str


@cache
def _read(listing: str) -> tuple[_Step, ...]:
    instructions, targets = parse(listing.splitlines())
    steps = []
    for instruction in instructions:
        text = re.sub(r"\.reuse\b", "", instruction.text)
        predicate, text = re.match(r"(?:@(!?\w+)\s+)?(.*)", text).groups()  # type: ignore[union-attr]
        name, _, rest = text.partition(" ")
        opcode, *modifiers = name.split(".")
        if opcode.startswith("U") and opcode[1:] in _OPERATIONS:
            opcode = opcode[1:]
        operands = tuple(part.strip() for part in rest.split(",")) if rest.strip() else ()
        label = re.search(r"`\((\S+?)\)", rest)
        target = targets.get(label[1]) if label else None
        steps.append(_Step(predicate, opcode, tuple(modifiers), operands, target, instruction.text))
    return tuple(steps)


_OPERATIONS: dict[str, Callable[["_Threads", _Step], None]] = {}


def _operation(*opcodes: str) -> Callable[[Callable[["_Threads", _Step], None]], Callable[["_Threads", _Step], None]]:
    def register(function: Callable[["_Threads", _Step], None]) -> Callable[["_Threads", _Step], None]:
        _OPERATIONS.update(dict.fromkeys(opcodes, function))
        return function

    return register


def _constant(value: int) -> Words:
    return np.array([value & 0xFFFFFFFF], np.uint32)


class _Threads:
    """All threads of a launch: registers, predicates, and who waits where."""

    def __init__(
        self, code: MachineCode, memory: Memory, grid: int, block: int, constants: bytes, rsqrt_ulps: int
    ) -> None:
        self.steps = _read(code.listing)
        self.memory, self.constants, self.rsqrt_ulps = memory, constants, rsqrt_ulps
        self.count = grid * block
        self.block, self.thread = np.divmod(np.arange(self.count, dtype=np.uint32), np.uint32(block))
        self.shared = np.zeros((grid, max(code.shared, 1)), np.uint8)
        self.registers: dict[str, Words] = {}
        self.predicates: dict[str, NDArray[np.bool_]] = {}
        self.here = np.ones(self.count, bool)  # the threads that execute the current instruction

    def run(self) -> None:
        waiting = {0: self.here}
        while waiting:
            position = min(waiting)
            mask = waiting.pop(position)
            step = self.steps[position]
            self.here = mask if step.predicate is None else mask & self.truth(step.predicate)
            if step.opcode == "EXIT":
                mask = mask & ~self.here
            elif step.opcode in ("BRA", "CALL"):
                if step.target is None:
                    raise NotImplementedError(step.text)
                self._wait(waiting, step.target, self.here)
                mask = mask & ~self.here
            elif step.opcode not in ("BSSY", "BSYNC", "WARPSYNC", "BAR", "NOP"):  # threads meet without them
                function = _OPERATIONS.get(step.opcode)
                if function is None:
                    raise NotImplementedError(f"the emulator does not know {step.text}")
                if self.here.any():
                    function(self, step)
            self._wait(waiting, position + 1, mask)

    @staticmethod
    def _wait(waiting: dict[int, NDArray[np.bool_]], position: int, mask: NDArray[np.bool_]) -> None:
        if mask.any():
            waiting[position] = waiting[position] | mask if position in waiting else mask

    # ---- operands ----

    def word(self, operand: str) -> Words:
        """A 32-bit integer operand."""
        sign, name, bars = _split(operand)
        value = self._raw(name)
        if bars:
            value = np.abs(value.view(np.int32)).view(np.uint32)
        if sign == "-":
            value = (~value) + np.uint32(1)
        return ~value if sign == "~" else value

    def real(self, operand: str) -> NDArray[np.float32]:
        sign, name, bars = _split(operand)
        if _is_register(name) or name.startswith("c["):
            value = self._raw(name).view(np.float32)
        else:
            value = np.array([float(name.replace("QNAN", "nan").replace("INF", "inf"))], np.float32)
        if bars:
            value = np.abs(value)
        return -value if sign == "-" else value

    def long(self, operand: str) -> NDArray[np.uint64]:
        """A 64-bit operand: a pair of registers."""
        sign, name, _ = _split(operand)
        value = self._raw(name).astype(np.uint64)
        if _is_register(name) or name.startswith("c["):
            upper = self._raw(_next(name)) if _is_register(name) else self._constant_bank(name, 4)
            value = value | upper.astype(np.uint64) << np.uint64(32)
        if sign == "-":
            value = (~value) + np.uint64(1)
        return ~value if sign == "~" else value

    def double(self, operand: str) -> NDArray[np.float64]:
        sign, name, bars = _split(operand)
        if _is_register(name) or name.startswith("c["):
            value = np.ascontiguousarray(self.long(name)).view(np.float64)
        else:
            value = np.array([float(name.replace("INF", "inf"))])
        if bars:
            value = np.abs(value)
        return -value if sign == "-" else value

    def truth(self, operand: str) -> NDArray[np.bool_]:
        negate, name = operand.startswith("!"), operand.lstrip("!")
        if name in ("PT", "UPT"):
            value = np.ones(self.count, bool)
        elif re.fullmatch(r"U?P\d", name):
            value = self.predicates.get(name, np.zeros(self.count, bool))
        else:
            raise NotImplementedError(f"the predicate {operand}")
        return ~value if negate else value

    def _raw(self, name: str) -> Words:
        name = name.removesuffix(".64")
        if name in ("RZ", "URZ", "SRZ"):
            return _constant(0)
        if _is_register(name):
            return self.registers.get(name, np.zeros(self.count, np.uint32))
        if name.startswith("c["):
            return self._constant_bank(name, 0)
        return _constant(int(name, 0))

    def _constant_bank(self, name: str, plus: int) -> Words:
        found = re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+|RZ)\]", name)
        if found is None:
            raise NotImplementedError(f"the constant {name}")
        at = plus + (0 if found[1] == "RZ" else int(found[1], 0))
        return np.frombuffer(self.constants[at : at + 4], np.uint32)

    # ---- results ----

    def put_word(self, name: str, value: Words) -> None:
        if name in ("RZ", "URZ"):
            return
        if not _is_register(name):
            raise NotImplementedError(f"the destination {name}")
        value = np.broadcast_to(value.astype(np.uint32, copy=False), (self.count,))
        old = self.registers.get(name)
        self.registers[name] = value if old is None or self.here.all() else np.where(self.here, value, old)

    def put_long(self, name: str, value: NDArray[np.uint64]) -> None:
        self.put_word(name, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32))
        if name not in ("RZ", "URZ"):
            self.put_word(_next(name), (value >> np.uint64(32)).astype(np.uint32))

    def put_real(self, name: str, value: NDArray[np.float32]) -> None:
        self.put_word(name, np.ascontiguousarray(value.astype(np.float32, copy=False)).view(np.uint32))

    def put_double(self, name: str, value: NDArray[np.float64]) -> None:
        self.put_long(name, np.ascontiguousarray(value).view(np.uint64))

    def put_truth(self, name: str, value: NDArray[np.bool_]) -> None:
        if name in ("PT", "UPT"):
            return
        old = self.predicates.get(name, np.zeros(self.count, bool))
        self.predicates[name] = np.where(self.here, value, old)


def _split(operand: str) -> tuple[str, str, bool]:
    """Sign, name, and whether it stands between bars."""
    found = re.fullmatch(r"([-~+]?)(\|?)(.+?)\|?", operand)
    assert found is not None, operand
    return found[1], found[3], bool(found[2])


def _is_register(name: str) -> bool:
    return re.fullmatch(r"U?R(\d+|Z)", name) is not None


def _next(name: str) -> str:
    found = re.fullmatch(r"(U?R)(\d+|Z)", name)
    assert found is not None, name
    return name if found[2] == "Z" else f"{found[1]}{int(found[2]) + 1}"


def _is_predicate(operand: str) -> bool:
    return re.fullmatch(r"!?U?P(\d|T)", operand) is not None


def _carries(operands: tuple[str, ...]) -> tuple[str, list[str], list[str], list[str]]:
    """Destination, predicates that take carries, operands, predicates that bring carries."""
    rest = list(operands[1:])
    out = []
    while _is_predicate(rest[0]):
        out.append(rest.pop(0))
    into = []
    while _is_predicate(rest[-1]):
        into.insert(0, rest.pop())
    return operands[0], out, rest, into


# ---- integers ----


def _minus(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """-x of a 32-bit x as ~x + 1, whose carry counts: 2^32 for 0."""
    return (x ^ np.uint64(0xFFFFFFFF)) + np.uint64(1)


@_operation("MOV")
def _mov(t: _Threads, s: _Step) -> None:
    t.put_word(s.operands[0], t.word(s.operands[1]))


@_operation("R2UR")
def _to_uniform(t: _Threads, s: _Step) -> None:
    value = np.broadcast_to(t.word(s.operands[-1]), (t.count,))
    warps = np.where(t.here, value, np.uint32(0)).reshape(-1, WARP)
    here = t.here.reshape(-1, WARP)
    first = warps[np.arange(len(warps)), here.argmax(axis=1)][:, None]
    assert np.all((warps == first) | ~here), f"threads of a warp differ: {s.text}"
    t.put_word(s.operands[0], value)


@_operation("CS2R")
def _zero_pair(t: _Threads, s: _Step) -> None:
    if s.operands[1] != "SRZ":
        raise NotImplementedError(s.text)
    t.put_word(s.operands[0], _constant(0))
    if "32" not in s.modifiers:
        t.put_word(_next(s.operands[0]), _constant(0))


@_operation("S2R", "S2UR")
def _special(t: _Threads, s: _Step) -> None:
    values = {"SR_TID.X": t.thread, "SR_CTAID.X": t.block, "SR_CgaCtaId": _constant(0)}
    if s.operands[1] not in values:
        raise NotImplementedError(s.text)
    t.put_word(s.operands[0], values[s.operands[1]])


@_operation("LDC")
def _load_constant(t: _Threads, s: _Step) -> None:
    t.put_word(s.operands[0], t._constant_bank(s.operands[1], 0))
    if "64" in s.modifiers:
        t.put_word(_next(s.operands[0]), t._constant_bank(s.operands[1], 4))


@_operation("IADD3", "VIADD")
def _add(t: _Threads, s: _Step) -> None:
    to, out, terms, into = _carries(s.operands)
    total = np.zeros(t.count, np.uint64)
    for term in terms:
        value = t.word(term.lstrip("-")).astype(np.uint64)
        total = total + (_minus(value) if term.startswith("-") else value)
    for carry in into:
        total = total + t.truth(carry)
    if len(out) == 2 and out[1] not in ("PT", "UPT"):
        raise NotImplementedError(s.text)
    if out:
        t.put_truth(out[0], (total >> np.uint64(32)) != 0)
    t.put_word(to, (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))


@_operation("IMAD")
def _multiply_add(t: _Threads, s: _Step) -> None:
    to, out, (a, b, c), into = _carries(s.operands)
    if out and out[0] not in ("PT", "UPT"):
        raise NotImplementedError(s.text)
    if "WIDE" in s.modifiers or "HI" in s.modifiers:
        if "U32" in s.modifiers:
            product = t.word(a).astype(np.uint64) * t.word(b).astype(np.uint64)
        else:
            signed = t.word(a).view(np.int32).astype(np.int64) * t.word(b).view(np.int32).astype(np.int64)
            product = signed.view(np.uint64)
        total = product + t.long(c)
        if "WIDE" in s.modifiers:
            t.put_long(to, total)
        else:
            t.put_word(to, (total >> np.uint64(32)).astype(np.uint32))
        return
    total32 = t.word(a) * t.word(b) + t.word(c)
    for carry in into:
        total32 = total32 + t.truth(carry).astype(np.uint32)
    t.put_word(to, total32)


@_operation("LEA")
def _shift_add(t: _Threads, s: _Step) -> None:
    to, out, terms, into = _carries(s.operands)
    shift = np.uint64(int(terms[-1], 0))
    negated = terms[0].startswith("-")
    if negated and "HI" in s.modifiers:
        raise NotImplementedError(s.text)
    low = t.word(terms[0].lstrip("-"))
    value = low.astype(np.uint64)
    if "HI" in s.modifiers:
        if "SX32" in s.modifiers:
            value = low.view(np.int32).astype(np.int64).view(np.uint64)
        else:
            value = value | t.word(terms[2]).astype(np.uint64) << np.uint64(32)
        shifted = (value << shift) >> np.uint64(32)
    else:
        shifted = (value << shift) & np.uint64(0xFFFFFFFF)
        if negated:
            shifted = _minus(shifted)
    total = shifted + t.word(terms[1])
    for carry in into:
        total = total + t.truth(carry)
    if out:
        t.put_truth(out[0], (total >> np.uint64(32)) != 0)
    t.put_word(to, (total & np.uint64(0xFFFFFFFF)).astype(np.uint32))


@_operation("SHF")
def _funnel_shift(t: _Threads, s: _Step) -> None:
    to, low, amount, high = s.operands
    pair = t.word(low).astype(np.uint64) | t.word(high).astype(np.uint64) << np.uint64(32)
    by = np.uint64(int(amount, 0))  # ours are all constant
    upper = np.uint64(32)
    if "L" in s.modifiers:  # the pair to the left; .HI: its upper word
        shifted = pair << by
        value = shifted >> upper if "HI" in s.modifiers else shifted
    elif "HI" in s.modifiers:  # the upper word to the right
        if "S32" in s.modifiers:
            value = (t.word(high).view(np.int32) >> np.int32(by)).view(np.uint32).astype(np.uint64)
        else:
            value = pair >> upper >> by
    else:  # the pair to the right, its lower word
        value = (pair.view(np.int64) >> by.astype(np.int64)).view(np.uint64) if "S64" in s.modifiers else pair >> by
    t.put_word(to, (value & np.uint64(0xFFFFFFFF)).astype(np.uint32))


@_operation("SGXT")
def _extend(t: _Threads, s: _Step) -> None:
    bits = 32 - int(s.operands[2], 0)
    value = t.word(s.operands[1]) << np.uint32(bits)
    signed = "U32" not in s.modifiers
    extended = (value.view(np.int32) >> np.int32(bits)).view(np.uint32) if signed else value >> np.uint32(bits)
    t.put_word(s.operands[0], extended)


@_operation("LOP3")
def _logic(t: _Threads, s: _Step) -> None:
    operands = list(s.operands)
    verdict = operands.pop(0) if _is_predicate(operands[0]) else None
    to, a, b, c, table = operands[:5]
    value = _lookup([t.word(a), t.word(b), t.word(c)], int(table, 0))
    if verdict is not None:
        t.put_truth(verdict, np.broadcast_to(value != 0, (t.count,)))
    t.put_word(to, value)


def _lookup(inputs: list[Any], table: int) -> Any:
    """Any Boolean function of three inputs: bit 4 a + 2 b + c of the table."""
    a, b, c = inputs
    value = np.zeros(np.broadcast(a, b, c).shape, a.dtype)
    for case in range(8):
        if table >> case & 1:
            value = value | ((a if case & 4 else ~a) & (b if case & 2 else ~b) & (c if case & 1 else ~c))
    return value


@_operation("PLOP3")
def _predicate_logic(t: _Threads, s: _Step) -> None:
    first, second, a, b, c, table, second_table = s.operands
    inputs = [t.truth(name) for name in (a, b, c)]
    one, two = _lookup(inputs, int(table, 0)), _lookup(inputs, int(second_table, 0))
    t.put_truth(first, one)
    t.put_truth(second, two)


@_operation("PRMT")
def _permute_bytes(t: _Threads, s: _Step) -> None:
    to, a, selector, b = s.operands
    pair = t.word(a).astype(np.uint64) | t.word(b).astype(np.uint64) << np.uint64(32)
    choice = int(selector, 0)
    value = np.zeros(t.count, np.uint32)
    for byte in range(4):
        code = choice >> 4 * byte & 0xF
        chosen = (pair >> np.uint64(8 * (code & 7))).astype(np.uint32) & np.uint32(0xFF)
        if code & 8:
            chosen = (chosen >> np.uint32(7)) * np.uint32(0xFF)
        value = value | chosen << np.uint32(8 * byte)
    t.put_word(to, value)


@_operation("P2R")
def _predicates_to_word(t: _Threads, s: _Step) -> None:
    to, _, other, mask = s.operands
    value = t.word(other) & np.uint32(~int(mask, 0) & 0xFFFFFFFF)
    for bit in range(7):
        if int(mask, 0) >> bit & 1:
            value = value | t.truth(f"P{bit}").astype(np.uint32) << np.uint32(bit)
    t.put_word(to, value)


@_operation("R2P")
def _word_to_predicates(t: _Threads, s: _Step) -> None:
    _, source, mask = s.operands
    for bit in range(7):
        if int(mask, 0) >> bit & 1:
            t.put_truth(f"P{bit}", (t.word(source) >> np.uint32(bit) & np.uint32(1)) != 0)


@_operation("SEL", "FSEL")
def _select(t: _Threads, s: _Step) -> None:
    to, a, b, choice = s.operands
    one, two = (t.word(x) if s.opcode == "SEL" else t.real(x).view(np.uint32) for x in (a, b))
    t.put_word(to, np.where(t.truth(choice), one, two))


@_operation("IMNMX", "VIMNMX", "VIMNMX3")
def _integer_minimum(t: _Threads, s: _Step) -> None:
    to, *terms, choice = s.operands
    kind = np.uint32 if "U32" in s.modifiers else np.int32
    values = [t.word(term).view(kind) for term in terms]
    least, greatest = (reduce(pick, values) for pick in (np.minimum, np.maximum))
    t.put_word(to, np.where(t.truth(choice), least, greatest).view(np.uint32))


@_operation("VIADDMNMX")
def _add_minimum(t: _Threads, s: _Step) -> None:
    to, a, b, c, choice = s.operands
    if "U32" in s.modifiers:
        raise NotImplementedError(s.text)
    total, limit = (t.word(a) + t.word(b)).view(np.int32), t.word(c).view(np.int32)
    value = np.where(t.truth(choice), np.minimum(total, limit), np.maximum(total, limit))
    if "RELU" in s.modifiers:
        value = np.maximum(value, 0)
    t.put_word(to, value.view(np.uint32))


def _compare(how: str, a: Any, b: Any) -> Any:
    comparisons: dict[str, Callable[[Any, Any], Any]] = {
        "LT": np.less, "LE": np.less_equal, "GT": np.greater, "GE": np.greater_equal, "EQ": np.equal, "NE": np.not_equal,
    }  # fmt: skip
    return comparisons[how](a, b)


def _combine(t: _Threads, s: _Step, found: Any, other: str) -> None:
    """Two results: the comparison and its opposite, each joined with a third predicate."""
    join = np.logical_or if "OR" in s.modifiers else np.logical_xor if "XOR" in s.modifiers else np.logical_and
    third = t.truth(other)
    one, two = join(found, third), join(~np.asarray(found), third)
    t.put_truth(s.operands[0], one)
    t.put_truth(s.operands[1], two)


@_operation("ISETP")
def _compare_integers(t: _Threads, s: _Step) -> None:
    kind = np.uint32 if "U32" in s.modifiers else np.int32
    how = s.modifiers[0]
    a, b = t.word(s.operands[2]).view(kind), t.word(s.operands[3]).view(kind)
    found = _compare(how, a, b)
    if "EX" in s.modifiers:  # the upper words of a 64-bit comparison; the lower words' result is the last operand
        low = t.truth(s.operands[5])
        if how == "EQ":
            found = found & low
        elif how == "NE":
            found = found | low
        else:
            found = np.where(a == b, low, found)
    _combine(t, s, found, s.operands[4])


# ---- reals ----


@_operation("FSETP")
def _compare_reals(t: _Threads, s: _Step) -> None:
    how = s.modifiers[0]
    a, b = t.real(s.operands[2]), t.real(s.operands[3])
    unordered = np.isnan(a) | np.isnan(b)
    if len(how) == 3 and how.endswith("U"):  # true where a NaN is involved
        found = _compare(how[:2], a, b) | unordered
    else:
        found = _compare(how, a, b) & ~unordered
    _combine(t, s, found, s.operands[4])


@_operation("FADD")
def _add_reals(t: _Threads, s: _Step) -> None:
    t.put_real(s.operands[0], t.real(s.operands[1]) + t.real(s.operands[2]))


@_operation("FMUL")
def _multiply_reals(t: _Threads, s: _Step) -> None:
    t.put_real(s.operands[0], t.real(s.operands[1]) * t.real(s.operands[2]))


@_operation("FFMA")
def _fma_reals(t: _Threads, s: _Step) -> None:
    t.put_real(s.operands[0], fma(*(t.real(x) for x in s.operands[1:4])))


@_operation("FMNMX")
def _minimum(t: _Threads, s: _Step) -> None:
    to, a, b, choice = s.operands
    one, two = t.real(a), t.real(b)
    t.put_real(to, np.where(t.truth(choice), np.fmin(one, two), np.fmax(one, two)))


@_operation("MUFU")
def _reciprocal_root(t: _Threads, s: _Step) -> None:
    if s.modifiers != ("RSQ",):
        raise NotImplementedError(s.text)
    exact = 1 / np.sqrt(t.real(s.operands[1]).astype(np.float64))
    bits = exact.astype(np.float32).view(np.int32) + np.int32(t.rsqrt_ulps)
    t.put_word(s.operands[0], bits.view(np.uint32))


@_operation("DADD")
def _add_doubles(t: _Threads, s: _Step) -> None:
    t.put_double(s.operands[0], t.double(s.operands[1]) + t.double(s.operands[2]))


@_operation("DMUL")
def _multiply_doubles(t: _Threads, s: _Step) -> None:
    t.put_double(s.operands[0], t.double(s.operands[1]) * t.double(s.operands[2]))


@_operation("DFMA")
def _fma_doubles(t: _Threads, s: _Step) -> None:
    t.put_double(s.operands[0], fma(*(t.double(x) for x in s.operands[1:4])))


@_operation("I2F", "I2FP")
def _integer_to_real(t: _Threads, s: _Step) -> None:
    if set(s.modifiers) - {"F32", "S32", "U32"}:
        raise NotImplementedError(s.text)
    value = t.word(s.operands[1])
    t.put_real(s.operands[0], (value if "U32" in s.modifiers else value.view(np.int32)).astype(np.float32))


@_operation("F2I")
def _real_to_integer(t: _Threads, s: _Step) -> None:
    if s.modifiers not in (("TRUNC", "NTZ"), ("U32", "TRUNC", "NTZ")):
        raise NotImplementedError(s.text)
    low, high = (0, 2**32 - 1) if "U32" in s.modifiers else (-(2**31), 2**31 - 1)
    value = np.nan_to_num(np.trunc(t.real(s.operands[1]).astype(np.float64)), nan=0.0)
    t.put_word(s.operands[0], (np.clip(value, low, high).astype(np.int64) & 0xFFFFFFFF).astype(np.uint32))


@_operation("F2F")
def _convert_real(t: _Threads, s: _Step) -> None:
    if s.modifiers == ("F64", "F32"):
        t.put_double(s.operands[0], t.real(s.operands[1]).astype(np.float64))
    elif s.modifiers == ("F32", "F64"):
        t.put_real(s.operands[0], t.double(s.operands[1]).astype(np.float32))
    elif s.modifiers in (("BF16", "F32"), ("F16", "F32")):
        t.put_word(s.operands[0], (_bfloat16 if s.modifiers[0] == "BF16" else _half)(t.real(s.operands[1])))
    else:
        raise NotImplementedError(s.text)


@_operation("F2FP")
def _pack_halves(t: _Threads, s: _Step) -> None:
    """Two reals to 16 bits each: to bfloat16 where the modifiers say so, else to IEEE half."""
    to, high, low = s.operands
    narrow = _bfloat16 if "BF16" in s.modifiers else _half
    t.put_word(to, narrow(t.real(high)) << np.uint32(16) | narrow(t.real(low)))


def _half(x: NDArray[np.float32]) -> Words:
    return x.astype(np.float16).view(np.uint16).astype(np.uint32)


def _bfloat16(x: NDArray[np.float32]) -> Words:
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded)


@_operation("HADD2")
def _widen_half(t: _Threads, s: _Step) -> None:
    """Used to widen one half: -0 + h."""
    if s.modifiers != ("F32",) or s.operands[1] != "-RZ":
        raise NotImplementedError(s.text)
    name, _, half = s.operands[2].partition(".")
    bits = t.word(name) >> np.uint32(16 if half == "H1_H1" else 0) & np.uint32(0xFFFF)
    t.put_real(s.operands[0], bits.astype(np.uint16).view(np.float16).astype(np.float32))


@_operation("HFMA2")
def _two_constants(t: _Threads, s: _Step) -> None:
    """Used to load a constant: 0 * 0 + (two halves)."""
    to, a, b, high, low = s.operands
    if (a, b) != ("-RZ", "RZ"):
        raise NotImplementedError(s.text)
    halves = [
        int(np.float16(float(x.replace("QNAN", "nan").replace("INF", "inf"))).view(np.uint16)) for x in (high, low)
    ]
    t.put_word(to, _constant(halves[0] << 16 | halves[1]))


# ---- memory ----


@_operation("LDG")
def _load_global(t: _Threads, s: _Step) -> None:
    _load(t, s, _global_offsets(t, s, s.operands[1]), t.memory.bytes)


@_operation("STG")
def _store_global(t: _Threads, s: _Step) -> None:
    _store(t, s, _global_offsets(t, s, s.operands[0]), t.memory.bytes)


@_operation("LDS")
def _load_shared(t: _Threads, s: _Step) -> None:
    _load(t, s, _shared_offsets(t, s, s.operands[1]), t.shared.reshape(-1))


@_operation("STS")
def _store_shared(t: _Threads, s: _Step) -> None:
    _store(t, s, _shared_offsets(t, s, s.operands[0]), t.shared.reshape(-1))


@_operation("LDSM")
def _load_matrices(t: _Threads, s: _Step) -> None:
    """8 x 8 matrices of 16-bit numbers: thread 8 m + r of a warp knows where row r of matrix m is; each takes two numbers."""
    memory, name = t.shared.reshape(-1), s.operands[0]
    for matrix in range(int(s.modifiers[-1])):
        places = _places_in_matrix(t, s, s.operands[1], matrix)
        low, high = (memory[at[:, None] + np.arange(2)].view(np.uint16)[:, 0].astype(np.uint32) for at in places)
        _scatter(t, name, low | high << np.uint32(16))
        name = _next(name)


@_operation("STSM")
def _store_matrices(t: _Threads, s: _Step) -> None:
    """The way back of LDSM."""
    memory, name = t.shared.reshape(-1), s.operands[1]
    for matrix in range(int(s.modifiers[-1])):
        value = np.broadcast_to(t.word(name), (t.count,))[t.here]
        for k, at in enumerate(_places_in_matrix(t, s, s.operands[0], matrix)):
            half = (value >> np.uint32(16 * k)).astype(np.uint16)
            memory[at[:, None] + np.arange(2)] = half.view(np.uint8).reshape(-1, 2)
        name = _next(name)


def _places_in_matrix(t: _Threads, s: _Step, operand: str, matrix: int) -> list[NDArray[np.int64]]:
    """Where the two numbers of each thread that is here lie."""
    warps = t.here.reshape(-1, WARP)
    assert s.modifiers[0] == "16" and np.all(warps.all(axis=1) == warps.any(axis=1)), f"a part of a warp at {s.text}"
    rows = np.zeros(t.count, np.int64)
    rows[t.here] = _shared_offsets(t, s, operand, 16)
    warp, lane = np.divmod(np.flatnonzero(t.here), WARP)
    places = []
    for k in range(2):
        row, column = lane // 4, 2 * (lane % 4) + k
        if s.modifiers[1].startswith("MT"):
            row, column = column, row
        places.append(rows[warp * WARP + 8 * matrix + row] + 2 * column)
    return places


@_operation("SHFL")
def _shuffle(t: _Threads, s: _Step) -> None:
    """The value of another thread of the warp."""
    _, to, source, distance, limits = s.operands
    if s.modifiers != ("BFLY",) or limits != "0x1f":
        raise NotImplementedError(s.text)
    other = np.arange(t.count) ^ int(distance, 0)
    assert np.all(t.here[other] | ~t.here), f"a thread asks one that is not there: {s.text}"
    t.put_word(to, np.broadcast_to(t.word(source), (t.count,))[other])


def _size(s: _Step) -> tuple[int, bool]:
    """Bytes per thread, and whether a narrow value is signed."""
    for modifier, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if modifier in s.modifiers:
            return size, modifier.startswith("S")
    return 4, False


def _address(t: _Threads, text: str) -> NDArray[np.int64]:
    """[R4.64+UR6+0x10], with or without a descriptor before it."""
    found = re.fullmatch(r"(?:desc\[\w+\])?\[(.+)\]", text)
    if found is None:
        raise NotImplementedError(f"the address {text}")
    total = np.zeros(t.count, np.int64)
    for part in re.split(r"\+(?!-)|\+(?=-)", found[1]):
        scaled = re.fullmatch(r"(U?R\w+?)(?:\.(64|U32|X\d+))?", part)
        if scaled is None:
            total = total + int(part, 0)
        elif scaled[2] == "64":
            total = total + t.long(scaled[1]).view(np.int64)
        else:
            scale = int(scaled[2][1:]) if scaled[2] and scaled[2].startswith("X") else 1
            total = total + t.word(scaled[1]).astype(np.int64) * scale
    return total


def _global_offsets(t: _Threads, s: _Step, operand: str) -> NDArray[np.int64]:
    size, _ = _size(s)
    address = _address(t, operand)
    offsets = address[t.here] - _BASE
    if np.any(offsets % size):
        raise AssertionError(f"misaligned access: {s.text} at {address[t.here][offsets % size != 0][0]:#x}")
    inside = (offsets >= 0) & (offsets + size <= t.memory.allowed.size)
    legal = (
        inside
        & t.memory.allowed[np.where(inside, offsets, 0)]
        & t.memory.allowed[np.where(inside, offsets + size - 1, 0)]
    )
    if not legal.all():
        raise AssertionError(f"access outside of every array: {s.text} at {address[t.here][~legal][0]:#x}")
    return offsets


def _shared_offsets(t: _Threads, s: _Step, operand: str, size: int = 0) -> NDArray[np.int64]:
    size = size or _size(s)[0]
    per_block = t.shared.shape[1]
    offsets = _address(t, operand)[t.here] & 0xFFFFFF  # the upper byte is the window that a shared address lies in
    assert not np.any(offsets % size) and np.all(offsets + size <= per_block), f"bad access to shared memory: {s.text}"
    return offsets + t.block[t.here].astype(np.int64) * per_block


def _load(t: _Threads, s: _Step, offsets: NDArray[np.int64], memory: NDArray[np.uint8]) -> None:
    size, signed = _size(s)
    name = s.operands[0]
    if size < 4:
        value = memory[offsets[:, None] + np.arange(size)].view(np.uint16 if size == 2 else np.uint8)[:, 0]
        if signed:
            value = value.view(np.int16 if size == 2 else np.int8).astype(np.int32).view(np.uint32)
        _scatter(t, name, value.astype(np.uint32))
        return
    for word in range(size // 4):
        _scatter(t, name, memory[offsets[:, None] + 4 * word + np.arange(4)].view(np.uint32)[:, 0])
        name = _next(name)


def _scatter(t: _Threads, name: str, of_those_here: Words) -> None:
    value = np.zeros(t.count, np.uint32)
    value[t.here] = of_those_here
    t.put_word(name, value)


def _store(t: _Threads, s: _Step, offsets: NDArray[np.int64], memory: NDArray[np.uint8]) -> None:
    size, _ = _size(s)
    name = s.operands[1]
    for begin in range(0, size, 4):
        value = np.ascontiguousarray(np.broadcast_to(t.word(name), (t.count,))[t.here])
        width = min(size, 4)
        memory[offsets[:, None] + begin + np.arange(width)] = value.view(np.uint8).reshape(-1, 4)[:, :width]
        name = _next(name)
