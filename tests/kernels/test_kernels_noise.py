"""The noise in Triton: known answers, words and normals equal to the reference's bits. Interpreted where there is no GPU."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bkd_fast.ops import backends, use_backend
from bkd_fast.ops.noise import LIMITS, normal_
from bkd_fast.ops.reference import noise as reference

missing = backends()["triton"].missing
if missing is not None:
    pytest.skip(f"triton: {missing}", allow_module_level=True)

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from bkd_fast.kernels.noise import normal_pair, philox  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST = {name: limit - 1 for name, limit in LIMITS.items() if name != "element"}


@triton.jit
def _pairs(radius, angle, z0, z1, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    a, b = normal_pair(tl.load(radius + index), tl.load(angle + index))
    tl.store(z0 + index, a)
    tl.store(z1 + index, b)


@triton.jit
def _philox(words, SIZE: tl.constexpr):
    """words: uint32 (6, SIZE), four of the counter and two of the key; the first four become the answer."""
    index = tl.arange(0, SIZE)
    c0, c1, c2, c3 = philox(
        tl.load(words + index),
        tl.load(words + SIZE + index),
        tl.load(words + 2 * SIZE + index),
        tl.load(words + 3 * SIZE + index),
        tl.load(words + 4 * SIZE + index),
        tl.load(words + 5 * SIZE + index),
    )
    tl.store(words + index, c0)
    tl.store(words + SIZE + index, c1)
    tl.store(words + 2 * SIZE + index, c2)
    tl.store(words + 3 * SIZE + index, c3)


def _on_device(words):
    return torch.from_numpy(np.ascontiguousarray(words)).to(DEVICE)


def _bits(tensor):
    return tensor.cpu().numpy().view(np.uint32)


def _normals(count, first, **coordinates):
    with use_backend("triton"):
        return _bits(normal_(torch.full((count,), torch.nan, device=DEVICE), first_element=first, **coordinates))


def test_philox_known_answers():
    """Random123's kat_vectors, philox4x32 with 10 rounds."""
    ones = [0xFFFFFFFF] * 4
    pi = [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344]
    inputs = np.array([[0] * 6, [*ones, 0xFFFFFFFF, 0xFFFFFFFF], [*pi, 0xA4093822, 0x299F31D0], [0] * 6], np.uint32)
    words = _on_device(inputs.T)
    _philox[(1,)](words, SIZE=4)
    assert _bits(words)[:4, :3].T.tolist() == [
        [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8],
        [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ]


@pytest.mark.parametrize(
    ("coordinates", "first", "bits"),
    [
        ({"seed": 0}, 0, [0x3F1FF634, 0xBE7C1FE1, 0xBEBC1AC6, 0x3F88AD37]),
        ({"seed": 0}, 4, [0xBF8137C3, 0xC00BACE6, 0xBF7BE9B2, 0xBDEBEBD6]),
        ({**LARGEST, "seed": 0x0123456789ABCDEF}, 2**38 - 4, [0x3FB674F1, 0xBE3DA2AF, 0xBF1A45AF, 0xC00FFF33]),
    ],
)
def test_noise_known_answers(coordinates, first, bits):
    assert _normals(4, first, **coordinates).tolist() == bits


def test_extreme_and_random_words_give_the_reference_bits():
    edges = {0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x00FFFFFF, 0x01000000, 0x007FFFFF, 0x00800000, 0x3FFFFFFF, 0x40000001}
    edges |= {1 << k for k in range(32)} | {(1 << k) - 1 for k in range(1, 33)}
    words = np.array(sorted(edges | {0xFFFFFFFF - w for w in edges}), np.uint32)
    radius, angle = (grid.ravel() for grid in np.meshgrid(words, words))
    rng = np.random.default_rng(7)
    size = 16384
    draws = rng.integers(0, 2**32, (2, 3 * size - radius.size), np.uint32)
    draws[:, :size] >>= rng.integers(0, 32, (2, size), np.uint32)  # small words too
    radius, angle = (np.concatenate([a, b]) for a, b in zip((radius, angle), draws, strict=True))
    z = torch.full((2, radius.size), torch.nan, device=DEVICE)
    _pairs[(radius.size // size,)](
        _on_device(radius), _on_device(angle), z[0], z[1], SIZE=size, num_warps=8, enable_fp_fusion=False
    )
    expected = reference.normal_pair(radius, angle)
    assert np.array_equal(_bits(z), np.stack(expected).view(np.uint32))


# around a tile's end, the low word of the block number wrapping, the last elements there are
@pytest.mark.parametrize(
    ("first", "count"), [(0, 1024), (1, 2047), (2, 1025), (3, 1), (4 * 2**32 - 701, 1500), (2**38 - 99, 99)]
)
def test_runs_from_any_first_element(first, count):
    coordinates = {"seed": 2**63 + 11, "step": 2**40 + 3, "chain": 7, "parameter": 9, "tag": 1}
    expected = reference.normals(count, first_element=first, **coordinates)
    assert np.array_equal(_normals(count, first, **coordinates), expected.view(np.uint32))


@settings(max_examples=15, deadline=None)
@given(
    first=st.integers(0, 2**38 - 70),
    count=st.integers(1, 70),
    **{name: st.integers(0, largest) for name, largest in LARGEST.items()},
)
def test_bits_at_random_coordinates(first, count, **coordinates):
    expected = reference.normals(count, first_element=first, **coordinates)
    assert np.array_equal(_normals(count, first, **coordinates), expected.view(np.uint32))


def test_neighbours_of_the_output_stay():
    buffer = torch.full((20,), 5.0, device=DEVICE)
    with use_backend("triton"):
        normal_(buffer[7:12], seed=3, first_element=2)
    assert (buffer[:7] == 5).all() and (buffer[12:] == 5).all() and (buffer[7:12] != 5).all()
