"""States on disk: read back bit for bit, replaced in one step, and everything that can be wrong with them."""

import json
import resource

import pytest
import torch
from predictive_data import stream
from torch import Tensor

from bkd_fast import PosteriorPredictive, StateFileError

LOGITS = stream("iid", 90, 6, 5, seed=1)


def filled(logits: Tensor = LOGITS, **settings) -> PosteriorPredictive:
    posterior = PosteriorPredictive(6, 5, stream=(2**63 + 3, 1), **settings)
    if settings:
        posterior.choose_classes_by(LOGITS[0])
    posterior.update_logits(logits)
    return posterior


def assert_same(a: PosteriorPredictive, b: PosteriorPredictive) -> None:
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    for name, value in x.items():
        assert torch.equal(value, y[name]) if isinstance(value, Tensor) else value == y[name], name


@pytest.mark.parametrize("settings", [{}, {"track": "topk:2", "diagnostics": True, "traces": True, "num_draws": 90}])
def test_loaded_posteriors_are_the_saved_ones_and_go_on(tmp_path, settings) -> None:
    sidecar = filled(LOGITS[:70], **settings).save(tmp_path / "runs" / "posterior")
    assert sidecar.name == "posterior.json"
    loaded = PosteriorPredictive.load(sidecar)
    assert_same(loaded, filled(LOGITS[:70], **settings))
    loaded.update_logits(LOGITS[70:])
    whole = filled(LOGITS, **settings)
    assert loaded.streams == whole.streams and torch.equal(loaded.quantile(0.3), whole.quantile(0.3))
    about = json.loads(sidecar.read_text())
    assert about["format"] == "bkd_fast.posterior" and about["numbers"]["num_rows"] == 6
    assert about["streams"] == [{"run": 2**63 + 3, "chain": 1, "draws": [0, 70]}]


def test_a_new_state_replaces_the_old_one(tmp_path) -> None:
    filled(LOGITS[:10]).save(tmp_path / "p")
    filled(LOGITS[:20]).save(tmp_path / "p.json")
    assert PosteriorPredictive.load(tmp_path / "p").counts.tolist() == [20] * 6
    assert len([*tmp_path.iterdir()]) == 2


def test_a_full_disk_leaves_the_old_state(tmp_path) -> None:
    old = filled(LOGITS[:10])
    old.save(tmp_path / "p")
    large = PosteriorPredictive(400, 50)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
    try:
        with pytest.raises(StateFileError, match=r"p\.json could not be saved: .*; an earlier state is intact"):
            large.save(tmp_path / "p")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_same(PosteriorPredictive.load(tmp_path / "p"), old)
    assert len([*tmp_path.iterdir()]) == 2


def test_a_place_that_cannot_be_written(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateFileError, match=r"p\.json could not be saved"):
        filled().save(tmp_path / "file" / "p")


def break_with(change):
    """A change of the JSON."""

    def broken(sidecar) -> None:
        about = json.loads(sidecar.read_text())
        change(about)
        sidecar.write_text(json.dumps(about))

    return broken


def tensors_of(sidecar):
    return sidecar.with_name(json.loads(sidecar.read_text())["tensors"])


def alter(sidecar) -> None:
    content = bytearray(tensors_of(sidecar).read_bytes())
    content[-40] ^= 1
    tensors_of(sidecar).write_bytes(content)


FAULTS = {
    "truncated": (lambda s: tensors_of(s).write_bytes(tensors_of(s).read_bytes()[:-9]), "bytes: must have .*truncated"),
    "altered": (alter, "is altered: its checksum is not the one in p.json"),
    "missing": (lambda s: tensors_of(s).unlink(), "names p-.*, which is missing"),
    "no JSON": (lambda s: s.write_text("{"), "p.json is no JSON"),
    "a list": (lambda s: s.write_text("[1]"), "p.json has format 'list'"),
    "another kind": (break_with(lambda a: a.update(format="bkd_fast.draws")), "must be 'bkd_fast.posterior'"),
    "the future": (break_with(lambda a: a.update(version=2)), "version 2: must be 1; it was written by a later bkd_fast"),
    "the past": (break_with(lambda a: a.update(version=0)), "version 0: must be 1$"),
    "incomplete": (break_with(lambda a: a.pop("sha256")), "p.json is incomplete: KeyError"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_wrong_with_a_state_is_said(tmp_path, fault: str) -> None:
    sidecar = filled().save(tmp_path / "p")
    spoil, message = FAULTS[fault]
    spoil(sidecar)
    with pytest.raises(StateFileError, match=message):
        PosteriorPredictive.load(sidecar)


def test_no_state_at_all(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        PosteriorPredictive.load(tmp_path / "p")


def test_classes_that_are_not_chosen_cannot_be_loaded(tmp_path) -> None:
    sidecar = PosteriorPredictive(6, 5, track="topk:2").save(tmp_path / "p")
    with pytest.raises(StateFileError, match=r"p\.json has no tracked classes"):
        PosteriorPredictive.load(sidecar)
