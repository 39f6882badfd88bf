"""The launch table: its layout, that chunks cover every element once, when it is built again and how long it is kept."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="kernels/ is for GPUs and Triton's interpreter")

from bkd_fast.kernels import table as tables
from bkd_fast.kernels.table import table_of


def _filled(*counts):
    return [torch.zeros(count) for count in counts]


def test_layout():
    theta, gradient, center, mean, m2, master = (_filled(5, 0, 9000) for _ in range(6))
    table = table_of(theta, gradient, center, mean, m2, master, [7, 8, 2**24 - 1], [0, 0, 2**38 - 9001])
    assert table.rows.tolist() == [
        [t.data_ptr() for t in lists] + [0, 0, lists[0].numel(), first]
        for lists, first in zip(
            zip(theta, gradient, center, mean, m2, master, strict=True), (0, 0, 2**38 - 9001), strict=True
        )
    ]
    assert table.labels.tolist() == [[7, 0, 0, 0], [8, 0, 1, 0], [2**24 - 1, 0, 2, 0]]
    assert table.size == 4096 and table.chunks.dtype == torch.int32
    assert table.chunks.tolist() == [[0, 0], [2, 0], [2, 1], [2, 2]]  # none for the empty tensor


def test_every_chain_has_a_row():
    theta, gradient, second = _filled(6, 9000), _filled(6, 9000), [t.double() for t in _filled(6, 9000)]
    table = table_of(theta, gradient, parameters=[7, 8], first_elements=[0, 2], second=second, chains=3)
    for row, (number, chain) in enumerate((n, k) for n in range(2) for k in range(3)):
        count = theta[number].numel() // 3
        parts = [t[number].view(3, count)[chain].data_ptr() for t in (theta, gradient, second)]
        assert table.rows[row].tolist() == [*parts[:2], 0, 0, 0, 0, 0, parts[2], count, 2 * number]
    assert table.labels.tolist() == [[7 + n, k, n, 0] for n in range(2) for k in range(3)]
    assert table.chunks.tolist() == [[row, 0] for row in range(6)]


def test_other_element_sizes_at_the_same_addresses_are_another_table():
    memory = torch.zeros(64, dtype=torch.float32)
    wide, narrow = memory[:16].view(2, 8), memory.view(torch.bfloat16)[:16].view(2, 8)
    assert wide.data_ptr() == narrow.data_ptr()
    for theta in (wide, narrow):
        rows = table_of([theta], parameters=[0], first_elements=[0], chains=2).rows
        assert rows[:, 0].tolist() == [theta[0].data_ptr(), theta[1].data_ptr()]


def test_lists_that_are_not_given_are_zeros():
    table = table_of(_filled(5, 6))
    assert not table.rows[:, 1:8].any() and not table.rows[:, 9].any() and not table.labels[:, 0].any()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 40_000), st.integers(0, 7)), min_size=1, max_size=6),
    st.sampled_from([1, 1000, 100_000]),
)
@example([(0, 1), (5, 3)], 1)
def test_chunks_cover_every_element_once(tensors, scale):
    """Of tensors that are not there: packing looks at numbers only. At the largest scale one has more than 2^31 elements."""
    counts, firsts = tuple(count * scale for count, _ in tensors), [first for _, first in tensors]
    packed, size = tables._pack([tuple(counts), *[()] * 7], counts, (), firsts, [4] * 8, 1)
    table = tables._table_in(torch.from_numpy(packed), size, len(counts), 1, None)
    assert size in (4096, 8192, 16384, 32768, 65536) and size <= max(4096, sum(counts) / tables.CHUNKS_WANTED)
    for number, (count, first) in enumerate(zip(counts, firsts, strict=True)):
        chunks = table.chunks[table.chunks[:, 0] == number, 1].tolist()
        assert chunks == list(range(len(chunks)))
        if count == 0:
            assert not chunks
            continue
        # chunk k holds k size - phase <= i < (k + 1) size - phase
        assert (len(chunks) - 1) * size - first % 4 < count <= len(chunks) * size - first % 4


def test_a_table_is_kept_until_something_moves():
    theta, gradient = _filled(10, 20), _filled(10, 20)
    arguments = {"parameters": [0, 1], "first_elements": [0, 0]}
    table = table_of(theta, gradient, **arguments)
    assert table_of(list(theta), tuple(gradient), **arguments) is table
    alive, gradient[1] = gradient[1], torch.zeros(20)  # the old one lives: the new one has another address
    moved = table_of(theta, gradient, **arguments)
    assert moved is not table and moved.rows[1, 1] == gradient[1].data_ptr()
    assert table_of(theta, [gradient[0], alive], **arguments) is table  # allocators go to and fro
    assert table_of(theta, gradient, parameters=[0, 2], first_elements=[0, 0]) is not table
    assert table_of(theta, gradient, parameters=[0, 1], first_elements=[0, 4]) is not table
    assert table_of([theta[0], theta[1][:19]], gradient, **arguments).rows[1, 8] == 19


def test_an_identity_stands_for_theta_and_what_is_said_of_it():
    theta, gradient, identity = _filled(10, 20), _filled(10, 20), object()
    arguments = {"parameters": [5, 6], "first_elements": [0, 4], "identity": identity}
    table = table_of(theta, gradient, **{**arguments, "identity": None})
    assert table_of(theta, gradient, **arguments) is table  # built before anybody could vouch for its return
    assert table.rows[:, [0, 1, 8, 9]].tolist() == [
        [t.data_ptr(), g.data_ptr(), t.numel(), first] for t, g, first in zip(theta, gradient, (0, 4), strict=True)
    ]
    assert table_of(theta, gradient, **arguments) is table
    other = {"parameters": [5, 7], "first_elements": [0, 4], "identity": object()}
    assert table_of(theta, gradient, **other).labels[:, 0].tolist() == [5, 7]
    moved = [gradient[0], torch.zeros(20)]
    assert table_of(theta, moved, **arguments).rows[1, 1] == moved[1].data_ptr()
    wide = [torch.zeros(10, dtype=torch.float64), torch.zeros(20, dtype=torch.float64)]
    assert table_of(theta, gradient, first=wide, **arguments).rows[1, 6] == wide[1].data_ptr()


def test_few_tables_are_kept():
    theta = _filled(10)
    first = table_of(theta, parameters=[0], first_elements=[0])
    used = table_of(theta, parameters=[1], first_elements=[0])
    for number in range(2, tables.KEPT + 1):
        table_of(theta, parameters=[number], first_elements=[0])
        assert table_of(theta, parameters=[1], first_elements=[0]) is used
    assert len(tables._tables) <= tables.KEPT
    assert table_of(theta, parameters=[0], first_elements=[0]) is not first


def test_a_table_that_cannot_be_built_leaves_the_kept_ones(monkeypatch):
    theta = _filled(10)
    table = table_of(theta, parameters=[0], first_elements=[0])

    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(tables, "_upload", no_memory)
        with pytest.raises(torch.OutOfMemoryError):
            table_of(theta, parameters=[3], first_elements=[0])
    assert table_of(theta, parameters=[0], first_elements=[0]) is table
    assert table_of(theta, parameters=[3], first_elements=[0]).labels[:, 0].tolist() == [3]


def test_tables_of_a_capture_take_memory_that_was_laid_by_and_share_none(monkeypatch):
    """The arena of a CPU, for want of a GPU: what differs there is who copies, and when."""
    device = torch.device("cpu")
    arena = tables._Arena(torch.zeros(70, dtype=torch.int64), torch.zeros(70, dtype=torch.int64))
    monkeypatch.setattr(tables, "_arenas", {device: arena})
    monkeypatch.setattr(tables, "_in_graphs", [])
    built = []
    for parameter in (5, 6):
        theta = _filled(10, 5000)
        addresses = [tuple(t.data_ptr() for t in theta), *[()] * 7]
        packed, size = tables._pack(addresses, (10, 5000), [parameter, 9], [0, 3], [4] * 8, 1)
        built.append((tables._built_in_a_capture(packed, size, 2, device, 1), addresses[0]))
    for (table, addresses), parameter in zip(built, (5, 6), strict=True):
        assert table.rows[:, 0].tolist() == list(addresses) and table.rows[:, 9].tolist() == [0, 3]
        assert table.labels[:, 0].tolist() == [parameter, 9]
        assert table.chunks.tolist() == [[0, 0], [1, 0], [1, 1]]
        assert table.rows.data_ptr() % 16 == arena.memory.data_ptr() % 16
    assert tables._in_graphs  # nobody frees what a graph reads
    with pytest.raises(RuntimeError, match="take one such step before capturing"):
        tables._built_in_a_capture(packed, size, 2, device, 1)
        tables._built_in_a_capture(packed, size, 2, device, 1)
