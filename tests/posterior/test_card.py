"""The model card: what it says, that it is JSON for any reader, and that it is held against the file."""

import errno
import hashlib
import json
import os
import resource
from dataclasses import dataclass
from importlib.metadata import version

import numpy as np
import pytest
import torch
from test_draws import FakeDraw, network
from torch import nn

import bkd_fast as bkd
from bkd_fast.posterior.card import data_hash


@pytest.fixture
def draws(tmp_path):
    model = network()
    draws = bkd.Draws(tmp_path / "mnist.safetensors", model, keep=4, dtype=torch.bfloat16, select="reservoir", seed=3)
    for index in range(4):
        draws.add(FakeDraw(index, model, step=10 * index))
    return draws


def read(path):
    """As a reader that knows no NaN and Infinity."""

    def refuse(constant):
        raise ValueError(constant)

    return json.loads(path.read_text(), parse_constant=refuse)


# ---- the hash of data ----


def test_the_hash_of_data_is_sha256_of_dtypes_shapes_and_bytes():
    images, labels = torch.randn(4, 3), torch.arange(4)
    digest = hashlib.sha256()
    digest.update(b"torch.float32 (4, 3) " + images.numpy().tobytes())
    digest.update(b"torch.int64 (4,) " + np.arange(4).tobytes())
    assert data_hash(images, labels) == digest.hexdigest()
    assert data_hash(images.T.contiguous().T, torch.arange(8)[::2] // 2) == digest.hexdigest()
    assert data_hash(images, torch.arange(12).view(4, 3)[:, 0]) == data_hash(images, torch.tensor([0, 3, 6, 9]))


def test_data_that_differ_have_other_hashes():
    data = torch.zeros(2, 3)
    changed = data.clone()
    changed[1, 2] = 1e-30
    different = [
        (data,),
        (changed,),
        (-data,),
        (data.T,),
        (data.flatten(),),
        (data.int(),),
        (data.bfloat16(),),
        (data.half(),),
        (data[0], data[1]),
        (data, data),
        (data, data.int()),
        (data.int(), data),
        (data[:0],),
        (data[:, :0],),
        (torch.tensor(0.0),),
        (data.bool(),),
    ]
    assert len({data_hash(*tensors) for tensors in different}) == len(different)


def test_what_has_no_hash():
    with pytest.raises(ValueError, match="at least one"):
        data_hash()
    with pytest.raises(TypeError, match=r"tensors\[1\] is a ndarray"):
        data_hash(torch.zeros(2), np.zeros(2))


# ---- what a card says ----


def test_a_card_says_what_the_file_is(draws):
    path = draws.write_card()
    assert path == draws.path.with_suffix(".json")
    assert read(path) == {
        "format": "bkd_fast.card",
        "version": 1,
        "bkd_fast": version("bkd_fast"),
        "torch": torch.__version__,
        "select": "reservoir",
        "seed": 3,
        "keep": 4,
        "kept": 4,
        "offered": 4,
        "draws": [{"run": 77, "chain": 3, "index": i, "step": 10 * i} for i in range(4)],
        "parameters": 5 * 4 + 4 + 4 * 3 + 3,
        "tensors": {
            "0.weight": {"shape": [4, 5], "dtype": "bfloat16"},
            "0.bias": {"shape": [4], "dtype": "bfloat16"},
            "2.weight": {"shape": [3, 4], "dtype": "bfloat16"},
            "2.bias": {"shape": [3], "dtype": "bfloat16"},
        },
        "sha256": hashlib.sha256(draws.path.read_bytes()).hexdigest(),
        "data_hash": None,
        "sampler": None,
        "health": None,
        "notes": {},
    }


def test_a_card_says_how_the_draws_were_made(draws):
    model = draws.model
    sampler = bkd.SGHMC(
        [{"params": model[0].parameters(), "lr": torch.tensor(0.25)}, {"params": model[2].parameters()}],
        lr=0.5,
        num_data=60000,
        temperature=0.125,
        prior_precision=2.0,
        seed=2**64 - 1,
    )
    sampler.param_groups[1]["large"] = torch.zeros(2000)
    sampler.param_groups[1]["dtype"] = torch.float16
    sampler.param_groups[1]["pair"] = (1.0, float("inf"))
    path = draws.write_card(
        data_hash=data_hash(torch.zeros(3)),
        sampler=sampler,
        health=bkd.Health([0.25, float("nan")], [1.0, -1.0]),
        notes={"teacher": "ResNet-50, Fashion-MNIST"},
    )
    card = read(path)
    assert card["data_hash"] == hashlib.sha256(b"torch.float32 (3,) " + bytes(12)).hexdigest()
    assert card["sampler"]["name"] == "SGHMC"
    first, second = card["sampler"]["groups"]
    assert (first["lr"], second["lr"]) == (0.25, 0.5)
    for group in (first, second):
        assert "params" not in group
        assert (group["num_data"], group["temperature"], group["prior_precision"]) == (60000, 0.125, 2.0)
        assert (group["momentum"], group["seed"], group["nesterov"], group["moments"]) == (0.9, 2**64 - 1, False, None)
    assert second["large"].startswith("torch.float32 (2000,), SHA-256 ")
    assert (second["dtype"], second["pair"]) == ("torch.float16", [1.0, None])
    assert card["health"] == {"noise_share": [0.25, None], "stationarity": [1.0, -1.0]}
    assert card["notes"] == {"teacher": "ResNet-50, Fashion-MNIST"}
    assert draws.check_card() == card


def test_any_optimizer_and_any_figures_will_do(draws):
    @dataclass
    class Figures:
        r_hat: torch.Tensor
        by_layer: dict

    sampler = torch.optim.SGD(draws.model.parameters(), lr=0.1)
    card = read(draws.write_card(sampler=sampler, health=Figures(torch.tensor([1.0, 1.5]), {0: np.float64(0.5)})))
    assert (card["sampler"]["name"], card["sampler"]["groups"][0]["lr"]) == ("SGD", 0.1)
    assert card["health"] == {"r_hat": [1.0, 1.5], "by_layer": {"0": 0.5}}
    figures = {
        "r_hat": np.float32(1.5),
        "draws": np.int64(3),
        "steps": range(2),
        "ess": np.ones((1, 2)),
        "ok": np.True_,
    }
    assert read(draws.write_card(health=figures))["health"] == {
        "r_hat": 1.5,
        "draws": 3,
        "steps": [0, 1],
        "ess": [[1.0, 1.0]],
        "ok": True,
    }


# ---- the card against the file ----


def test_a_card_is_one_of_the_file_as_it_was(draws):
    card = read(draws.write_card())
    assert draws.check_card() == card
    assert bkd.Draws(draws.path, network()).check_card() == card
    draws.add(FakeDraw(4, draws.model))
    with pytest.raises(
        ValueError, match=r"no card of mnist\.safetensors as it is now: offered is 4 in the card and 5 in"
    ):
        draws.check_card()
    draws.write_card()
    assert draws.check_card()["offered"] == 5
    content = bytearray(draws.path.read_bytes())
    content[-1] ^= 1
    draws.path.write_bytes(content)
    with pytest.raises(ValueError, match="sha256 is '"):
        draws.check_card()


@pytest.mark.parametrize(
    ("name", "value"),
    [("kept", 3), ("select", "thin"), ("parameters", 40), ("tensors", {}), ("draws", []), ("sha256", "0" * 64)],
)
def test_a_card_that_says_something_else_is_not_the_files(draws, name, value):
    path = draws.write_card()
    path.write_text(json.dumps({**read(path), name: value}))
    with pytest.raises(ValueError, match=f"mnist.json is no card of mnist.safetensors as it is now: {name} is"):
        draws.check_card()
    path.write_text(json.dumps({key: fact for key, fact in read(path).items() if key != name}))
    with pytest.raises(ValueError, match=f"{name} is None in the card"):
        draws.check_card()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "mnist.json is truncated, altered or no card"),
        ('{"format": "bkd_fast.ca', "mnist.json is truncated, altered or no card"),
        ("[]", "mnist.json is no card of draws"),
        ('{"format": "other", "version": 1}', "mnist.json is no card of draws"),
        ('{"format": "bkd_fast.card", "version": 2}', "a card of version 2: this bkd_fast reads 1"),
        ('{"format": "bkd_fast.card"}', "a card of version None: this bkd_fast reads 1"),
    ],
)
def test_cards_that_cannot_be_read(draws, text, message):
    draws._card.write_text(text)
    with pytest.raises(ValueError, match=message):
        draws.check_card()


def test_without_a_card_or_draws(draws, tmp_path):
    with pytest.raises(FileNotFoundError):
        draws.check_card()
    empty = bkd.Draws(tmp_path / "empty", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="empty holds no draws"):
        empty.write_card()
    assert list(tmp_path.iterdir()) == [draws.path]


# ---- what cannot be written leaves the old card ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"data_hash": torch.zeros(3)}, "data_hash is a Tensor"),
        ({"sampler": {"lr": 0.1}}, "sampler is a dict"),
        ({"health": 0.5}, "health is a float"),
        ({"health": bkd.Health}, "health is a type"),
        ({"notes": {"seed": 3}}, "notes = {'seed': 3}"),
        ({"notes": "a model"}, "notes = 'a model'"),
    ],
)
def test_arguments_of_other_types(draws, arguments, message):
    before = draws.write_card(notes={"first": "card"}).read_text()
    with pytest.raises(TypeError, match=message):
        draws.write_card(**arguments)
    assert draws._card.read_text() == before


def test_a_full_disk_leaves_the_old_card(draws, tmp_path):
    before = draws.write_card(notes={"first": "card"}).read_text()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limit[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)):
            draws.write_card()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert draws._card.read_text() == before
    assert sorted(tmp_path.iterdir()) == [draws._card, draws.path]
