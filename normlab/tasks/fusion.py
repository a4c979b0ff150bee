"""Batch norms folded into the layers before them, and what fine-tuning makes of the difference.

f = w1 (w2 x + w3) and f = w2' x + w3' with w2' = w1 w2, w3' = w1 w3 are one function, but not after
a step of gradient descent. With u = w2 x + w3, the squared error (f - t)^2 / 2, its derivative
g = f - t and the rate e, at the same x after one step:

    fused:             w1 u - e g (x^2 + 1)
    w1 constant:       w1 u - e g w1^2 (x^2 + 1)
    all three trained: (w1 - e g u) (u - e g w1 (x^2 + 1))

so that with a constant w1 the two agree where |w1| = 1 and nowhere else. In a network w1 is
gamma / sigma of a channel. A filter's length is free before a batch norm: the task gives the
filters of a trained network the lengths at which |gamma / sigma| is `scale` in every channel, which
leaves the function as it is, and trains four forms of it on a few images turned by 90 degrees:
``fused``; ``frozen``, statistics, gamma and beta constant; ``affine``, only the statistics constant
(the talk's left side); ``bn``, batch statistics.

Source: the talk "Devils in BatchNorm", on fusion and fine-tuning.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from normlab import surgery
from normlab.data.base import Dataset
from normlab.norms.base import PopulationNorm, population_layers
from normlab.tasks import training
from normlab.tasks.base import Row

KEYS: tuple[str, ...] = ("model", "data", "epochs", "lr", "batch_size")

FORMS = ("fused", "frozen", "affine", "bn")


def run(
    *,
    seed: int,
    device: torch.device,
    model: nn.Module,
    data: Dataset,
    epochs: int,
    lr: float,
    batch_size: int,
    scale: float,
    images: int,
    steps: int,
    rate: float,
) -> Iterator[Row]:
    """Yield the scalars' numbers as epoch 0, after one step as 1, after the last as `steps`.

    Args:
        model, epochs, lr, batch_size: what is trained first, on the images as they are.
        scale: |gamma / sigma| of every channel before fine-tuning, and |w1| of the scalars.
        images: to fine-tune on, drawn once.
        steps, rate: of fine-tuning, plain SGD on all the images in each step.

    `step_<form>` is how far the logits of validation images are after one step from the fused
    form's, over how far these have moved (root mean squares); `same_<form>` the same before it,
    over the logits; `error_<form>` the test error on turned images at the end, in %, and
    `error_before` that without fine-tuning.

    Raises ValueError for a scale, a rate or a number that is not above 0, and norms that cannot be
    folded.
    """
    for key, value in {"scale": scale, "rate": rate, "images": images, "steps": steps}.items():
        if not value > 0:
            raise ValueError(f"task.{key}={value}: it must be above 0")
    if not population_layers(model):
        raise ValueError("task=fusion folds batch norms; this network has none")
    for quantity, value in scalars(seed, scale, rate).items():
        yield Row(0, quantity, value)
    training.fit(model, data, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, device=device)
    rescale(model, scale)
    (x, y), *_ = data.train_batches(batch_size=images, seed=seed, epoch=0, device=device)
    x = turned(x)
    forms = {form: formed(model, form) for form in FORMS}
    before = _said(model.eval(), data, device)
    for form, network in forms.items():
        network.eval()
        yield Row(0, f"same_{form}", _rms(_said(network, data, device) - before) / _rms(before))
    yield Row(0, "error_before", training.error(model, data, "test", device=device, change=turned))
    for step in range(1, steps + 1):
        for form, network in forms.items():
            _descend(network, form, x, y, rate)
        if step == 1:
            after = {form: _said(network.eval(), data, device) for form, network in forms.items()}
            moved = _rms(after["fused"] - before)
            for form in FORMS[1:]:
                yield Row(1, f"step_{form}", _rms(after[form] - after["fused"]) / moved)
    for form, network in forms.items():
        wrong = training.error(network, data, "test", device=device, change=turned)
        yield Row(steps, f"error_{form}", wrong)


def scalars(seed: int, scale: float, rate: float) -> dict[str, float]:
    """The talk's formula with |w1| = scale: values before a step, distances after it, and both
    distances in closed form."""
    draw = torch.Generator().manual_seed(seed)
    w2, w3, x, target = torch.randn(4, generator=draw, dtype=torch.float64)
    w1 = torch.tensor(scale, dtype=torch.float64)
    fused = _stepped([w1 * w2, w1 * w3], x, target, rate)
    constant = w1 * _stepped([w2, w3], x, target, rate, factor=w1)
    trained = _stepped([w2, w3, w1], x, target, rate)
    u = w2 * x + w3
    g = w1 * u - target
    longer = x**2 + 1
    closed_fused = w1 * u - rate * g * longer
    closed_trained = (w1 - rate * g * u) * (u - rate * g * w1 * longer)
    return {
        "scalar_before": float(w1 * (w2 * x + w3) - (w1 * w2 * x + w1 * w3)),
        "scalar_constant": float(constant - fused),
        "scalar_constant_closed": float(rate * g * (1 - w1**2) * longer),
        "scalar_trained": float(trained - fused),
        "scalar_trained_closed": float(closed_trained - closed_fused),
    }


def _stepped(
    weights: list[Tensor], x: Tensor, target: Tensor, rate: float, factor: Tensor | None = None
) -> Tensor:
    """slope x + offset after a step on these and on a factor, if there is a third; with a constant
    factor it is not multiplied into what is returned."""
    leaves = [w.clone().requires_grad_() for w in weights]

    def inner() -> Tensor:
        return leaves[0] * x + leaves[1]

    f = inner() * (leaves[2] if leaves[2:] else 1.0 if factor is None else factor)
    loss = (f - target) ** 2 / 2
    for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
        leaf.data -= rate * gradient
    return (inner() * (leaves[2] if leaves[2:] else 1.0)).detach()


def turned(x: Tensor) -> Tensor:
    """Images (B, C, H, H) turned by 90 degrees."""
    return torch.rot90(x, 1, (2, 3))


@torch.no_grad()
def rescale(model: nn.Module, scale: float) -> None:
    """Give the filters before batch norms the lengths at which |gamma / sigma| is `scale`, in
    place; the function stays. sigma is the root of the running variance plus eps.

    A channel whose gamma is 0 stays as it is. Raises ValueError for norms that cannot be folded.
    """
    for pair in surgery.fusible(model.eval()):
        if pair.obstacle:
            raise ValueError(f"{pair.layer} and {pair.norm}: {pair.obstacle}")
        layer, norm = model.get_submodule(pair.layer), model.get_submodule(pair.norm)
        assert isinstance(norm, PopulationNorm)
        assert isinstance(layer, nn.Conv2d | nn.Linear)
        if norm.weight is None:
            raise ValueError(f"{pair.norm} has no gamma")
        total = norm.running_var.double() + norm.eps
        longer = norm.weight.double().abs() / total.sqrt() / scale
        longer = torch.where(longer > 0, longer, torch.ones_like(longer))
        layer.weight.mul_(longer.view(-1, *[1] * (layer.weight.dim() - 1)))
        if layer.bias is not None:
            layer.bias.mul_(longer)
        norm.running_mean.mul_(longer)
        norm.eps *= float(longer.square().min())  # smaller filters have smaller variances
        norm.running_var.copy_(longer.square() * total - norm.eps)


def formed(model: nn.Module, form: str) -> nn.Module:
    """A copy of the network in one of the four forms, with what is trained in it."""
    network = copy.deepcopy(model).eval()
    if form == "fused":
        return surgery.fuse(network)
    for layer in population_layers(network).values():
        if form != "bn":
            layer.statistics = "population"
        for parameter in layer.parameters():
            parameter.requires_grad_(form != "frozen")
    return network


def _descend(network: nn.Module, form: str, x: Tensor, y: Tensor, rate: float) -> None:
    """A step of plain SGD, with batch statistics where the form has them."""
    network.train(form == "bn")
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(training.loss(network, x, y), weights)
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.sub_(rate * gradient)


def _said(network: nn.Module, data: Dataset, device: torch.device) -> Tensor:
    return training.answers(network, data, "val", device=device, change=turned)[0]


def _rms(x: Tensor) -> float:
    return float(x.double().square().mean().sqrt())
