"""The kernels' machine code, executed by emulator.py, gives the reference's bits: the noise alone, and whole Langevin steps.

This closes the gap between "the same source on a CPU" and "what the GPU's compiler made of it", for sm_80 and sm_90. What it
cannot know is the approximate reciprocal root: it is tried rounded correctly and off by what its documentation allows.
"""

import emulator
import numpy as np
import pytest
import torch
from rule_cases import OWN
from sass import CudaVariant

from bkd_fast.kernels.table import table_of
from bkd_fast.ops import use_backend
from bkd_fast.ops.langevin import LangevinStep, langevin_step_
from bkd_fast.ops.reference.noise import normal_pair
from bkd_fast.ops.rounding import noise_table
from bkd_fast.ops.rules import OWN_NUMBERS, RULES

pytest.importorskip("triton", reason="needs the disassembler of Triton's wheel (pip install 'bkd_fast[gpu]')")

CAPABILITIES = (80, 90)

# Where the correction does not absorb every error that the reciprocal root may have: |radius word| as float32. Of all 75.5
# million radii, these decide on the last bit. A GPU tells (tests/gpu).
DELICATE = [float.fromhex(m) for m in ("0x1.35p+8", "0x1.2f2bdp+20", "0x1.3f19aap+25", "0x1.414b38p+30")]


def word_pairs(count):
    """All pairs of extreme words, short words of every length, and random ones."""
    generator = np.random.default_rng(20)
    radius, angle = (generator.integers(0, 2**32, count, dtype=np.uint32) for _ in range(2))
    for words, part in ((radius, slice(0, count // 4)), (angle, slice(count // 8, count // 3))):
        words[part] >>= generator.integers(0, 32, words[part].size).astype(np.uint32)
    bits = np.concatenate([2 ** np.arange(32), 2 ** np.arange(32) - 1, 2**32 - 2 ** np.arange(32)]).astype(np.uint32)
    pairs = np.stack(np.meshgrid(bits, bits), axis=-1).reshape(-1, 2)
    radius[-len(pairs) :], angle[-len(pairs) :] = pairs[:, 0], pairs[:, 1]
    return radius, angle


def normals_of_the_code(code, capability, radius, angle, ulps):
    results = []
    for begin in range(0, radius.size, 2**16):
        memory = emulator.Memory()
        chunk = slice(begin, begin + 2**16)
        words = [memory.put(x[chunk]) for x in (radius, angle)]
        normals = [memory.put(np.full(radius[chunk].size, np.nan, np.float32)) for _ in range(2)]
        emulator.launch(
            code,
            memory,
            grid=radius[chunk].size // 128,
            block=128,
            arguments=[np.uint64(address) for address in (*words, *normals)],
            capability=capability,
            rsqrt_ulps=ulps,
        )
        results.append([memory.get(address) for address in normals])
    return [np.concatenate(parts) for parts in zip(*results, strict=True)]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_million_word_pairs(backend, capability, compiled):
    code = compiled.code("words", backend, capability)
    radius, angle = word_pairs(2**20)
    magnitude = np.abs(radius.view(np.int32).astype(np.float32))
    delicate = np.isin(magnitude, np.array(DELICATE, np.float32))
    expected = normal_pair(radius, angle)
    for ulps, count in ((0, 2**20), (1, 2**16), (-1, 2**16), (2, 2**16), (-2, 2**16)):
        part = slice(2**20 - count, None)
        got = normals_of_the_code(code, capability, radius[part], angle[part], ulps)
        for a, b in zip(got, expected, strict=True):
            different = a.view(np.uint32) != b[part].view(np.uint32)
            if ulps:
                different &= ~delicate[part]
            assert not different.any(), (ulps, radius[part][different][:4], angle[part][different][:4])
    # the test would see an error that the correction does not absorb
    far = normals_of_the_code(code, capability, radius[:4096], angle[:4096], 4096)
    assert (far[0].view(np.uint32) != expected[0][:4096].view(np.uint32)).any()


# ---- whole steps ----

# below and at one tile, several tiles, one element, and a shard whose block number's low word wraps
SIZES = [5, 1024, 3000, 1, 4300]
FIRST = [0, 0, 3, 2, 2**34 - 1000]


def a_step(dtype, rounding="nearest", decay=0.1, center=True, moments=True, sigma=0.03, in_a_graph=False, rule="sgld"):
    generator = torch.Generator().manual_seed(8)

    def tensors(kind=dtype):
        return [torch.randn(size, generator=generator).to(kind) for size in SIZES]

    real = torch.float64 if dtype == torch.float64 else torch.float32
    theta, gradient = tensors(), tensors()
    gradient[2][7], gradient[4][-1] = torch.nan, -torch.inf
    states = [tensors(real) for _ in range(RULES[rule].states)]
    return LangevinStep(
        theta,
        gradient,
        tensors() if center else [],
        tensors(real) if moments else [],
        tensors(real) if moments else [],
        nonfinite=torch.zeros(len(SIZES), dtype=torch.bool),
        lr=0.0137,
        decay=decay,
        sigma=sigma,
        seed=2**63 + 5,
        chain=3,
        step=2**32 - 1,
        parameters=[3, 4, 5, 6, 2**24 - 1],
        first_elements=FIRST,
        draws=3,
        master=tensors(torch.float32) if rounding == "master" else [],
        noise_table=noise_table(sigma, dtype) if rounding == "stochastic" else None,
        scalars=torch.tensor([0.0137, decay, sigma, *OWN[rule]], dtype=real) if in_a_graph else None,
        clock=torch.tensor(2**32 - 1) if in_a_graph else None,
        rule=rule,
        first=(*states, [], [])[0],
        second=(*states, [], [])[1],
        own=OWN[rule],
    )


def numpy_of(tensor):
    tensor = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
    return tensor.numpy().copy()


class EmulatedStep:
    """A step's tensors in emulated memory, with their launch table."""

    def __init__(self, s, misaligned_by=0, claimed_too_many=0):
        self.memory = emulator.Memory()
        self.groups = (s.theta, s.gradient, s.center, s.mean, s.m2, s.master, s.first, s.second)
        self.addresses = {
            tensor.data_ptr(): self.memory.put(numpy_of(tensor), misaligned_by if group is s.gradient else 0)
            for group in self.groups
            for tensor in group
        }
        self.table = table_of(*self.groups[:6], s.parameters, s.first_elements, s.first, s.second)
        rows = self.table.rows.numpy().copy()
        rows[:, :8] = [[self.addresses.get(int(address), 0) for address in row[:8]] for row in rows]
        rows[0, 8] += claimed_too_many
        self.rows = np.uint64(self.memory.put(rows))
        self.labels = np.uint64(self.memory.put(self.table.labels.numpy()))
        self.chunks = np.uint64(self.memory.put(self.table.chunks.numpy()))
        self.nonfinite, self.noise_table, self.scalars, self.clock = (
            np.uint64(0 if tensor is None else self.memory.put(numpy_of(tensor)))
            for tensor in (s.nonfinite, s.noise_table, s.scalars, s.clock)
        )

    def results(self, s):
        written = [tensor for group in (s.theta, s.mean, s.m2, s.master, s.first, s.second) for tensor in group]
        return [
            *(self.memory.get(self.addresses[tensor.data_ptr()]) for tensor in written),
            self.memory.get(int(self.nonfinite)),
        ]


def expected_results(s):
    with use_backend("reference"):
        langevin_step_(s)
    return [
        *(numpy_of(tensor) for group in (s.theta, s.mean, s.m2, s.master, s.first, s.second) for tensor in group),
        s.nonfinite.numpy(),
    ]


def assert_same_bits(got, expected):
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        different = np.flatnonzero(a.view(np.uint8) != b.view(np.uint8))
        assert not different.size, f"array {i} differs in {different.size} bytes, the first at {different[0]}"


def run_cuda(s, capability, misaligned_by=0, claimed_too_many=0):
    from bkd_fast.ops.cuda.langevin import instance_of

    dtype = s.theta[0].dtype
    emulated = EmulatedStep(s, misaligned_by, claimed_too_many)
    rounding = "master" if s.master else "nearest" if s.noise_table is None else "stochastic"
    noisy = s.sigma != 0 or s.noise_table is not None
    instance = instance_of(dtype, rounding, noisy, s.decay != 0, bool(s.mean), s.rule)
    real = np.float64 if dtype == torch.float64 else np.float32
    numbers = (0, 0, 0) if s.scalars is not None else (s.lr, s.decay, s.sigma)
    emulator.launch(
        CudaVariant(instance, "langevin.cu", instance).compile(capability),
        emulated.memory,
        grid=len(emulated.table.chunks),
        block=128,
        capability=capability,
        arguments=[
            emulated.rows, emulated.labels, emulated.chunks, np.int32(emulated.table.size), emulated.nonfinite,
            emulated.noise_table, emulated.scalars, emulated.clock, np.uint64(s.seed),
            np.uint64(0 if s.clock is not None else s.step), np.uint32(s.chain), np.int32(0), np.int32(0), *map(real, numbers),
            real(1 / s.draws), *map(real, [*s.own, *[0.0] * (OWN_NUMBERS - len(s.own))]),
        ],
    )  # fmt: skip
    return emulated.results(s)


CUDA_STEPS = {
    "float32": {"dtype": torch.float32},
    "float32, plain": {"dtype": torch.float32, "decay": 0.0, "center": False, "moments": False},
    "float32, no noise": {"dtype": torch.float32, "sigma": 0.0, "center": False, "moments": False},
    "float32, in a graph": {"dtype": torch.float32, "center": False, "moments": False, "in_a_graph": True},
    "float64": {"dtype": torch.float64, "in_a_graph": True},
    "bfloat16, nearest": {"dtype": torch.bfloat16, "moments": False},
    "bfloat16, stochastic": {"dtype": torch.bfloat16, "rounding": "stochastic"},
    "bfloat16, master": {"dtype": torch.bfloat16, "rounding": "master"},
    "float16, nearest": {"dtype": torch.float16, "moments": False},
    "float16, stochastic": {"dtype": torch.float16, "rounding": "stochastic"},
    # rules without roots and quotients, whose instructions the emulator does not have
    "float32, sghmc": {"dtype": torch.float32, "rule": "sghmc", "moments": False, "in_a_graph": True},
    "float32, nesterov": {"dtype": torch.float32, "rule": "nesterov", "moments": False, "sigma": 0.0},
    "float32, sgnht, moments": {"dtype": torch.float32, "rule": "sgnht"},
    "float64, baoab": {"dtype": torch.float64, "rule": "baoab", "moments": False},
    "bfloat16, master, sghmc": {"dtype": torch.bfloat16, "rule": "sghmc", "rounding": "master", "moments": False},
}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CUDA_STEPS)
def test_the_cuda_step(name, capability, nvrtc):
    s = a_step(**CUDA_STEPS[name])
    assert_same_bits(run_cuda(s, capability), expected_results(s))


TRITON_STEPS = {
    "fp32, prior, record": {"dtype": torch.float32, "center": False, "moments": False},
    "fp32, centred prior, record": {"dtype": torch.float32, "moments": False},
    "fp32, prior, record, moments": {"dtype": torch.float32, "center": False},
    "fp32, prior, record, in a graph": {"dtype": torch.float32, "center": False, "moments": False, "in_a_graph": True},
    "fp64, prior, record": {"dtype": torch.float64, "center": False, "moments": False},
    "bf16, nearest, record": {"dtype": torch.bfloat16, "decay": 0.0, "center": False, "moments": False},
    "bf16, stochastic, record": {
        "dtype": torch.bfloat16, "rounding": "stochastic", "decay": 0.0, "center": False, "moments": False,
    },
    "bf16, master, record": {
        "dtype": torch.bfloat16, "rounding": "master", "decay": 0.0, "center": False, "moments": False,
    },
    "fp16, stochastic, record": {
        "dtype": torch.float16, "rounding": "stochastic", "decay": 0.0, "center": False, "moments": False,
    },
    "fp32, prior, record, sghmc": {"dtype": torch.float32, "rule": "sghmc", "center": False, "moments": False},
    "fp32, prior, record, sgnht": {"dtype": torch.float32, "rule": "sgnht", "center": False, "moments": False},
    "fp32, prior, record, baoab": {"dtype": torch.float32, "rule": "baoab", "center": False, "moments": False},
}  # fmt: skip


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", TRITON_STEPS)
def test_the_triton_step(name, capability, compiled):
    s = a_step(**TRITON_STEPS[name])
    emulated = EmulatedStep(s)
    given = [(emulated.nonfinite, s.nonfinite), (emulated.noise_table, s.noise_table)]
    given += [(emulated.scalars, s.scalars), (emulated.clock, s.clock)]
    emulator.launch(
        compiled.code("langevin", name, capability),
        emulated.memory,
        grid=len(emulated.table.chunks),
        block=128,
        capability=capability,
        arguments=[
            emulated.rows, emulated.labels, emulated.chunks, np.int32(emulated.table.size),
            *(address for address, tensor in given if tensor is not None),  # the others are constants of the variant
            *map(np.float64, (s.lr, s.decay, s.sigma, 1 / s.draws, *s.own, *[0.0] * (OWN_NUMBERS - len(s.own)))),
            np.uint64(s.seed), np.int32(s.chain), np.int64(s.step), np.int32(0), np.int32(0),
        ],
    )  # fmt: skip
    assert_same_bits(emulated.results(s), expected_results(s))


def test_the_cuda_step_at_addresses_that_are_no_multiples_of_16(nvrtc):
    s = a_step(**CUDA_STEPS["float32"])
    assert_same_bits(run_cuda(s, 90, misaligned_by=4), expected_results(s))


def test_accesses_outside_are_noticed(nvrtc):
    """The emulator is a memory checker: a table that claims one element too many does not go unnoticed."""
    s = a_step(**CUDA_STEPS["float32, plain"])
    with pytest.raises(AssertionError, match="outside of every array"):
        run_cuda(s, 90, claimed_too_many=1)
