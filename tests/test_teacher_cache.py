"""Cached teachers: what is read is what was written, whatever killed the writer; and no damage or mistake goes unseen."""

import datetime
import errno
import json
import multiprocessing
import os
import pickle
import resource
import time
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import DataLoader, Dataset

import bkd_fast as bkd

SAMPLES, CLASSES, VIEWS = 37, 11, 3
SHAPE = {"num_samples": SAMPLES, "classes": CLASSES, "views": VIEWS}
WHOSE = {"teacher": "a" * 64, "data": "b" * 64}

# of processes that are forked from one which has imported the package
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["bkd_fast"])


def table(views, samples, classes, scale=8.0):
    return scale * torch.randn(views, samples, classes, generator=torch.Generator().manual_seed(7))


def filled(path, logits, top_k=None, batch=8):
    """A cache of logits (views, samples, classes), all written, in a random order."""
    views, samples, classes = logits.shape
    writer = bkd.TeacherCache.create(
        path, num_samples=samples, classes=classes, views=views, top_k=top_k, fingerprint=WHOSE
    )
    generator = torch.Generator().manual_seed(1)
    for view in range(views):
        for ids in torch.randperm(samples, generator=generator).split(batch):
            writer.write(ids, logits[view, ids], view)
    return writer


def assert_same(found, wanted):
    """Of a dtype, shape and value, bit for bit."""
    assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(found, wanted)


class Teacher(nn.Module):
    """Linear in eval mode; in training mode dropout would leave its mark. Counts its rows."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, CLASSES), nn.Dropout(0.9))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.layers(x)


INPUTS = torch.randn(SAMPLES, 4, generator=torch.Generator().manual_seed(5))


# ---- round trips ----


@pytest.mark.parametrize(("views", "samples", "classes", "batch"), [(1, 1, 1, 1), (3, 37, 11, 8), (2, 129, 1000, 50)])
def test_rows_come_back_rounded_to_float16(tmp_path, views, samples, classes, batch):
    logits = table(views, samples, classes)
    cache = filled(tmp_path / "cache", logits, batch=batch).finish()
    ids = torch.randint(samples, (4 * samples,), generator=torch.Generator().manual_seed(2))
    for view in range(views):
        assert_same(cache.logits(ids, view), logits[view, ids].half())
    assert_same(cache.logits(ids), logits[0, ids].half())
    assert (cache.about.num_samples, cache.about.classes, cache.about.views) == (samples, classes, views)
    # and anybody else may read it
    raw = np.memmap(tmp_path / "cache" / "rows.bin", "<f2", "r", shape=(views, samples, classes))
    assert np.array_equal(raw, logits.half().numpy())


@pytest.mark.parametrize(
    ("classes", "k", "width"), [(7, 3, 1), (10, 10, 1), (256, 1, 1), (257, 5, 2), (1000, 32, 2), (65537, 2, 4)]
)
def test_top_k_rows_come_back_with_the_rest_in_float32(tmp_path, classes, k, width):
    logits = table(2, 9, classes)
    cache = filled(tmp_path / "cache", logits, top_k=k).finish()
    assert (tmp_path / "cache" / "rows.bin").stat().st_size == 2 * 9 * (4 + k * (width + 2) + 1)
    ids = torch.tensor([8, 0, 3, 3, 5])
    for view in range(2):
        values, indices, rest = cache.logits(ids, view)
        wanted = bkd.TopKLogits.of(logits[view, ids], k)
        assert_same(values, wanted.values.half())
        assert_same(indices, wanted.indices)
        assert_same(rest, wanted.rest)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_logits_of_any_floating_dtype(tmp_path, dtype):
    logits = table(1, 5, 3).to(dtype).requires_grad_()
    cache = filled(tmp_path / "cache", logits).finish()
    assert_same(cache.logits(torch.arange(5)), logits[0].detach().half())


@pytest.mark.parametrize("top_k", [None, 4])
def test_ids_of_any_shape(tmp_path, top_k):
    cache = filled(tmp_path / "cache", table(1, 12, 9), top_k=top_k).finish()
    ids = torch.arange(12).view(3, 4)
    answers = [cache.logits(some) for some in (ids.flatten(), ids, 7, ids[:0])]
    for rows, shaped, single, none in [answers] if top_k is None else zip(*answers, strict=True):
        assert_same(shaped, rows.view(3, 4, *rows.shape[1:]))
        assert_same(single, rows[7])
        assert_same(none, rows.new_zeros(0, 4, *rows.shape[1:]))


def test_masked_classes_and_the_largest_numbers_of_float16(tmp_path):
    logits = torch.tensor([[[-torch.inf, 65504.0, -65519.0], [1e-9, -torch.inf, -torch.inf]]])
    cache = filled(tmp_path / "dense", logits).finish()
    assert_same(cache.logits(torch.arange(2)), logits[0].half())
    values, _, rest = filled(tmp_path / "top", logits, top_k=2).finish().logits(torch.arange(2))
    assert values.tolist() == [[65504.0, -65504.0], [0.0, -torch.inf]]
    assert rest.tolist() == [-torch.inf, -torch.inf]


def test_energies_of_cached_teachers_are_within_the_stated_bound(tmp_path):
    """Rounding moves log p_T by at most 2 max|t| 2^-11 / T, and so each term of the cross entropy by that share of it."""
    logits = table(1, 200, 100)[0]
    cache = filled(tmp_path / "cache", logits[None]).finish()
    student = 3 * torch.randn(200, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for temperature in (1.0, 4.0):
        energy = bkd.KDLoss(2.0, temperature, label_weight=0.0, reduction="none")
        exact = energy(student, teacher_logits=logits.double())
        cached = energy(student, teacher_logits=cache.logits(torch.arange(200)).double())
        share = torch.expm1(2 * logits.abs().amax(1) * 2**-11 / temperature)
        assert ((cached - exact).abs() <= share * exact).all()
        assert ((cached - exact).abs() > 1e-6 * exact).any()  # the rounding is there to be seen
    # and the loss takes them as they are
    assert energy(student.float(), teacher_logits=cache.logits(torch.arange(200))).shape == (200,)


# ---- writing ----


def test_rows_that_are_there_stay_as_they_are(tmp_path):
    logits = table(VIEWS, SAMPLES, CLASSES)
    writer = bkd.TeacherCache.create(tmp_path / "cache", **SHAPE, fingerprint=WHOSE)
    assert_same(writer.missing(1), torch.arange(SAMPLES))
    first = torch.tensor([3, 36, 4, 0])
    writer.write(first, logits[1, first], 1)
    writer.write(torch.arange(6), -logits[1, :6], view=1)
    writer.write(first, -logits[1, first], 1)
    writer.write(torch.zeros(0, dtype=torch.int64), torch.zeros(0, CLASSES))
    assert_same(writer.missing(1), torch.arange(6, 36))
    assert_same(writer.missing(), torch.arange(SAMPLES))
    assert writer.has(torch.tensor([7, 5, 36]), 1).tolist() == [False, True, True]

    again = bkd.TeacherCache.create(tmp_path / "cache", **SHAPE, fingerprint=WHOSE)
    for view in range(VIEWS):
        again.write(again.missing(view), logits[view, again.missing(view)], view)
    assert not len(again.missing(1))
    found = again.finish().logits(torch.arange(SAMPLES), 1)
    wanted = logits[1].half()
    wanted[[1, 2, 5]] *= -1
    assert_same(found, wanted)


def test_a_finished_cache_stays_as_it_is(tmp_path):
    logits = table(VIEWS, SAMPLES, CLASSES)
    filled(tmp_path / "cache", logits).finish()
    before = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    writer = filled(tmp_path / "cache", -logits)
    writer.finish()
    writer.finish()
    assert {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before
    assert sorted(file.name for file in before) == ["cache.json", "rows.bin"]


def test_an_unfinished_cache_is_not_read(tmp_path):
    writer = bkd.TeacherCache.create(tmp_path / "cache", **SHAPE, fingerprint=WHOSE)
    writer.write(torch.arange(10), torch.zeros(10, CLASSES), 2)
    with pytest.raises(bkd.StateFileError, match="cache is unfinished: 101 of 111 rows are missing; TeacherCache"):
        bkd.TeacherCache(tmp_path / "cache")
    with pytest.raises(bkd.StateFileError, match="cache cannot be finished: 101 of 111 rows are missing"):
        writer.finish()
    filled(tmp_path / "cache", torch.zeros(VIEWS, SAMPLES, CLASSES))
    with pytest.raises(bkd.StateFileError, match="cache is unfinished: 0 of 111 rows are missing"):
        bkd.TeacherCache(tmp_path / "cache")
    writer.finish()
    bkd.TeacherCache(tmp_path / "cache")


IDS, ZEROS = torch.arange(2), torch.zeros(2, CLASSES)


def with_one(value):
    logits = torch.zeros(2, CLASSES)
    logits[1, 4] = value
    return logits


@pytest.mark.parametrize(
    ("ids", "logits", "view", "error", "message"),
    [
        (IDS.int(), ZEROS, 0, TypeError, "ids are of torch.int32: must be an int64 tensor"),
        ([0, 1], ZEROS, 0, TypeError, "ids are of list: must be an int64 tensor"),
        (torch.tensor([0, 37]), ZEROS, 0, ValueError, r"ids hold 37: must be in \[0, 37\)"),
        (torch.tensor([-1, 2]), ZEROS, 0, ValueError, r"ids hold -1: must be in \[0, 37\)"),
        (torch.tensor([5, 5]), ZEROS, 0, ValueError, "ids hold 5 more than once"),
        (IDS, ZEROS, 3, ValueError, r"view = 3: must be in \[0, 3\)"),
        (IDS, ZEROS, -1, ValueError, r"view = -1: must be in \[0, 3\)"),
        (IDS, ZEROS.int(), 0, TypeError, "logits are of torch.int32: must be a floating-point tensor"),
        (IDS, (ZEROS,), 0, TypeError, "logits are of tuple: must be a floating-point tensor"),
        (IDS, ZEROS[:, 1:], 0, ValueError, r"ids \(2,\) and logits \(2, 10\): must be \(n,\) and \(n, 11\)"),
        (IDS[:1], ZEROS, 0, ValueError, r"ids \(1,\) and logits \(2, 11\): must be"),
        (IDS[:, None], ZEROS, 0, ValueError, r"ids \(2, 1\) and logits \(2, 11\): must be"),
        (
            IDS,
            with_one(torch.nan),
            0,
            bkd.NonFiniteError,
            r"the logits of sample 1 hold NaN or \+inf, or nothing but -inf",
        ),
        (IDS, with_one(torch.inf), 0, bkd.NonFiniteError, "the logits of sample 1 hold"),
        (IDS, ZEROS - torch.inf, 0, bkd.NonFiniteError, "the logits of sample 0 hold"),
        (
            IDS,
            with_one(65520.0),
            0,
            ValueError,
            r"logits\[1, 4\] = 65520: must be below 65520 in size, where float16 ends",
        ),
        (IDS, with_one(65536.0).bfloat16(), 0, ValueError, r"logits\[1, 4\] = 65536: must be below 65520"),
        (IDS, with_one(-1e30), 0, ValueError, r"logits\[1, 4\] = -1e\+30: must be below 65520"),
    ],
)
@pytest.mark.parametrize("top_k", [None, 2])
def test_what_cannot_be_a_row_is_refused_before_anything_is_written(tmp_path, top_k, ids, logits, view, error, message):
    writer = bkd.TeacherCache.create(tmp_path / "cache", **SHAPE, top_k=top_k, fingerprint=WHOSE)
    before = (tmp_path / "cache" / "rows.bin").read_bytes()
    with pytest.raises(error, match=message):
        writer.write(ids, logits, view)
    assert (tmp_path / "cache" / "rows.bin").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"num_samples": 0}, ValueError, "num_samples = 0: must be at least 1"),
        ({"classes": 1.0}, TypeError, r"classes = 1\.0: must be an int"),
        ({"views": True}, TypeError, "views = True: must be an int"),
        ({"top_k": 0}, ValueError, "top_k = 0: must be at least 1"),
        ({"top_k": 12}, ValueError, "top_k = 12: must be at most classes = 11"),
        ({"fingerprint": {"teacher": 1}}, TypeError, "must be a mapping of str to str"),
        ({"fingerprint": "teacher"}, TypeError, "fingerprint = 'teacher': must be a mapping of str to str"),
    ],
)
def test_arguments_out_of_range_make_no_cache(tmp_path, changes, error, message):
    with pytest.raises(error, match=message):
        bkd.TeacherCache.create(tmp_path / "cache", **{**SHAPE, "fingerprint": WHOSE, **changes})
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("finished", [False, True])
def test_a_cache_of_something_else_is_neither_gone_on_with_nor_touched(tmp_path, finished):
    writer = filled(tmp_path / "cache", table(VIEWS, SAMPLES, CLASSES))
    if finished:
        writer.finish()
    before = {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()}
    for changes, differences in [
        ({"fingerprint": {**WHOSE, "teacher": "c"}}, f"fingerprint['teacher'] is {'a' * 64!r} there, 'c' here"),
        ({"fingerprint": {"teacher": WHOSE["teacher"]}}, f"fingerprint['data'] is {'b' * 64!r} there, None here"),
        ({"fingerprint": {**WHOSE, "crop": "1"}}, "fingerprint['crop'] is None there, '1' here"),
        ({"classes": 12, "top_k": 4}, "classes is 11 there, 12 here; top_k is None there, 4 here"),
    ]:
        with pytest.raises(ValueError) as caught:
            bkd.TeacherCache.create(tmp_path / "cache", **{**SHAPE, "fingerprint": WHOSE, **changes})
        assert str(caught.value) == f"{tmp_path / 'cache'} is another cache: {differences}"
    assert {file: file.read_bytes() for file in (tmp_path / "cache").iterdir()} == before


# ---- reading ----


def test_a_reader_that_expects_another_teacher_is_told_what_differs(tmp_path):
    filled(tmp_path / "cache", table(1, 5, 3)).finish()
    bkd.TeacherCache(tmp_path / "cache", expect=dict(reversed(WHOSE.items())))
    with pytest.raises(ValueError, match=r"another cache: fingerprint\['data'\] is 'b+' there, 'other' here$"):
        bkd.TeacherCache(tmp_path / "cache", expect={**WHOSE, "data": "other"})


def test_ids_and_views_that_are_not_there(tmp_path):
    cache = filled(tmp_path / "cache", table(2, 5, 3)).finish()
    for ids, view, error, message in [
        (torch.tensor([4, 5, 6]), 0, ValueError, r"ids hold 5: must be in \[0, 5\)"),
        (torch.tensor([2, -3]), 0, ValueError, r"ids hold -3: must be in \[0, 5\)"),
        (-1, 0, ValueError, r"ids hold -1: must be in \[0, 5\)"),
        (0, 2, ValueError, r"view = 2: must be in \[0, 2\)"),
        (torch.zeros(2), 0, TypeError, "ids are of torch.float32"),
    ]:
        with pytest.raises(error, match=message):
            cache.logits(ids, view)


def test_a_missing_cache_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "none")):
        bkd.TeacherCache(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=str(tmp_path / "empty")):
        bkd.TeacherCache(tmp_path / "empty")


class Views(Dataset):
    """As docs/scale.md has it, with noise for a transform."""

    def __init__(self, images):
        self.images, self.cache, self.view = images, None, 0

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        with torch.random.fork_rng([]):
            torch.default_generator.manual_seed(5 + self.view * len(self) + i)
            x = self.images[i] + torch.randn_like(self.images[i])
        return (x, i) if self.cache is None else (x, i, self.cache.logits(i, self.view))


@pytest.mark.parametrize("top_k", [None, 4])
def test_workers_of_a_loader_read_the_views_that_the_teacher_saw(tmp_path, monkeypatch, top_k):
    monkeypatch.chdir(tmp_path)
    dataset, teacher = Views(INPUTS), Teacher()
    writer = bkd.TeacherCache.create("cache", **SHAPE, top_k=top_k, fingerprint=WHOSE)
    for dataset.view in range(VIEWS):
        bkd.record_teacher(teacher, DataLoader(dataset, 6, shuffle=True), writer, device="cpu", view=dataset.view)
    dataset.cache = writer.finish()
    dataset.cache.logits(0)  # the file is mapped
    assert len(pickle.dumps(dataset.cache)) < 1000
    monkeypatch.chdir("/")  # and is found wherever the workers are
    seen = []
    for epoch in range(VIEWS - 1, VIEWS + 1):
        dataset.view = epoch % VIEWS
        for x, ids, found in DataLoader(dataset, 5, shuffle=True, num_workers=2, multiprocessing_context=FORKS):
            wanted = teacher.layers[0](x).detach()
            if top_k is not None:
                found, wanted = found.values, bkd.TopKLogits.of(wanted, top_k).values
            torch.testing.assert_close(found.float(), wanted, rtol=2**-10, atol=1e-6)
            seen += ids.tolist()
    assert sorted(seen) == sorted([*range(SAMPLES)] * 2)


# ---- damage ----


def test_no_altered_bit_goes_unseen(tmp_path):
    """One bit of each byte, at random."""
    filled(tmp_path / "cache", table(2, 7, 3), top_k=2).finish()
    generator = np.random.default_rng(1)
    for name in ("rows.bin", "cache.json"):
        file = tmp_path / "cache" / name
        whole = file.read_bytes()
        for position in range(len(whole)):
            altered = bytearray(whole)
            altered[position] ^= 1 << int(generator.integers(8))
            file.write_bytes(altered)
            with pytest.raises(bkd.StateFileError, match=name):
                bkd.TeacherCache(tmp_path / "cache")
            if name == "cache.json":
                with pytest.raises(bkd.StateFileError, match=name):
                    bkd.TeacherCache(tmp_path / "cache", verify=False)
        file.write_bytes(whole)
    bkd.TeacherCache(tmp_path / "cache")


def test_a_truncated_lengthened_or_missing_file_is_an_error(tmp_path):
    filled(tmp_path / "cache", table(2, 7, 3)).finish()
    for name in ("rows.bin", "cache.json"):
        file = tmp_path / "cache" / name
        whole = file.read_bytes()
        for content in (b"", whole[:10], whole[:-2], whole + b"\1"):
            file.write_bytes(content)
            with pytest.raises(bkd.StateFileError, match=name):
                bkd.TeacherCache(tmp_path / "cache", verify=False)
            with pytest.raises(bkd.StateFileError, match=name):
                filled(tmp_path / "cache", table(2, 7, 3))
        file.write_bytes(whole)
    (tmp_path / "cache" / "rows.bin").unlink()
    with pytest.raises(bkd.StateFileError, match=r"rows.bin has 0 bytes: must have 98; it is missing"):
        bkd.TeacherCache(tmp_path / "cache")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, r"has version 2: must be 1; it was written by a later bkd_fast"),
        ({"version": "?"}, r"has version '\?': must be 1$"),
        ({"format": "bkd_fast.card"}, "is no teacher cache: its format must be 'bkd_fast.teacher_cache'"),
        ({"fingerprint": {}}, "was altered: it does not fit its seal"),
        ({"views": 1, "num_samples": 14}, "was altered: it does not fit its seal"),
        ({"sha256": None}, "was altered: it does not fit its seal"),
    ],
)
def test_another_cache_json(tmp_path, changes, message):
    filled(tmp_path / "cache", table(2, 7, 3)).finish()
    file = tmp_path / "cache" / "cache.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(bkd.StateFileError, match=message):
        bkd.TeacherCache(tmp_path / "cache", verify=False)
    file.write_text("[]")
    with pytest.raises(bkd.StateFileError, match="is no teacher cache"):
        bkd.TeacherCache(tmp_path / "cache")


# ---- kills, crashes, full disks ----

MANY, KILLED_SHAPE = 4001, {"num_samples": 4001, "classes": 101, "fingerprint": WHOSE}


def write_until_killed(path, seed, started):
    """In a random order, rows of which most cross pages."""
    logits = table(1, MANY, 101)[0]
    writer = bkd.TeacherCache.create(path, **KILLED_SHAPE)
    missing = writer.missing()
    missing = missing[torch.randperm(len(missing), generator=torch.Generator().manual_seed(seed))]
    started.set()
    for ids in missing.split(5):
        writer.write(ids, logits[ids])


def test_a_killed_run_leaves_no_row_marked_that_is_not_there_and_goes_on(tmp_path):
    path, logits = tmp_path / "cache", table(1, MANY, 101)[0]
    generator, left = np.random.default_rng(0), []
    for seed in range(5):
        started = FORKS.Event()
        process = FORKS.Process(target=write_until_killed, args=(path, seed, started))
        process.start()
        assert started.wait(60)
        time.sleep(generator.uniform(0, 0.15))
        process.kill()
        process.join()
        writer = bkd.TeacherCache.create(path, **KILLED_SHAPE)
        done = writer.has(torch.arange(MANY))
        rows = np.fromfile(path / "rows.bin", np.float16, MANY * 101).reshape(MANY, 101)
        assert_same(torch.from_numpy(rows)[done], logits[done].half())
        left.append(len(writer.missing()))
    assert left == sorted(left, reverse=True)
    assert left[-1] < MANY
    writer.write(writer.missing(), logits[writer.missing()])
    assert_same(writer.finish().logits(torch.arange(MANY)), logits.half())


@pytest.mark.parametrize("top_k", [None, 3])
def test_a_power_cut_leaves_no_row_marked_that_is_not_there(tmp_path, monkeypatch, top_k):
    """Between two fsyncs any bytes may have come to the disk. Whatever did, the rows marked are true ones."""
    logits = table(1, 30, 7)
    reference = filled(tmp_path / "reference", logits, top_k=top_k).about.map(tmp_path / "reference")[0]
    file = tmp_path / "cache" / "rows.bin"
    states, fsync = [], os.fsync

    def watched(descriptor):
        fsync(descriptor)
        if file.exists():
            states.append(file.read_bytes())

    monkeypatch.setattr(os, "fsync", watched)
    writer = filled(tmp_path / "cache", logits, top_k=top_k, batch=4)
    writer.finish()
    monkeypatch.undo()
    assert len(states) == 11  # cache.json, eight batches, the last marks before cache.json again

    generator = np.random.default_rng(0)
    for before, after in pairwise(states):
        old, new = np.frombuffer(before, np.uint8), np.frombuffer(after, np.uint8)
        for share in (0.0, 0.1, 0.5, 0.9, 1.0):
            file.write_bytes(np.where(generator.random(len(old)) < share, new, old).tobytes())
            rows, marks = writer.about.map(tmp_path / "cache")
            assert np.array_equal(rows[marks == 1], reference[marks == 1])


@contextmanager
def files_of_at_most(size):
    """The kernel refuses to make any file larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_without_room_no_cache_is_made(tmp_path):
    path = tmp_path / "cache"
    shape = {"num_samples": 2000, "classes": 500, "fingerprint": WHOSE}
    with files_of_at_most(1_000_000), pytest.raises(OSError, match="cannot make a cache of 2002000 bytes") as caught:
        bkd.TeacherCache.create(path, **shape)
    assert (caught.value.errno, caught.value.filename) == (errno.EFBIG, str(path))
    assert list(path.iterdir()) == []
    with files_of_at_most(50), pytest.raises(OSError, match="cannot make a cache of 3 bytes"):  # but not cache.json
        bkd.TeacherCache.create(path, num_samples=1, classes=1, fingerprint=WHOSE)
    assert list(path.iterdir()) == []
    bkd.TeacherCache.create(path, **shape)
    file = (path / "rows.bin").stat()
    assert file.st_blocks * 512 >= file.st_size == 2_002_000  # it has taken its room


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_disk_that_fails_leaves_rows_unmarked_and_caches_unfinished(tmp_path, monkeypatch):
    path, logits = tmp_path / "cache", table(1, 9, 5)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        filled(path, logits)
    assert list(path.iterdir()) == []
    monkeypatch.undo()
    writer = bkd.TeacherCache.create(path, num_samples=9, classes=5, fingerprint=WHOSE)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        writer.write(torch.arange(9), -logits[0])
    assert len(writer.missing()) == 9
    monkeypatch.undo()
    writer.write(torch.arange(9), logits[0])
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        writer.finish()
    monkeypatch.undo()
    with pytest.raises(bkd.StateFileError, match="unfinished"):
        bkd.TeacherCache(path)
    assert_same(writer.finish().logits(torch.arange(9)), logits[0].half())


# ---- processes ----


def run_process(rank, folder):
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
    try:
        logits = table(VIEWS, SAMPLES, CLASSES)
        writer = bkd.TeacherCache.create(f"{folder}/cache", **SHAPE, top_k=5, fingerprint=WHOSE)
        for view in range(VIEWS):
            missing = writer.missing(view)
            for ids in missing[missing * 2 // SAMPLES == rank].split(3):
                if (view, rank) != (2, 1):
                    writer.write(ids, logits[view, ids], view)
        with pytest.raises(bkd.StateFileError, match="18 of 111 rows are missing"):  # on both
            writer.finish()
        ids = torch.arange(SAMPLES)
        if rank == 1:
            time.sleep(0.3)  # for which the other must wait
            writer.write(ids, logits[2], 2)
        for cache in (writer.finish(), writer.finish(), bkd.TeacherCache(f"{folder}/cache", expect=WHOSE)):
            for view in range(VIEWS):
                assert_same(cache.logits(ids, view).indices, bkd.TopKLogits.of(logits[view], 5).indices)
        with pytest.raises(ValueError, match="classes is 11 there, 12 here"):
            bkd.TeacherCache.create(f"{folder}/cache", **{**SHAPE, "classes": 12}, top_k=5, fingerprint=WHOSE)
        with pytest.raises(NotADirectoryError, match=r"rows.bin"):
            bkd.TeacherCache.create(f"{folder}/cache/rows.bin/cache", **SHAPE, fingerprint=WHOSE)
    finally:
        dist.destroy_process_group()


def test_processes_write_one_cache(tmp_path):
    mp.start_processes(run_process, (str(tmp_path),), nprocs=2, start_method="forkserver")


# ---- recording ----


def batches(ids, size=6):
    return [(INPUTS[part], part) for part in ids.split(size)]


def test_a_teacher_is_recorded_and_goes_on_where_it_ended(tmp_path):
    teacher = Teacher()
    teacher.layers[1].eval()  # a mode of its own, to come back
    writer = bkd.TeacherCache.create(tmp_path / "cache", num_samples=SAMPLES, classes=CLASSES, fingerprint={})
    order = torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(6))
    bkd.record_teacher(teacher, batches(order[:15]), writer, device="cpu")
    assert (len(writer.missing()), teacher.seen) == (SAMPLES - 15, 15)
    bkd.record_teacher(teacher, batches(order), writer, device="cpu")
    assert (len(writer.missing()), teacher.seen) == (0, 15 + SAMPLES - 12)  # two batches were there, half of one too
    assert [module.training for module in teacher.modules()] == [True, True, True, False]
    found = writer.finish().logits(torch.arange(SAMPLES))
    with torch.no_grad():
        torch.testing.assert_close(found.float(), teacher.layers[0](INPUTS), rtol=2**-10, atol=1e-6)


def test_batches_with_labels_and_views(tmp_path):
    teacher = Teacher().eval()
    writer = bkd.TeacherCache.create(tmp_path / "cache", **SHAPE, fingerprint={})
    loader = [(x, torch.zeros(len(x)), ids) for x, ids in batches(torch.arange(SAMPLES))]
    bkd.record_teacher(teacher, loader, writer, device="cpu", view=2)
    assert [len(writer.missing(view)) for view in range(VIEWS)] == [SAMPLES, SAMPLES, 0]


def test_a_teacher_or_loader_of_another_form(tmp_path):
    teacher = Teacher()
    writer = bkd.TeacherCache.create(tmp_path / "cache", **SHAPE, fingerprint={})
    with pytest.raises(ValueError, match="last element is not int64 row ids"):
        bkd.record_teacher(teacher, [INPUTS], writer, device="cpu")
    with pytest.raises(ValueError, match=r"ids hold 37: must be in"):
        bkd.record_teacher(teacher, [(INPUTS[:1], torch.tensor([37]))], writer, device="cpu")
    with pytest.raises(ValueError, match=r"logits \(6, 4\): must be \(n,\) and \(n, 11\)"):
        bkd.record_teacher(nn.Identity(), batches(torch.arange(9)), writer, device="cpu")
    assert teacher.training
    assert len(writer.missing()) == SAMPLES


# ---- whose teacher ----


def test_a_fingerprint_is_of_names_dtypes_shapes_and_values():
    def network(**tensors):
        module = nn.Module()
        for name, tensor in tensors.items():
            module.register_buffer(name, tensor)
        return module

    ones = torch.ones(2, 3)
    same = bkd.fingerprint_of(network(a=ones, b=torch.zeros(1)))
    assert same == bkd.fingerprint_of(network(b=torch.zeros(1), a=torch.ones(3, 2).T))
    others = [
        network(a=ones, c=torch.zeros(1)),
        network(a=torch.ones(3, 2), b=torch.zeros(1)),
        network(a=ones.double(), b=torch.zeros(1)),
        network(a=ones, b=torch.full((1,), 1e-45)),
        network(a=torch.zeros(1), b=ones),
        network(a=ones),
    ]
    assert len({same, *map(bkd.fingerprint_of, others)}) == 7
    assert len(same) == 64


def test_a_state_that_is_no_tensor_has_no_fingerprint():
    class Other(nn.Module):
        def get_extra_state(self):
            return {"calls": 3}

    with pytest.raises(TypeError, match=r"state_dict\(\)\['_extra_state'\] is a dict: must be a tensor"):
        bkd.fingerprint_of(Other())
