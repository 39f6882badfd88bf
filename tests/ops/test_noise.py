"""The noise: known answers, the counter's layout and limits, one set of bits on every instruction set, and its law."""

import numpy as np
import pytest
import stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from bkd_fast import noise
from bkd_fast.ops import use_backend
from bkd_fast.ops.noise import LIMITS, Tag, normal_
from bkd_fast.ops.reference import noise as reference

native = pytest.importorskip("bkd_fast._native", reason="the compiled backend is not installed")

# Random123's kat_vectors, philox4x32 10 rounds: counter, key -> words
PHILOX = [
    ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, 2**64 - 1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        0xA4093822 | 0x299F31D0 << 32,
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
# radius word, angle word -> bits of the two normals
PAIRS = [
    (0x00000000, 0x00000000, 0x40D87046, 0x00000000),
    (0xFFFFFFFF, 0x80000000, 0xB4D1C6FF, 0x40D1C6FF),
    (0x80000000, 0x7FFFFFFF, 0xA9000000, 0xB5000000),
    (0x7FFFFFFF, 0x40000000, 0x34B504F3, 0x34B504F3),
    (0x40000000, 0x20000000, 0x3F8B3C8A, 0x3EE6B1CE),
    (0xDEADBEEF, 0x0BADF00D, 0xBFCFD8EA, 0xBE6FF801),
]
# coordinates, first element -> bits of four normals
NOISE = [
    ({"seed": 0}, 0, [0x3F1FF634, 0xBE7C1FE1, 0xBEBC1AC6, 0x3F88AD37]),
    ({"seed": 0}, 4, [0xBF8137C3, 0xC00BACE6, 0xBF7BE9B2, 0xBDEBEBD6]),
    (
        {"seed": 0x0123456789ABCDEF, "chain": 2**20 - 1, "step": 2**44 - 1, "parameter": 2**24 - 1, "tag": 15},
        2**38 - 4,
        [0x3FB674F1, 0xBE3DA2AF, 0xBF1A45AF, 0xC00FFF33],
    ),
]


def _bits(values: torch.Tensor) -> list[int]:
    return values.numpy().view(np.uint32).tolist()


@pytest.mark.parametrize(("counter", "key", "words"), PHILOX)
def test_philox_known_answers(counter, key, words):
    assert native.philox(counter, key) == words
    assert [int(w[0]) for w in reference.philox([np.array([c], np.uint32) for c in counter], key)] == words


@pytest.mark.parametrize(("radius", "angle", "z0", "z1"), PAIRS)
def test_normal_pair_known_answers(radius, angle, z0, z1):
    assert native.normal_pair(radius, angle) == [z0, z1]
    pair = reference.normal_pair(np.array([radius], np.uint32), np.array([angle], np.uint32))
    assert [int(z.view(np.uint32)[0]) for z in pair] == [z0, z1]


@pytest.mark.parametrize(("coordinates", "first", "bits"), NOISE)
def test_noise_known_answers(coordinates, first, bits, isa):
    assert _bits(normal_(torch.empty(4), first_element=first, **coordinates)) == bits
    with use_backend("reference"):
        assert _bits(normal_(torch.empty(4), first_element=first, **coordinates)) == bits


def test_extreme_words_agree_with_the_reference():
    edges = {0, 1, 2, 3, 0x7F, 0x80, 0xFF, 0x00FFFFFF, 0x01000000, 0x007FFFFF, 0x00800000, 0x3FFFFFFF, 0x40000001}
    edges |= {1 << k for k in range(32)} | {(1 << k) - 1 for k in range(1, 33)}
    words = sorted(edges | {0xFFFFFFFF - w for w in edges})
    radius, angle = (
        np.ascontiguousarray(g.ravel()) for g in np.meshgrid(np.array(words, np.uint32), np.array(words, np.uint32))
    )
    z0, z1 = reference.normal_pair(radius, angle)
    compiled = np.array([native.normal_pair(int(a), int(b)) for a, b in zip(radius, angle, strict=True)], np.uint32)
    assert np.array_equal(compiled[:, 0], z0.view(np.uint32))
    assert np.array_equal(compiled[:, 1], z1.view(np.uint32))
    assert np.isfinite(z0).all() and np.isfinite(z1).all()


def test_random_words_are_near_the_exact_box_muller():
    rng = np.random.default_rng(3)
    radius, angle = (rng.integers(0, 2**32, 1_000_000, dtype=np.uint32) for _ in range(2))
    z0, z1 = reference.normal_pair(radius, angle)
    m = np.maximum(np.abs(radius.view(np.int32).astype(np.float32)), 0.25).astype(np.float64)
    r = np.sqrt(-2 * np.log(m / 2**31)) * np.where(radius >> 31, -1.0, 1.0)
    half_turn = np.pi * angle.view(np.int32).astype(np.float64) / 2**32
    error = np.concatenate([z0 - r * np.cos(half_turn), z1 - r * np.sin(half_turn)])
    assert np.sqrt(np.mean(error**2)) < 2e-7
    assert np.mean(np.abs(error) > 1e-6) < 1e-5  # 5e-9 in truth: 2 million draws see none, or a few


fields = {name: st.integers(0, limit - 1) for name, limit in LIMITS.items() if name not in ("seed", "element")}


@given(block=st.integers(0, 2**36 - 1), **fields)
def test_the_counter_is_injective(block, **coordinates):
    counter = reference.pack(np.array([block], np.uint64), **coordinates)
    assert {name: int(value[0]) for name, value in reference.unpack(counter).items()} == {"block": block, **coordinates}


@given(
    seed=st.integers(0, 2**64 - 1),
    first=st.integers(0, 2**38 - 4000),
    count=st.integers(1, 3000),
    **fields,
)
def test_bits_agree_at_random_coordinates(seed, first, count, **coordinates):
    out = [torch.full((count,), torch.nan) for _ in native.isas()]
    before = native.isa()
    for name, buffer in zip(native.isas(), out, strict=True):
        native.use_isa(name)
        normal_(buffer, seed=seed, first_element=first, **coordinates)
    native.use_isa(before)
    expected = reference.normals(count, seed=seed, first_element=first, **coordinates).view(np.uint32)
    for buffer in out:
        assert np.array_equal(buffer.numpy().view(np.uint32), expected)


@pytest.mark.parametrize("first", [0, 1, 2, 3, 5, 4 * 2**32 - 700, 4 * 2**32 - 701, 2**38 - 200_001])
def test_long_runs_agree(first, isa, two_threads):
    count = 200_001
    got = normal_(
        torch.full((count,), torch.nan), seed=11, step=2**40 + 3, chain=7, parameter=9, tag=1, first_element=first
    )
    expected = reference.normals(count, seed=11, step=2**40 + 3, chain=7, parameter=9, tag=1, first_element=first)
    assert np.array_equal(got.numpy().view(np.uint32), expected.view(np.uint32))


def test_a_part_equals_that_part_of_the_whole():
    whole = noise.normal((1000,), seed=5, chain=2, step=9, parameter=4)
    for offset, count in ((0, 10), (1, 7), (333, 500), (997, 3)):
        assert torch.equal(
            noise.normal(count, seed=5, chain=2, step=9, parameter=4, offset=offset), whole[offset : offset + count]
        )


def test_the_number_of_threads_changes_nothing():
    before = torch.get_num_threads()
    drawn = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        drawn.append(noise.normal(300_000, seed=1))
    torch.set_num_threads(before)
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_law_of_ten_million():
    z = noise.normal(10_000_000, seed=20)
    stats.assert_standard_normal(z, "noise")
    part = z[:2_000_000].double()
    for lag in range(1, 17):
        stats.assert_uncorrelated(part[:-lag], part[lag:], f"lag {lag}")
        stats.assert_uncorrelated(part[:-lag] ** 2, part[lag:] ** 2, f"squares at lag {lag}")


@pytest.mark.parametrize("field", ["seed", "chain", "step", "parameter"])
def test_neighbouring_streams_are_independent(field):
    for value in (0, 1, LIMITS[field] - 2):
        a, b = (noise.normal(1_000_000, **{"seed": 1, field: v}) for v in (value, value + 1))
        stats.assert_uncorrelated(a, b, f"{field} {value} and {value + 1}")


def test_tags_are_independent():
    drawn = [normal_(torch.empty(1_000_000), seed=1, tag=tag) for tag in Tag]
    for i in range(len(drawn)):
        for j in range(i):
            stats.assert_uncorrelated(drawn[i], drawn[j], f"tags {j} and {i}")


@pytest.mark.parametrize("field", ["seed", "chain", "step", "parameter"])
def test_coordinates_out_of_range(field):
    for value in (-1, LIMITS[field]):
        with pytest.raises(
            ValueError, match=rf"{field} = {value}: must be in \[0, 2\*\*{LIMITS[field].bit_length() - 1}\)"
        ):
            noise.normal(4, **{"seed": 0, field: value})
    with pytest.raises(TypeError, match=f"{field} = 1.5: must be an int"):
        noise.normal(4, **{"seed": 0, field: 1.5})


def test_elements_out_of_range():
    with pytest.raises(ValueError, match=f"first_element = {2**38}"):
        noise.normal(1, seed=0, offset=2**38)
    with pytest.raises(ValueError, match="the last element"):
        noise.normal(5, seed=0, offset=2**38 - 4)


def test_only_contiguous_float32_is_filled():
    with pytest.raises(TypeError, match=r"out is torch\.float64"):
        normal_(torch.empty(4, dtype=torch.float64), seed=0)
    with pytest.raises(TypeError, match="contiguous"):
        normal_(torch.empty(4, 4).t(), seed=0)
    assert noise.normal((0, 3), seed=0).shape == (0, 3)


def test_opcheck():
    torch.library.opcheck(torch.ops.bkd_fast.normal_, (torch.zeros(9), 3, 0, 1, 2, 0, 5))
