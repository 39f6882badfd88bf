"""Lightning around a sampler: automatic and manual optimisation, clipping, accumulation, and resuming: the same chain."""

import sys
import warnings
from pathlib import Path

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).parents[1] / "samplers"))
from family import every_sampler


class _Student(lightning.LightningModule):
    def __init__(self, member, manual=False):
        super().__init__()
        torch.manual_seed(1)
        self.member = member
        self.automatic_optimization = not manual
        self.net = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 3))

    def configure_optimizers(self):
        sampler = self.member.chain(self.net.named_parameters(), seed=2**64 - 3)
        return [sampler], [torch.optim.lr_scheduler.ExponentialLR(sampler, 0.8)]

    def loss(self, batch):
        inputs, labels = batch
        return torch.nn.functional.cross_entropy(self.net(inputs), labels)

    def training_step(self, batch, index):
        loss = self.loss(batch)
        if not self.automatic_optimization:
            sampler = self.optimizers()
            sampler.zero_grad()
            self.manual_backward(loss)
            sampler.step()
            if self.trainer.is_last_batch:
                self.lr_schedulers().step()
        return loss


def _loader():
    generator = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randn(40, 6, generator=generator), torch.randint(3, (40,), generator=generator))
    return DataLoader(data, batch_size=8)


def _fit(student, folder, epochs, resume=None, **settings):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, default_root_dir=folder, **quiet, **settings)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")  # how many workers a loader could have
        trainer.fit(student, _loader(), ckpt_path=resume)
    return trainer


def _by_hand(member, epochs, clip=None, accumulate=1):
    """The same training as a plain loop."""
    student = _Student(member)
    (sampler,), (schedule,) = student.configure_optimizers()
    loader = _loader()
    for _ in range(epochs):
        for number, batch in enumerate(loader):
            (student.loss(batch) / accumulate).backward()
            if (number + 1) % accumulate == 0 or number == len(loader) - 1:
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(student.parameters(), clip)
                sampler.step()
                sampler.zero_grad()
        schedule.step()
    return student, sampler


def _assert_equal(student, other):
    assert all(torch.equal(a, b) for a, b in zip(student.parameters(), other.parameters(), strict=True))


@every_sampler
@pytest.mark.parametrize("manual", [False, True])
def test_training_is_the_plain_loop(member, manual, tmp_path):
    student = _Student(member, manual)
    trainer = _fit(student, tmp_path, epochs=2)
    expected, sampler = _by_hand(member, epochs=2)
    assert trainer.optimizers[0].param_groups[0]["step"] == sampler.param_groups[0]["step"] == 10
    _assert_equal(student, expected)


@every_sampler
def test_clipping_and_accumulation_are_those_of_the_plain_loop(member, tmp_path):
    student = _Student(member)
    _fit(student, tmp_path, epochs=2, gradient_clip_val=0.1, accumulate_grad_batches=2)
    _assert_equal(student, _by_hand(member, epochs=2, clip=0.1, accumulate=2)[0])


@every_sampler
@pytest.mark.parametrize("manual", [False, True])
def test_a_resumed_run_goes_on_with_the_same_chain(member, manual, tmp_path):
    first = _Student(member, manual)
    trainer = _fit(first, tmp_path, epochs=1)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed = _Student(member, manual)
    _fit(resumed, tmp_path, epochs=3, resume=tmp_path / "run.ckpt")
    _assert_equal(resumed, _by_hand(member, epochs=3)[0])
