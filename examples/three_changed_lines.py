"""An ordinary PyTorch distillation script with three changed lines (marked): the loss, the optimizer, the posterior.

Run it with `python examples/three_changed_lines.py`; it needs scikit-learn for its data and takes a few seconds.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import bkd_fast as bkd

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
order = torch.randperm(len(x))
train, test = order[:1000], order[1000:]
loader = DataLoader(TensorDataset(x[train], y[train]), batch_size=100, shuffle=True)

teacher = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))
fit = torch.optim.Adam(teacher.parameters(), lr=1e-3)
for _ in range(30):
    for inputs, targets in loader:
        fit.zero_grad()
        nn.functional.cross_entropy(teacher(inputs), targets).backward()
        fit.step()
teacher.eval()

student = nn.Sequential(nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))
loss_fn = bkd.KDLoss(prior_strength=2.0)  # 1: was cross_entropy + kl_div
optimizer = bkd.SGLD(student.named_parameters(), lr=0.03, num_data=len(train), prior_precision=1.0)  # 2: was SGD
posterior = bkd.PosteriorPredictive(num_rows=len(test), num_classes=10)  # 3: new

for epoch in range(400):
    for inputs, targets in loader:
        with torch.no_grad():
            teacher_logits = teacher(inputs)
        optimizer.zero_grad()
        loss_fn(student(inputs), targets, teacher_logits).backward()
        optimizer.step()
    if epoch >= 100:  # burn-in
        with torch.no_grad():
            posterior.update_logits(student(x[test]))

lower, upper = posterior.interval(0.95)
predicted = posterior.mean.argmax(-1)
doubtful = posterior.mean_deviance.argmax()
print(f"accuracy {float((predicted == y[test]).float().mean()):.3f} from {int(posterior.counts[0])} draws")
print(
    f"least certain digit: a {int(y[test][doubtful])}, predicted {int(predicted[doubtful])}; 95 % credible intervals:"
)
for digit in posterior.mean[doubtful].argsort(descending=True)[:3].tolist():
    print(
        f"  P({digit}) = {posterior.mean[doubtful, digit]:.2f}  [{lower[doubtful, digit]:.2f}, {upper[doubtful, digit]:.2f}]"
    )
