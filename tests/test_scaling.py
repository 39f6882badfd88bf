"""The scaling model of benchmarks/scaling.py: its limits are those that docs/scaling.md states."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # benchmarks is no installed package

from benchmarks.scaling import Machine, draw, step

MACHINE = Machine(2470, 2.0e12, 8, 2.3e11, 2.0e10, 1e-5)
RESNET50 = 25_557_032


def test_one_process_moves_nothing_and_many_move_twice_the_gradients():
    alone, many = step(RESNET50, 256, 1, MACHINE), step(RESNET50, 256, 10**6, MACHINE)
    assert alone.moving == alone.exposed == 0 and alone.efficiency == 1
    assert many.moving == pytest.approx(8 * RESNET50 / 2.0e10 + 40 * 1e-5, rel=1e-5)


def test_gradients_are_hidden_until_the_batch_of_a_device_is_small():
    """Between nodes from 38 images on, as the page says."""
    assert step(RESNET50, 39, 256, MACHINE).exposed == 0 < step(RESNET50, 38, 256, MACHINE).exposed


def test_a_draw_is_a_hundredth_of_an_epoch_whatever_the_number_of_processes():
    epoch = 1_281_167 / 2470
    for processes in (1, 8, 1024):
        assert draw(processes, MACHINE) / (epoch / processes) == pytest.approx(0.013, abs=5e-4)
