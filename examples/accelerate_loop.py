"""An accelerate loop of knowledge distillation that samples the posterior: the changed lines are numbered.

Run it with `python examples/accelerate_loop.py` or `accelerate launch`, on any number of processes; it needs accelerate and
scikit-learn and takes half a minute.
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd


def main(warm_start=30, burn_in=120, epochs=400, draw_every=10):
    """Train a teacher, then distil and sample a student on scikit-learn's digits.

    Args:
        warm_start, burn_in, epochs: numbers of epochs, the last one of both and of sampling; on one process they have ten steps.
        draw_every: steps.

    Returns:
        The posterior and the test labels.
    """
    accelerator = Accelerator()
    set_seed(0)
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
    teacher.to(accelerator.device).requires_grad_(False)

    student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
    loss_fn = bkd.KDLoss(prior_strength=2.0)  # 1: was cross_entropy + kl_div
    optimizer = bkd.SGLD(  # 2: was SGD, which this is at temperature 0
        student.named_parameters(), lr=0.2, num_data=len(train), prior_precision=10.0, temperature=0.0
    )
    posterior = bkd.PosteriorPredictive(len(test), num_classes=10)  # 3: new
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.25, total_iters=warm_start * len(loader))
    student, optimizer, loader, test_loader, schedule = accelerator.prepare(
        student, optimizer, loader, test_loader, schedule
    )

    step = 0
    for epoch in range(epochs):
        if epoch == warm_start:  # 4: new
            for group in optimizer.param_groups:
                group["temperature"] = 1.0
        for inputs, targets in loader:
            optimizer.zero_grad()
            accelerator.backward(loss_fn(student(inputs), targets, teacher(inputs)))
            optimizer.step()
            schedule.step()
            step += 1
            if epoch >= warm_start + burn_in and step % draw_every == 0:  # 5: new
                with torch.no_grad():
                    for inputs, _, rows in test_loader:
                        posterior.update_logits(*accelerator.gather_for_metrics((student(inputs), rows)))

    lower, upper = posterior.interval(0.95)
    predicted = posterior.mean.argmax(-1)
    widths = (upper - lower).gather(1, predicted[:, None])
    accelerator.print(
        f"accuracy {float((predicted == y[test]).float().mean()):.3f} from {int(posterior.counts[0])} draws"
    )
    accelerator.print(
        f"95 % credible intervals of the predicted digits' probabilities: {float(widths.mean()):.3f} wide on average"
    )
    return posterior, y[test]


if __name__ == "__main__":
    main()
