"""Cosine-similarity distillation: classes compared over a batch, and a temperature for every sample.

G. Ham et al., *Cosine Similarity Knowledge Distillation for Individual Class Information Transfer*, arXiv:2311.14307 (2023).
**Reconstructed from the abstract**: it says that the predictions of a batch for each class are compared by cosine similarity, and
that a sample's temperature falls as its similarity rises; the line between the two temperatures is ours.

Neither loss is an energy of Bayesian distillation: no Dirichlet prior belongs to them, and the first is not even a sum over
examples, so that no posterior of N examples does. They are for training.
"""

import math

from torch import Tensor
from torch.nn import functional


def class_cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over classes of 1 - cos(q_.c, p_.c), of the probabilities that a batch gives to class c; scalar, in [0, 1].

    Scale-invariant: a student that is everywhere half as sure of a class as its teacher has the same direction.

    Args:
        student, teacher: logits (rows, classes); no gradient flows to the teacher's.

    Raises:
        ValueError: shapes that differ, or are not (rows, classes).
    """
    _check(student, teacher)
    q, p = student.softmax(1), teacher.detach().softmax(1)
    return 1 - functional.cosine_similarity(q, p, dim=0).mean()


def cosine_temperatures(student: Tensor, teacher: Tensor, lowest: float, highest: float) -> Tensor:
    """(rows,) T_i = highest - (highest - lowest) cos(q_i, p_i): where student and teacher agree the temperature is low.

    Args:
        student, teacher: logits (rows, classes).
        lowest, highest: 0 < lowest <= highest; at similarities 1 and 0.

    Raises:
        ValueError: temperatures out of range, shapes that differ, or are not (rows, classes).
    """
    _check(student, teacher)
    if not 0 < lowest <= highest < math.inf:
        raise ValueError(f"lowest = {lowest}, highest = {highest}: must be 0 < lowest <= highest, finite")
    similarity = functional.cosine_similarity(student.softmax(1), teacher.softmax(1), dim=1)
    return highest - (highest - lowest) * similarity


def cosine_weighted_kl(student: Tensor, teacher: Tensor, lowest: float, highest: float) -> Tensor:
    """The mean over a batch of T_i^2 KL(softmax(t_i / T_i) || softmax(z_i / T_i)) with `cosine_temperatures`; scalar.

    The temperatures are data: no gradient flows through them, nor to the teacher. With lowest = highest = T this is T^2 times
    the teacher's term of Hinton's loss.

    Args, Raises: as `cosine_temperatures`.
    """
    temperature = cosine_temperatures(student.detach(), teacher.detach(), lowest, highest)
    scale = temperature.unsqueeze(1)
    divergence = functional.kl_div(
        (student / scale).log_softmax(1), (teacher.detach() / scale).log_softmax(1), log_target=True, reduction="none"
    )
    return (temperature.square() * divergence.sum(1)).mean()


def _check(student: Tensor, teacher: Tensor) -> None:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ValueError(
            f"student has shape {tuple(student.shape)} and teacher {tuple(teacher.shape)}: must be (rows, classes), alike"
        )
