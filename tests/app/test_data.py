"""The data: splits that do not overlap, batches that are a pass over the rows, errors before any work."""

import numpy as np
import pytest
import torch

from bkd_fast.app import config, data


def digits(**keys):
    return config.Data(name="digits", **keys)


def mnist(folder, monkeypatch, rows=30):
    """A file of MNIST's layout with random pixels; the first pixel of an image tells its row."""
    generator = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", rows), ("test", rows // 3)):
        pixels = generator.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        pixels[:, 0, 0] = np.arange(count)
        arrays |= {f"x_{part}": pixels, f"y_{part}": (np.arange(count) % 10).astype(np.uint8)}
    np.savez(folder / "mnist.npz", **arrays)
    monkeypatch.setenv("BKD_FAST_DATA", str(folder))
    return arrays


def test_digits_are_split_without_overlap_and_shown_as_they_were():
    from sklearn.datasets import load_digits

    images = data.load(digits(train_size=600), seed=3)
    assert images.shape == (1, 8, 8)
    assert len(images.train_y) == 600
    assert len(images.test_y) == 1197
    together = torch.cat([images.train_x, images.test_x]) + images.mean
    labelled = torch.cat([together.flatten(1), torch.cat([images.train_y, images.test_y])[:, None]], dim=1)
    pixels, classes = load_digits(return_X_y=True)
    original = np.column_stack([pixels / 16, classes]).astype(np.float32)
    ours, theirs = (array[np.lexsort(np.round(array, 4).T)] for array in (labelled.numpy(), original))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    torch.testing.assert_close(images.train_x.mean(0), torch.zeros(1, 8, 8), atol=1e-6, rtol=0)
    torch.testing.assert_close(images.test_picture(5), together[605, 0])


def test_the_seed_chooses_the_split():
    first, again, other = (data.load(digits(train_size=100), seed) for seed in (0, 0, 1))
    torch.testing.assert_close(first.train_x, again.train_x, rtol=0, atol=0)
    assert not torch.equal(first.train_y, other.train_y)


def test_mnist_keeps_the_official_split_and_pairs_images_with_labels(tmp_path, monkeypatch):
    arrays = mnist(tmp_path, monkeypatch)
    images = data.load(config.Data(name="mnist", train_size=20, test_size=7), seed=0)
    rows = ((images.train_x + images.mean)[:, 0, 0, 0] * 255).round().long()
    assert rows.unique().numel() == 20
    assert torch.equal(images.train_y, rows % 10)
    np.testing.assert_allclose(images.test_picture(4).numpy(), arrays["x_test"][4] / 255, atol=1e-6)
    assert images.test_y.tolist() == list(range(7))


def test_missing_data_says_where_it_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.delenv("BKD_FAST_DATA", raising=False)
    with pytest.raises(data.DataUnavailableError, match=r"BKD_FAST_DATA is not set"):
        data.load(config.Data(name="mnist"), seed=0)
    monkeypatch.setenv("BKD_FAST_DATA", str(tmp_path))
    with pytest.raises(data.DataUnavailableError, match=r"no such file .*BKD_FAST_DATA = "):
        data.load(config.Data(name="mnist"), seed=0)
    (tmp_path / "mnist.npz").write_bytes(b"not an archive")
    with pytest.raises(data.DataUnavailableError, match="is not MNIST"):
        data.load(config.Data(name="mnist"), seed=0)
    np.savez(tmp_path / "mnist.npz", x_train=np.zeros(3))
    with pytest.raises(data.DataUnavailableError, match="is not MNIST"):
        data.load(config.Data(name="mnist"), seed=0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"train_size": 1797}, "data.train_size = 1797: must be at most 1796"),
        ({"train_size": 1000, "test_size": 798}, "data.test_size = 798: must be at most 797"),
    ],
)
def test_more_images_than_there_are(keys, message):
    with pytest.raises(config.ConfigError, match=message):
        data.load(digits(**keys), seed=0)


def test_ordered_batches_are_the_rows():
    x = torch.arange(10)
    batches = data.Batches(x, x * 2, batch_size=4)
    assert len(batches) == 3
    for _ in range(2):
        rows = list(batches)
        assert [len(first) for first, _ in rows] == [4, 4, 2]
        assert torch.cat([first for first, _ in rows]).equal(x)
        assert torch.cat([second for _, second in rows]).equal(2 * x)


def test_shuffled_batches_are_full_distinct_rows_in_a_new_order_each_pass():
    x = torch.arange(103)
    batches = data.Batches(x, -x, batch_size=10, shuffle_seed=5)
    passes = []
    for _ in range(2):
        rows = list(batches)
        assert len(rows) == len(batches) == 10
        assert all(len(first) == 10 and second.equal(-first) for first, second in rows)
        passes.append(torch.cat([first for first, _ in rows]))
        assert passes[-1].unique().numel() == 100
    assert not passes[0].equal(passes[1])
    again = torch.cat([first for first, _ in data.Batches(x, -x, batch_size=10, shuffle_seed=5)])
    assert again.equal(passes[0])


def test_a_batch_is_at_most_all_rows_and_tensors_must_agree():
    assert [len(rows) for (rows,) in data.Batches(torch.arange(3), batch_size=10, shuffle_seed=0)] == [3]
    with pytest.raises(ValueError, match=r"\[3, 4\] rows"):
        data.Batches(torch.zeros(3), torch.zeros(4), batch_size=2)
