"""The ledger of draws: intervals join, overlaps are refused, and it survives being a tensor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bkd_fast.posterior.streams import Streams, check_stream

streams = st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 3))


few_streams = st.sampled_from([(0, 0), (2**64 - 1, 0), (5, 1)])


@given(st.lists(st.tuples(few_streams, st.integers(0, 30), st.integers(1, 6)), max_size=30))
def test_holds_exactly_the_draws_that_were_taken(additions: list[tuple[tuple[int, int], int, int]]) -> None:
    ledger, taken = Streams(), set()
    for stream, start, length in additions:
        new = {(stream, i) for i in range(start, start + length)}
        if new & taken:
            with pytest.raises(ValueError, match="already in this posterior"):
                ledger.add(stream, start, start + length)
        else:
            ledger.add(stream, start, start + length)
            taken |= new
    assert {(stream, i) for stream, (a, b) in ledger.items() for i in range(a, b)} == taken
    for (stream, (_, end)), (other, (start, _)) in zip(ledger.items(), ledger.items()[1:], strict=False):
        assert stream != other or end < start  # neighbours have joined
    assert Streams.from_tensor(ledger.to_tensor()) == ledger


@given(streams)
def test_every_run_survives_a_tensor(stream: tuple[int, int]) -> None:
    ledger = Streams()
    ledger.add(stream, 3, 7)
    assert Streams.from_tensor(ledger.to_tensor()).items() == [(stream, (3, 7))]


@pytest.mark.parametrize("stream", [(-1, 0), (2**64, 0), (0, -1), (0, 2**31)])
def test_streams_out_of_range(stream: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be in"):
        check_stream(stream)
