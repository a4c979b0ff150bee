"""Learning-rate schedules as pure functions of progress: nothing to save, nothing to restore."""

from collections.abc import Sequence
from math import cos, pi


def scaled(lr: float, *, batch_size: int, lr_batch: int | None) -> float:
    """The linear scaling rule: ``lr`` is meant per ``lr_batch`` samples (None: as it is)."""
    return lr if lr_batch is None else lr * batch_size / lr_batch


def factor(
    step: int,
    total: int,
    *,
    schedule: str,
    warmup: float,
    milestones: Sequence[float] = (),
    gamma: float = 0.1,
) -> float:
    """What the peak learning rate is multiplied with at ``step`` of ``total`` (0-based).

    The first ``warmup`` (a fraction of all steps) rises linearly, and reaches 1 at its last step.
    Then ``cosine`` falls to 0 at the end, ``step`` multiplies by ``gamma`` at each milestone (a
    fraction of all steps, the warm-up counted), ``constant`` stays.
    """
    warm = round(warmup * total)
    if step < warm:
        return (step + 1) / warm
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return float(gamma ** sum(step >= round(at * total) for at in milestones))
    if schedule == "cosine":
        return (1 + cos(pi * (step - warm) / max(1, total - warm))) / 2
    raise ValueError(f"recipe.schedule '{schedule}' is none of cosine, step, constant")
