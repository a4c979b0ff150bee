"""Images made against a network: projected gradient ascent on its loss (Madry et al. 2018)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab.data.base import Dataset
from normlab.domains import Domain
from normlab.norms.base import normalization
from normlab.norms.separate import in_turn

STEPS = 5
"""Steps of an attack (AdvProp's number, Xie et al. 2020)."""

REACH = 2.5
"""All steps together, in units of the largest change (Madry et al.'s rule for step sizes)."""


def pgd(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    *,
    eps: Tensor,
    low: Tensor,
    high: Tensor,
    steps: int = STEPS,
) -> Tensor:
    """Images near `x` whose cross entropy with `y` is large, as `network` is when it is called.

    Each step moves every pixel by REACH eps / steps in the direction in which the summed loss
    grows, and back into [x - eps, x + eps] and [low, high]. It starts at x itself: nothing is
    drawn. Of a linear network it ends at x + eps sign(gradient), the exact maximum, clipped.

    x           (B, C, H, W), any scale; y (B,) classes
    eps         what broadcasts with x, on its scale; where it is 0, x stays to the bit
    low, high   the pixels there are, broadcast with x
    Gradients are taken of the pixels alone; those of parameters stay as they are.
    """
    start, step = x.detach(), REACH * eps / steps
    with torch.inference_mode(False), torch.enable_grad():
        made = start.clone()
        labels = y.clone()
        for _ in range(steps):
            made.requires_grad_()
            logits = network(made)
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            loss = F.cross_entropy(precise, labels, reduction="sum")
            (gradient,) = torch.autograd.grad(loss, made)
            made = made.detach() + step * gradient.sign()
            made = start + (made - start).clamp(min=-eps, max=eps)
            made = made.clamp(min=low, max=high)
    return torch.where(eps > 0, made, start)


@dataclass(frozen=True)
class Adversary:
    """Makes the images of adversarial domains, in batches that hold their `domains` in turn.

    network     what is attacked, called on whole batches: under batch statistics, an image is seen
                with the others of its batch
    model       the network's layers: none moves its running statistics meanwhile
    low, high   (C, 1, 1), black and white as the data set delivers them
    """

    network: Callable[[Tensor], Tensor]
    model: nn.Module
    domains: Sequence[Domain]
    low: Tensor
    high: Tensor

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """x (B, C, H, W) with the images of adversarial domains replaced; others to the bit."""
        low, high = self.low.to(x.device), self.high.to(x.device)
        reach = [domain.amount if domain.adversarial else 0.0 for domain in self.domains]
        of_each = torch.tensor(reach, device=x.device)[torch.arange(len(x)) % len(reach)]
        with normalization(self.model, update=False):
            eps = of_each.view(-1, 1, 1, 1) * (high - low)
            return pgd(self.network, x, y, eps=eps, low=low, high=high)


def adversary(model: nn.Module, domains: Sequence[Domain], data: Dataset) -> Adversary | None:
    """What makes the adversarial ones of a batch's `domains` against `model`; None: there are none.

    Raises ValueError for a data set that does not say which pixels there are.
    """
    if not any(domain.adversarial for domain in domains):
        return None
    called = in_turn(model, len(domains)) or model
    return Adversary(called, model, domains, *data.extremes())
