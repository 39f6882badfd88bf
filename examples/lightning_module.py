"""A Lightning module of knowledge distillation that samples the posterior: the changed lines are numbered.

Run it with `python examples/lightning_module.py`; it needs lightning and scikit-learn and takes half a minute.
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd


class Distillation(lightning.LightningModule):
    """Learns from labels and a teacher for `warm_start` epochs, samples from then on, and keeps draws after `burn_in` more.

    Batches are (inputs, labels), those of the validation (inputs, labels, row ids).
    """

    def __init__(self, student, teacher, num_data, num_rows, warm_start, burn_in):
        super().__init__()
        self.student, self.teacher = student, teacher.eval().requires_grad_(False)
        self.num_data, self.warm_start, self.burn_in = num_data, warm_start, burn_in
        self.loss_fn = bkd.KDLoss(prior_strength=2.0)  # 1: was cross_entropy + kl_div
        self.posterior = bkd.PosteriorPredictive(num_rows, num_classes=10)  # 3: new

    def configure_optimizers(self):
        sampler = bkd.SGHMC(  # 2: was SGD, which this is at temperature 0
            self.student.named_parameters(),
            lr=0.05,
            momentum=0.9,
            num_data=self.num_data,
            prior_precision=10.0,
            temperature=0.0,
        )
        schedule = torch.optim.lr_scheduler.LinearLR(sampler, 1.0, 0.1, total_iters=self.warm_start)
        return [sampler], [schedule]

    def training_step(self, batch, index):
        inputs, labels = batch
        return self.loss_fn(self.student(inputs), labels, self.teacher(inputs))

    def on_train_epoch_start(self):  # 4: new
        if self.current_epoch == self.warm_start:
            for group in self.optimizers().param_groups:
                group["temperature"] = 1.0

    def validation_step(self, batch, index):
        inputs, labels, rows = batch
        logits = self.student(inputs)
        if self.current_epoch >= self.warm_start + self.burn_in:  # 5: new
            self.posterior.update_logits(logits, rows)
        self.log("accuracy", (logits.argmax(-1) == labels).float().mean())

    def on_save_checkpoint(self, checkpoint):  # 6: new; the chain's seed and step are in the sampler's state
        checkpoint["posterior"] = self.posterior.state_dict()

    def on_load_checkpoint(self, checkpoint):
        self.posterior.load_state_dict(checkpoint["posterior"])


def main(warm_start=30, burn_in=120, epochs=400, draw_every=10, resume=None, **trainer):
    """Train a teacher, then distil and sample a student on scikit-learn's digits; epochs have ten steps.

    Args:
        warm_start, burn_in, epochs: numbers of epochs, the last one of both and of sampling.
        draw_every: steps.
        resume: a checkpoint's path.
        trainer: more arguments of `lightning.Trainer`.

    Returns:
        The module and the test labels.
    """
    lightning.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    train, test = torch.randperm(len(x)).split([1000, len(x) - 1000])
    loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=100, shuffle=True)
    test_loader = DataLoader(TensorDataset(x[test], y[test], torch.arange(len(test))), batch_size=400)

    teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
    fit = torch.optim.Adam(teacher.parameters(), lr=1e-3)
    for _ in range(30):
        for inputs, targets in loader:
            fit.zero_grad()
            nn.functional.cross_entropy(teacher(inputs), targets).backward()
            fit.step()

    student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    module = Distillation(student, teacher, len(train), len(test), warm_start, burn_in)
    trainer = lightning.Trainer(max_epochs=epochs, val_check_interval=draw_every, **trainer)
    trainer.fit(module, loader, test_loader, ckpt_path=resume)

    posterior = module.posterior
    lower, upper = posterior.interval(0.95)
    predicted = posterior.mean.argmax(-1)
    print(f"accuracy {float((predicted == y[test]).float().mean()):.3f} from {int(posterior.counts[0])} draws")
    widths = (upper - lower).gather(1, predicted[:, None])
    print(f"95 % credible intervals of the predicted digits' probabilities: {float(widths.mean()):.3f} wide on average")
    return module, y[test]


if __name__ == "__main__":
    main(logger=False, enable_checkpointing=False)
