"""What several tasks do with a small network: train it for a few epochs, and ask what it says."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab import schedule
from normlab.data.base import Dataset

__all__ = ["BATCH", "answers", "error", "fit", "loss"]

BATCH = 256
"""Images of a forward pass that learns nothing: no number depends on it, besides batch norms that
are told to use the batch's statistics."""

Change = Callable[[Tensor], Tensor]


def _as_they_are(x: Tensor) -> Tensor:
    return x


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Mean cross entropy of a batch x (B, C, H, W), y (B,): a scalar, in nats."""
    return F.cross_entropy(model(x), y)


def fit(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
    change: Change = _as_they_are,
    rate: Callable[[float], float] | None = None,
    again: bool = False,
    before: Callable[[int], None] | None = None,
) -> float:
    """Train in place, in train(), by SGD with momentum 0.9; the mean loss of the last epoch.

    change: what is done to every batch of images. rate: what `lr` is multiplied with where a share
    in [0, 1) of the training has passed; None: a cosine to 0. again: every epoch has the first
    one's batches, in its order. before: called with the number of each epoch before it. Raises
    ValueError for fewer training images than a batch has.
    """
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=lr, momentum=0.9)
    steps = data.size("train") // batch_size
    last = 0.0
    for epoch in range(1, epochs + 1):
        last = 0.0
        if before:
            before(epoch)
        batches = data.train_batches(
            batch_size=batch_size, seed=seed, epoch=1 if again else epoch, device=device
        )
        for step, (x, y) in enumerate(batches):
            at, total = (epoch - 1) * steps + step, epochs * steps
            falls = schedule.factor(at, total, schedule="cosine", warmup=0.0)
            optimizer.param_groups[0]["lr"] = lr * (rate(at / total) if rate else falls)
            optimizer.zero_grad()
            here = loss(model, change(x), y)
            here.backward()
            optimizer.step()
            last += float(here.detach()) / steps
    return last


@torch.no_grad()
def answers(
    model: nn.Module,
    data: Dataset,
    split: str,
    *,
    device: torch.device,
    change: Change = _as_they_are,
) -> tuple[Tensor, Tensor]:
    """What the network says of a split in the mode that it is in, and the labels: logits
    (n, classes) and y (n,), in an order of the data set's own that is the same every time."""
    said, labels = [], []
    for x, y in data.eval_batches(split, batch_size=BATCH, order=0, device=device):
        said.append(model(change(x)))
        labels.append(y)
    return torch.cat(said), torch.cat(labels)


def error(
    model: nn.Module,
    data: Dataset,
    split: str,
    *,
    device: torch.device,
    change: Change = _as_they_are,
) -> float:
    """The share of a split's images, in %, that the network gets wrong in eval()."""
    model.eval()
    said, labels = answers(model, data, split, device=device, change=change)
    return 100 * float((said.argmax(1) != labels).double().mean())
