"""Compile GPU kernels without a GPU and read their machine code: registers, spills, access widths, instructions.

Write a file tests/kernels/variants_<op>.py that lists what is to be compiled, with its budget::

    from bkd_fast.kernels import kd
    from sass import Budget, CudaVariant, TritonVariant

    VARIANTS = [
        TritonVariant(
            "rows, C = 100, bfloat16",
            kernel=kd.rows,
            signature={"z": "*bf16", "t": "*bf16", "rows": "i32", "scale": "fp32"},  # run-time arguments, in Triton's names
            constants={"CLASSES": 128, "MODE": 2},
            aligned=("z", "t"),  # arguments (pointers or integers) that are multiples of 16
            warps=4,
            budget=Budget(registers=64, instructions=31.5, elements=16, region="loops", loads={16}, stores={16}),
        ),
        CudaVariant(
            "fp32",
            source="langevin.cu",  # in csrc/cuda
            instance="bkd::langevin_step<float, 0>",  # the C++ name of one kernel: a template's arguments, or no template
            budget=Budget(...),
        ),
    ]

`test_kernels_compiled.py` compiles every variant for sm_80 and sm_90 (in a process of its own: compiling needs Triton without its
interpreter) and holds the budgets. While tuning::

    env -u TRITON_INTERPRET python tests/kernels/compiled.py kd              # a line for each variant of variants_kd.py
    env -u TRITON_INTERPRET python tests/kernels/compiled.py kd --sass DIR   # the same, and the listings in DIR
"""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

CAPABILITIES = (80, 90)


@dataclass(frozen=True)
class Budget:
    """What a kernel promises, as its comment says it.

    Attributes:
        registers: most registers a thread may use.
        instructions: static instructions per element of `region`; held within 15 %, both ways. None: not counted.
        elements: elements that one thread handles in `region`.
        region: what is counted: "kernel": everything; "loops": the innermost loops, added up; "loop": one innermost loop;
            "tile": one run of instructions that nothing jumps into or out of. One: with the widest accesses to global memory,
            and of those the longest (the path of full tiles, beside its masked twin). "block": the longest such run.
        loads, stores: the widths in bytes of the accesses to global memory in `region`, all of them. None: any.
        stack: bytes of stack a thread may use (arrays that are indexed at run time); spills are never allowed.
        tensor_cores: whether `region` multiplies on tensor cores, or must not.
    """

    registers: int
    instructions: float | None = None
    elements: int = 1
    region: str = "kernel"
    loads: frozenset[int] | set[int] | None = None
    stores: frozenset[int] | set[int] | None = None
    stack: int = 0
    tensor_cores: bool = False


@dataclass(frozen=True)
class TritonVariant:
    """One specialisation of a Triton kernel."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any] = field(default_factory=dict)
    aligned: tuple[str, ...] = ()
    warps: int = 4
    options: dict[str, Any] = field(
        default_factory=dict
    )  # further options of triton.compile: num_stages, enable_fp_fusion
    budget: Budget = field(default_factory=lambda: Budget(255))

    def compile(self, capability: int) -> "MachineCode":
        """Its machine code for a compute capability (80 or 90)."""
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        kinds = {**self.signature, **dict.fromkeys(self.constants, "constexpr")}
        arguments = self.kernel.arg_names
        if set(kinds) != set(arguments):
            raise ValueError(f"{self.name}: signature and constants name {sorted(kinds)}: the kernel takes {arguments}")
        source = ASTSource(
            self.kernel,
            {argument: kinds[argument] for argument in arguments},
            self.constants,
            {(arguments.index(argument),): [["tt.divisibility", 16]] for argument in self.aligned},
        )
        compiled = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": self.warps, **self.options}
        )
        return disassemble(compiled.asm["cubin"], compiled.metadata.name, compiled.metadata.shared)


@dataclass(frozen=True)
class CudaVariant:
    """One instance of a kernel in csrc/cuda."""

    name: str
    source: str
    instance: str
    budget: Budget = field(default_factory=lambda: Budget(255))

    def compile(self, capability: int) -> "MachineCode":
        """Its machine code for a compute capability (80 or 90), by the call that the GPU machine makes."""
        from bkd_fast.kernels import cuda

        binary = cuda.build(self.source, self.instance, capability)
        return disassemble(binary.image, binary.symbol)


@dataclass(frozen=True)
class Instruction:
    """One line of the listing."""

    text: str  # with its predicate, as nvdisasm prints it

    @property
    def operation(self) -> str:
        """The opcode with its modifiers, as in "LDG.E.128"."""
        return re.sub(r"^@!?\w+\s+", "", self.text).split()[0]

    @property
    def opcode(self) -> str:
        return self.operation.split(".")[0]

    @property
    def width(self) -> int:
        """Bytes that a memory access moves per thread."""
        modifiers = self.operation.split(".")[1:]
        for modifier, width in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
            if modifier in modifiers:
                return width
        return 4


@dataclass(frozen=True)
class Region:
    """A run of the machine code."""

    instructions: tuple[Instruction, ...]

    def __len__(self) -> int:
        return len(self.instructions)

    @property
    def opcodes(self) -> Counter[str]:
        return Counter(instruction.opcode for instruction in self.instructions)

    @property
    def widest(self) -> int:
        """Bytes of the widest access to global memory, 0 for none."""
        return max(self.widths("LDG") + self.widths("STG"), default=0)

    def widths(self, opcode: str) -> Counter[int]:
        """How many accesses of each width in bytes: "LDG" loads and "STG" stores global memory, "LDS" and "STS" shared."""
        return Counter(i.width for i in self.instructions if i.opcode == opcode)


@dataclass(frozen=True)
class MachineCode:
    """One kernel as the GPU would run it."""

    registers: int
    stack: int  # bytes per thread
    local: int  # bytes per thread, the stack apart
    shared: int  # bytes per block; on sm_90 with the 1024 that the system keeps
    whole: Region
    loops: tuple[Region, ...]  # innermost, in the order of the code
    blocks: tuple[Region, ...]  # basic blocks, in the order of the code
    listing: str

    @property
    def spills(self) -> int:
        """Accesses to local memory: a register that did not fit, or an array that was indexed at run time."""
        opcodes = self.whole.opcodes
        return opcodes["LDL"] + opcodes["STL"]

    def region(self, name: str) -> Region:
        if name == "kernel":
            return self.whole
        if name == "loops":
            return Region(tuple(i for loop in self.loops for i in loop.instructions))
        if name in ("loop", "tile"):
            return max(self.loops if name == "loop" else self.blocks, key=lambda r: (r.widest, len(r)))
        if name == "block":
            return max(self.blocks, key=len)
        raise ValueError(f"region = {name!r}: must be one of ['kernel', 'loops', 'loop', 'tile', 'block']")


def tool(name: str) -> str:
    """Path of a binary tool that Triton's wheel carries."""
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(image: bytes, symbol: str, dynamic: int = 0) -> MachineCode:
    """Read the kernel `symbol` of a cubin; `dynamic`: bytes of shared memory that a launch adds to what the cubin declares."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(image)
        file.flush()
        usage = _run(tool("cuobjdump"), "-res-usage", file.name)
        listing = _run(tool("nvdisasm"), "-c", file.name)
    resources = _resources(usage, symbol)
    lines = listing[listing.index(f".text.{symbol}:") :].splitlines()[1:]
    end = next((n for n, line in enumerate(lines) if line.startswith(".text.")), len(lines))
    instructions, targets = parse(lines[:end])
    return MachineCode(
        registers=resources["REG"],
        stack=resources["STACK"],
        local=resources["LOCAL"],
        shared=resources["SHARED"] + dynamic,
        whole=Region(tuple(_useful(instructions))),
        loops=tuple(_loops(instructions, targets)),
        blocks=tuple(_blocks(instructions, targets)),
        listing="\n".join(lines[:end]),
    )


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(usage: str, symbol: str) -> dict[str, int]:
    found = re.search(rf"Function {re.escape(symbol)}:\s*\n\s*(.*)", usage)
    if found is None:
        raise ValueError(f"{symbol} is not in the cubin: {re.findall(r'Function (.+):', usage)}")
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", found[1])}


def parse(lines: list[str]) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions, and for each label the position that it stands before."""
    instructions, targets = [], {}
    for line in lines:
        if label := re.match(r"\s*(\.L_x_\d+|\$\S+):", line):
            targets[label[1]] = len(instructions)
        elif code := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            instructions.append(Instruction(code[1].replace("{", "").strip()))
    return instructions, targets


def _target(instruction: Instruction) -> str | None:
    found = re.search(r"`\((\S+?)\)", instruction.text)
    return found[1] if found else None


def _useful(instructions: list[Instruction]) -> list[Instruction]:
    """Without the padding after the end: NOPs and the branch to itself."""
    return [
        i
        for n, i in enumerate(instructions)
        if i.opcode != "NOP" and not (i.opcode == "BRA" and _is_trap(i, instructions, n))
    ]


def _is_trap(instruction: Instruction, instructions: list[Instruction], position: int) -> bool:
    return not instruction.text.startswith("@") and all(i.opcode == "NOP" for i in instructions[position + 1 :])


def _loops(instructions: list[Instruction], targets: dict[str, int]) -> list[Region]:
    spans = []
    for end, instruction in enumerate(instructions):
        target = _target(instruction) if instruction.opcode == "BRA" else None
        if target is not None and targets.get(target, end) < end:
            spans.append((targets[target], end + 1))
    innermost = [
        (begin, end)
        for begin, end in spans
        if not any(begin <= b and e <= end and (b, e) != (begin, end) for b, e in spans)
    ]
    return [Region(tuple(_useful(instructions[begin:end]))) for begin, end in innermost]


def _blocks(instructions: list[Instruction], targets: dict[str, int]) -> list[Region]:
    joins = {targets[t] for t in map(_target, instructions) if t in targets}
    cuts = {0, len(instructions)} | joins
    for n, instruction in enumerate(instructions):
        if instruction.opcode in ("BRA", "BRX", "CALL", "RET") or instruction.text.startswith("EXIT"):
            cuts.add(n + 1)
    bounds = sorted(cuts)
    blocks = [Region(tuple(_useful(instructions[a:b]))) for a, b in pairwise(bounds)]
    return [block for block in blocks if len(block)]


def violations(code: MachineCode, budget: Budget, exact: bool) -> list[str]:
    """What a kernel breaks of its budget; `exact`: hold the counts that depend on the compiler's version too."""
    broken = []
    if code.spills or code.local:
        broken.append(f"{code.spills} accesses to local memory, {code.local} bytes of it: must be 0")
    if code.stack > budget.stack:
        broken.append(f"{code.stack} bytes of stack: at most {budget.stack}")
    region = code.region(budget.region)
    products = {"HMMA", "HGMMA"} & set(region.opcodes)
    if bool(products) != budget.tensor_cores:
        broken.append(
            f"tensor-core instructions {sorted(products)}: must be {'some' if budget.tensor_cores else 'none'}"
        )
    for name, opcode, allowed in (("loads", "LDG", budget.loads), ("stores", "STG", budget.stores)):
        found = region.widths(opcode)
        if allowed is not None and set(found) != set(allowed):
            broken.append(f"{name} by width in bytes {dict(found)}: must be of {sorted(allowed)}")
    if exact:
        if code.registers > budget.registers:
            broken.append(f"{code.registers} registers: at most {budget.registers}")
        if budget.instructions is not None:
            each = len(region) / budget.elements
            if not 0.85 * budget.instructions <= each <= 1.15 * budget.instructions:
                broken.append(f"{each:.1f} instructions per element: the budget is {budget.instructions} within 15 %")
    return broken


def summary(code: MachineCode, budget: Budget) -> str:
    """One line about a kernel."""
    region = code.region(budget.region)
    loops = "+".join(str(len(loop)) for loop in code.loops) or "none"
    return (
        f"{len(region) / budget.elements:6.1f} instructions per element of {budget.region}, {len(code.whole)} in all, "
        f"loops {loops}, {code.registers} registers, {code.spills} spills, stack {code.stack}, shared {code.shared}, "
        f"loads {dict(region.widths('LDG'))}, stores {dict(region.widths('STG'))}"
    )
