"""The file of kept draws against what befalls files: crashes at any moment, damage, other versions, a full disk."""

import errno
import json
import os
import resource
import struct
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_draws import FakeDraw, Odd, assert_holds, indices
from torch import nn

import bkd_fast as bkd


def small(path, added, **arguments):
    model = nn.Linear(2, 2)
    draws = bkd.Draws(path, model, **arguments)
    for index in range(added):
        draws.add(FakeDraw(index, model))
    return draws, model


# ---- crashes ----


def torn(before, after, generator):
    """What a power cut may leave between two flushes: of every word of eight bytes, the old or the new one."""
    old, new = (
        np.frombuffer(state, np.uint64) for state in (before + bytes(-len(before) % 8), after + bytes(-len(after) % 8))
    )
    share = generator.choice([0.0, 0.1, 0.5, 0.9, 1.0])
    return np.where(generator.random(len(old)) < share, new, old).tobytes()[: len(after)]


@pytest.mark.parametrize("select", ["thin", "reservoir"])
def test_a_crash_at_any_moment_costs_no_draw_but_the_one_written_and_those_it_ends(tmp_path, monkeypatch, select):
    """Between two flushes any part of the changes may have come to the disk. Whatever did, the draws found are true ones."""
    path, crashed, model = tmp_path / "draws", tmp_path / "crashed", nn.Linear(3, 2)
    draws = bkd.Draws(path, model, keep=4, select=select)
    draws.add(FakeDraw(0, model))
    held = [{0}]  # after each draw
    states = []  # at each flush: the draw being added, and the file
    flush = np.memmap.flush

    def watched(file):
        flush(file)
        states.append((len(held), path.read_bytes()))

    monkeypatch.setattr(np.memmap, "flush", watched)
    for index in range(1, 20):
        draws.add(FakeDraw(index, model))
        held.append(set(indices(draws)))
    states.append((len(held) - 1, path.read_bytes()))
    monkeypatch.undo()
    assert len(states) > 15

    generator = np.random.default_rng(0)
    for (adding, before), (next_one, after) in pairwise(states):
        for _ in range(4):
            crashed.write_bytes(torn(before, after, generator))
            found = bkd.Draws(crashed, model)
            assert_holds(found, model, indices(found))
            assert held[adding - 1] & held[adding] & held[next_one] <= set(indices(found)) <= held[adding]
            # and it goes on: what is offered now is taken as ever
            arrival = found.offered
            for index in range(100, 108):
                found.add(FakeDraw(index, model))
            assert_holds(found, model, indices(found))
            assert found.offered == arrival + 8


def test_a_crash_while_the_file_is_made_leaves_none(tmp_path, monkeypatch):
    path, model = tmp_path / "draws", nn.Linear(2, 2)

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        bkd.Draws(path, model).add(FakeDraw(0, model))
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "draws.new").write_bytes(b"left by a process that was killed")
    draws = bkd.Draws(path, model)
    draws.add(FakeDraw(0, model))
    assert_holds(draws, model, [0])
    assert list(tmp_path.iterdir()) == [path]


# ---- damage ----


def test_no_altered_bit_goes_unseen(tmp_path):
    """One bit of each byte, at random, and every bit of the words that say which slots are taken."""
    path = tmp_path / "draws"
    _, model = small(path, 3, keep=2)
    whole = path.read_bytes()
    records = 8 + struct.unpack("<Q", whole[:8])[0] + 8
    generator = np.random.default_rng(1)
    bits = [8 * position + int(generator.integers(8)) for position in range(len(whole))]
    bits += [8 * (records + slot * 7 * 8) + bit for slot in range(2) for bit in range(64)]
    for bit in bits:
        altered = bytearray(whole)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(
            ValueError, match=r"^draws (is truncated, altered|was altered|is no file of draws|has version)"
        ):
            list(bkd.Draws(path, model).snapshots())


def test_altered_tensors_are_an_error_that_names_the_draw(tmp_path):
    path = tmp_path / "draws"
    draws, model = small(path, 3, keep=4)
    content = bytearray(path.read_bytes())
    at = content.index(FakeDraw(1, model).snapshot()["weight"].numpy().tobytes())
    content[at + 5] ^= 1
    path.write_bytes(content)
    draws = bkd.Draws(path, model)
    assert len(draws) == 3
    message = r"draws was altered: the tensors of slot 1, draw \(run 77, chain 3, index 1\)"
    with pytest.raises(ValueError, match=message):
        draws.predict(torch.zeros(1, 2))
    snapshots = draws.snapshots()
    assert next(snapshots)[0].index == 0
    with pytest.raises(ValueError, match=message):
        next(snapshots)


def test_a_truncated_or_lengthened_file_is_an_error(tmp_path):
    path = tmp_path / "draws"
    _, model = small(path, 1, keep=2)
    whole = path.read_bytes()
    for length in {*range(0, len(whole), 5), len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="draws is truncated, altered or no safetensors file"):
            bkd.Draws(path, model)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="draws is truncated, altered"):
        bkd.Draws(path, model)


def with_metadata(path, **changes):
    """The file with another header, as another version of the format would have it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"].update(changes)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": "3"}, "version 3: this bkd_fast reads 2; it comes from a later bkd_fast"),
        ({"version": "1"}, "version 1: this bkd_fast reads 2; sample again"),
        ({"version": "?"}, r"version \?: this bkd_fast reads 2; sample again"),
        ({"format": "other"}, "no file of draws: its metadata is"),
        ({"select": "reservoir"}, "its header does not fit its checksum"),
        ({"seed": "1"}, "its header does not fit its checksum"),
    ],
)
def test_files_of_other_versions_and_kinds(tmp_path, changes, message):
    path = tmp_path / "draws"
    _, model = small(path, 1)
    with_metadata(path, **changes)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        bkd.Draws(path, model)
    assert path.read_bytes() == before


def test_other_safetensors_files(tmp_path):
    path, model = tmp_path / "draws", nn.Linear(2, 2)
    save_file({"weight": torch.zeros(2, 2)}, path)
    with pytest.raises(ValueError, match=r"no file of draws: its metadata is \{\}"):
        bkd.Draws(path, model)
    save_file({"weight": torch.zeros(2, 2)}, path, {"format": "bkd_fast.draws", "version": "2"})
    with pytest.raises(ValueError, match="its header does not fit its checksum"):
        bkd.Draws(path, model)


def test_the_library_reads_what_we_write(tmp_path):
    model = Odd()
    draws = bkd.Draws(tmp_path / "draws", model, keep=3)
    for index in range(2):
        draws.add(FakeDraw(index, model))
    tensors = load_file(tmp_path / "draws")
    for index in range(2):
        for name, tensor in FakeDraw(index, model).snapshot().items():
            assert tensors[name].dtype == tensor.dtype
            assert torch.equal(tensors[name][index], tensor)
    assert tensors["bkd_fast.records"].shape == (3, 7)

    # and one that maps the file without copying finds every tensor at a multiple of its item's size
    content = (tmp_path / "draws").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    for name, entry in json.loads(content[8 : 8 + length]).items():
        if name != "__metadata__":
            assert (8 + length + entry["data_offsets"][0]) % tensors[name].element_size() == 0


# ---- a full disk ----


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to make any file larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("fallocate", [True, False])
def test_without_room_there_is_an_error_before_any_draw_and_no_file(tmp_path, monkeypatch, fallocate):
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    model, path = nn.Linear(300, 300), tmp_path / "draws"
    draws = bkd.Draws(path, model, keep=8)
    with files_of_at_most(2_000_000), pytest.raises(OSError, match=r"a file of \d+ bytes for 8 draws") as caught:
        draws.add(FakeDraw(0, model))
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert list(tmp_path.iterdir()) == []
    assert (len(draws), draws.offered) == (0, 0)
    draws.add(FakeDraw(0, model))  # there is room again
    assert path.stat().st_blocks * 512 >= path.stat().st_size >= 8 * 4 * 90300  # which it has all taken
    with files_of_at_most(1):
        for index in range(1, 20):
            draws.add(FakeDraw(index, model))
    assert_holds(draws, model, [0, 4, 8, 12, 16])


def test_a_full_disk_is_the_systems_error(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    model = nn.Linear(2, 2)
    with pytest.raises(OSError, match="No space left on device") as caught:
        bkd.Draws(tmp_path / "draws", model).add(FakeDraw(0, model))
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []
