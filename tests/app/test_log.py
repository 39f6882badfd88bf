"""The record of a run: what is written, and the chain's energies averaged over stretches of steps."""

import json

import pytest
import torch

from bkd_fast.app.log import ChainLog, Log
from bkd_fast.sampling import Health, StepRecord


def events(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def feed(chain, phase, steps, energies):
    for step, energy in zip(steps, energies, strict=True):
        chain.on_step(StepRecord(step, phase, torch.tensor(energy)))


def test_every_line_is_an_event_with_its_time_and_is_there_at_once(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        log.write("start", answer=42)
        (first,) = events(tmp_path / "log.jsonl")
        assert first["event"] == "start"
        assert first["answer"] == 42
        log.write("end")
    assert [event["event"] for event in events(tmp_path / "log.jsonl")] == ["start", "end"]
    assert events(tmp_path / "log.jsonl")[1]["seconds"] >= first["seconds"] >= 0


def test_a_stretch_of_steps_is_averaged_and_ends_with_its_phase(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        chain = ChainLog(log, every=2)
        feed(chain, "burn_in", [1, 2, 3], [1.0, 3.0, 7.0])
        feed(chain, "sampling", [4, 5], [10.0, 20.0])
        feed(chain, "sampling", [6], [5.0])
        chain.on_end(Health([0.25], [-0.5]))
    assert chain.steps == [2, 3, 5, 6]
    assert chain.phases == ["burn_in", "burn_in", "sampling", "sampling"]
    assert chain.energies == [2.0, 7.0, 15.0, 5.0]
    assert (chain.noise_share, chain.stationarity) == ([0.25], [-0.5])
    *stretches, health = events(tmp_path / "log.jsonl")
    assert [event["count"] for event in stretches] == [2, 1, 2, 1]
    assert [event["energy"] for event in stretches] == chain.energies
    assert health["noise_share"] == [0.25]


def test_a_running_mean_does_not_change_the_tensors_it_is_given(tmp_path):
    with Log(tmp_path / "log.jsonl") as log:
        chain = ChainLog(log, every=3)
        energy = torch.tensor(1.5, dtype=torch.float64)
        for step in (1, 2):
            chain.on_step(StepRecord(step, "sampling", energy))
        assert float(energy) == 1.5
        assert chain.energies == []
        chain.on_step(StepRecord(3, "sampling", torch.tensor(3.0)))
    assert chain.energies == pytest.approx([2.0])
