"""Mixed images: KDLoss takes the soft labels of torchvision's MixUp and CutMix beside the teacher's answer to the mixture."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchvision_here import make_importable

import bkd_fast as bkd

make_importable()
from torchvision.transforms import v2  # noqa: E402


@pytest.mark.parametrize("name", ["MixUp", "CutMix"])
def test_soft_labels_are_both_images_labels_in_their_shares(name):
    torch.manual_seed(0)
    x, y = torch.rand(20, 1, 8, 8), torch.arange(20) % 10
    mixed, soft = getattr(v2, name)(num_classes=10)(x, y)
    teacher, student = (nn.Sequential(nn.Flatten(), nn.Linear(64, 10)) for _ in range(2))
    with torch.no_grad():
        answers = teacher(mixed)
    z = student(mixed)
    energy = bkd.KDLoss(3.0)(z, soft, answers)
    share = float(soft[0, 0])  # of the image itself; the rest is that of the row before
    assert 0 < share < 1
    mine, other = (functional.cross_entropy(z, labels) for labels in (y, y.roll(1)))
    label_term = share * mine + (1 - share) * other
    prior = 3.0 * functional.cross_entropy(z, answers.softmax(1))
    torch.testing.assert_close(energy, label_term + prior, rtol=0, atol=1e-5)


def test_a_loop_trains_on_mixtures_with_the_teacher_online():
    """As in docs/methods/relatives.md: the collate function mixes, `sample` asks the teacher about the mixture."""
    torch.manual_seed(0)
    x, y = torch.rand(64, 1, 8, 8), torch.arange(64) % 10
    mix = v2.RandomChoice([v2.MixUp(num_classes=10), v2.CutMix(num_classes=10)])
    seen = []

    class Teacher(nn.Module):
        def forward(self, images):
            seen.append(images)
            return images.flatten(1) @ torch.ones(64, 10)

    loader = DataLoader(
        TensorDataset(x, y), 16, shuffle=True, collate_fn=lambda batch: mix(*default_collate(batch)), drop_last=True
    )
    student = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    sampler = bkd.SGLD(student.parameters(), lr=0.01, num_data=64, temperature=0.0)
    list(bkd.sample(student, sampler, bkd.KDLoss(1.0), loader, teacher=Teacher(), num_draws=5, progress=False))
    originals = {tuple(row.flatten().tolist()) for row in x}
    assert len(seen) == 5 and all(tuple(row.flatten().tolist()) not in originals for row in seen[0])
