"""The networks: sizes that papers give, initialisation by seed, and images too small for their pooling."""

import pytest
import torch

from bkd_fast.app import config, models


def test_the_mlp_of_the_mnist_example_has_the_published_sizes():
    teacher = models.build(config.MLP(hidden=[1200, 1200]), (1, 28, 28), 10, seed=0)
    student = models.build(config.MLP(hidden=[256]), (1, 28, 28), 10, seed=0)
    assert models.count_parameters(teacher) == 785 * 1200 + 1201 * 1200 + 1201 * 10
    assert models.count_parameters(student) == 785 * 256 + 257 * 10
    assert models.describe(config.MLP(hidden=[256]), (1, 28, 28), 10) == "784-256-10"


@pytest.mark.parametrize("size", [8, 28, 29])
def test_the_cnn_maps_images_to_logits(size):
    which = config.CNN(channels=[3, 5], hidden=[7])
    model = models.build(which, (1, size, size), 4, seed=0)
    assert model(torch.zeros(2, 1, size, size)).shape == (2, 4)
    side = size // 4
    assert models.count_parameters(model) == (9 + 1) * 3 + (27 + 1) * 5 + (5 * side * side + 1) * 7 + 8 * 4
    assert models.describe(which, (1, size, size), 4) == "conv3-conv5-7-4"


def test_a_network_without_hidden_layers_is_linear():
    model = models.build(config.MLP(hidden=[]), (1, 2, 2), 3, seed=0)
    x, y = torch.randn(2, 5, 1, 2, 2)
    zero = model(torch.zeros(5, 1, 2, 2))
    torch.testing.assert_close(model(x + y) + zero, model(x) + model(y))


def test_the_seed_decides_the_parameters_and_the_global_generator_is_untouched():
    def parameters(seed):
        return torch.cat([p.flatten() for p in models.build(config.MLP(hidden=[4]), (1, 3, 3), 2, seed).parameters()])

    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    first = parameters(1)
    assert torch.rand(3).equal(expected)
    assert first.equal(parameters(1))
    assert not first.equal(parameters(2))


def test_too_many_pooling_blocks_are_an_error():
    with pytest.raises(config.ConfigError, match="images of 8x8 pixels can be halved 3 times"):
        models.build(config.CNN(channels=[2, 2, 2, 2], hidden=[]), (1, 8, 8), 10, seed=0)
