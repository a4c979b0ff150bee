"""What batch norm is said to bring: exact properties, and short trainings with and without it.

Exact, in float64, of a linear layer W with batch norm behind it (eps e):

- BN(a W x) with eps a^2 e is BN(W x), and its gradient in W is 1 / a of that; with the same eps in
  both, an output y of variance v becomes y sqrt(a^2 (v + e) / (a^2 v + e)).
- A bias b before it changes no output and has no gradient; the batch's mean, which the running mean
  follows, moves by b.

The others are trainings of a small network, once with batch norm and once without, that differ in
one thing: the learning rate, how fast it falls, the initial weights' size, the activation, the
place of the norm, gamma and beta, dropout, another norm in its place, the shuffling and photometric
distortions. Beside the errors, `range_<which>`: along the gradient, from no step to twice the
training's, how far the loss of that batch goes up and down (largest minus smallest, in nats, mean
over the first batches of the epochs; it says how smooth the loss is there).

Sources: Ioffe and Szegedy 2015, as a survey lists it; Santurkar et al. 2018 for the range.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from normlab.data.base import Dataset
from normlab.norms.base import normalization
from normlab.norms.bn import BatchNorm
from normlab.norms.lrn import LocalResponseNorm
from normlab.tasks import training
from normlab.tasks.base import Row

KEYS: tuple[str, ...] = ("data", "epochs", "lr", "batch_size")

Activation = Literal["relu", "sigmoid"]
Order = Literal["before", "after"]

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}

ALONG = (0.5, 1.0, 1.5, 2.0)
"""Steps along the gradient, in steps of the training without its momentum."""


@dataclass(frozen=True)
class Design:
    """A network: its size, and what is varied. See `run`."""

    width: int
    depth: int
    init: float
    activation: Activation
    order: Order
    affine: bool
    dropout: float
    lrn: bool


def run(
    *,
    seed: int,
    device: torch.device,
    data: Dataset,
    epochs: int,
    lr: float,
    batch_size: int,
    width: int,
    depth: int,
    lr_factor: float,
    fall: float,
    init: float,
    activation: Activation,
    order: Order,
    affine: bool,
    dropout: float,
    lrn: bool,
    shuffle: bool,
    distort: float,
) -> Iterator[Row]:
    """Yield the exact numbers as epoch 0, and after the last epoch what both networks came to.

    Args:
        width, depth: channels and number of the 3x3 convolutions, every second of stride 2.
        lr_factor: on the learning rate `lr`, for both networks.
        fall: by how many powers of ten it falls during the training, exponentially.
        init: what the standard deviation of the initial weights (He's) is multiplied with.
        activation: after every convolution.
        order: batch norm before or after it.
        affine: whether batch norm has gamma and beta.
        dropout: share of the last layer's inputs that is dropped in training.
        lrn: local response norm in the other network, where batch norm is in the first; with k = 1,
            since k = 2 would multiply what passes by 2^-0.75 in every layer, whatever it is.
        shuffle: false: every epoch has the same batches.
        distort: brightness and contrast of every training image are changed by up to that share of
            the images' standard deviation.

    Raises ValueError for a number that is out of its range.
    """
    for key, given in {
        "width": width, "depth": depth, "lr_factor": lr_factor, "init": init,
    }.items():  # fmt: skip
        if not given > 0:
            raise ValueError(f"task.{key}={given}: it must be above 0")
    if not 0 <= dropout < 1:
        raise ValueError(f"task.dropout={dropout}: it must be in [0, 1)")
    if distort < 0 or fall < 0:
        raise ValueError(f"task.distort={distort}, task.fall={fall}: neither is below 0")
    for quantity, value in (scaling(seed) | biased(seed)).items():
        yield Row(0, quantity, value)
    design = Design(width, depth, init, activation, order, affine, dropout, lrn)
    for which in ("bn", "plain"):
        torch.manual_seed(seed)
        network = build(design, which == "bn", data).to(device)
        found = trained(
            network, data, epochs, lr * lr_factor, batch_size, seed, fall, shuffle, distort
        )
        for quantity, value in found.items():
            yield Row(epochs, f"{quantity}_{which}", value)


def trained(
    network: nn.Module,
    data: Dataset,
    epochs: int,
    lr: float,
    batch_size: int,
    seed: int,
    fall: float,
    shuffle: bool,
    distort: float,
) -> dict[str, float]:
    """Train a network; its last epoch's loss in nats, the range along the gradient in nats, and its
    test error in %. What does not come to a finite loss has none of it but chance's error."""
    device = next(network.parameters()).device
    changes = torch.Generator().manual_seed(seed)
    ranges: list[float] = []

    def look(epoch: int) -> None:
        (x, y), *_ = data.train_batches(
            batch_size=batch_size, seed=seed, epoch=epoch, device=device
        )
        ranges.append(along(network, x, y, lr))

    last = training.fit(
        network,
        data,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        seed=seed,
        device=device,
        change=lambda x: distorted(x, distort, changes) if distort else x,
        rate=lambda share: float(10 ** (-fall * share)),
        again=not shuffle,
        before=look,
    )
    return {
        "loss": bounded(last),
        "range": bounded(sum(ranges) / len(ranges)),
        "error": training.error(network, data, "test", device=device),
    }


LARGEST = 100.0
"""Nats that a loss counts at most: one that is not finite is no number to average."""


def bounded(loss: float) -> float:
    """A loss, or LARGEST if it is more or not finite."""
    return min(loss, LARGEST) if math.isfinite(loss) else LARGEST


def build(design: Design, norm: bool, data: Dataset) -> nn.Module:
    """Convolutions, each with its activation, a norm or none; pixel mean; dropout; linear.

    A convolution has a bias where no batch norm follows it.
    """
    layers: list[nn.Module] = []
    channels = data.shape[0]
    for number in range(design.depth):
        before = norm and design.order == "before"
        conv = nn.Conv2d(
            channels, design.width, 3, stride=1 + number % 2, padding=1, bias=not before
        )
        nn.init.kaiming_normal_(conv.weight)
        with torch.no_grad():
            conv.weight.mul_(design.init)
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)
        activation = ACTIVATIONS[design.activation]()
        if norm:
            layer: nn.Module = BatchNorm(design.width, affine=design.affine)
            layers += [conv, *([layer, activation] if before else [activation, layer])]
        else:
            layers += [conv, activation]
            layers += [LocalResponseNorm(design.width, k=1.0)] if design.lrn else []
        channels = design.width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(design.dropout)]
    return nn.Sequential(*layers, nn.Linear(channels, data.num_classes))


def distorted(x: Tensor, strength: float, generator: torch.Generator) -> Tensor:
    """Images (B, C, H, W), each about its mean times a factor, and moved by a constant, both
    uniform up to `strength` times its standard deviation; drawn for every call."""
    factor, offset = (
        (2 * torch.rand((2, len(x), 1, 1, 1), generator=generator) - 1) * strength
    ).to(x.device)
    mean = x.mean((1, 2, 3), keepdim=True)
    spread = x.std((1, 2, 3), keepdim=True)
    changed: Tensor = mean + (x - mean) * (1 + factor) + offset * spread
    return changed


def along(network: nn.Module, x: Tensor, y: Tensor, step: float) -> float:
    """How far the loss of a batch goes up and down along its gradient: largest minus smallest at no
    step and at `ALONG` steps of size `step`, in nats. Weights, statistics and generators stay."""
    weights = list(network.parameters())
    devices = [x.device] if x.device.type == "cuda" else []
    network.train()

    def loss() -> Tensor:
        torch.manual_seed(0)  # one dropout for all: one function
        return training.loss(network, x, y)

    with torch.random.fork_rng(devices), normalization(network, update=False):
        here = loss()
        gradients = torch.autograd.grad(here, weights)
        losses = [float(here.detach())]
        kept = [weight.detach().clone() for weight in weights]
        with torch.no_grad():
            for share in ALONG:
                for weight, at, gradient in zip(weights, kept, gradients, strict=True):
                    weight.copy_(at - share * step * gradient)
                losses.append(float(loss()))
            for weight, at in zip(weights, kept, strict=True):
                weight.copy_(at)
    return max(losses) - min(losses)


def _layer(weight: Tensor, x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """BN(x W^T) without gamma and beta, its gradient in W for a loss that weighs the outputs
    unequally, and the biased variance of x W^T."""
    weight = weight.clone().requires_grad_()
    before = x @ weight.T
    y = BatchNorm(len(weight), affine=False, eps=eps).double()(before)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    (gradient,) = torch.autograd.grad((weights * y.square()).sum() + (weights * y).sum(), weight)
    return y.detach(), gradient, before.detach().var(0, correction=0)


def scaling(seed: int, factor: float = 7.0, eps: float = 1e-5) -> dict[str, float]:
    """A linear layer whose weights are `factor` times as large before batch norm: the largest
    changes of its output, of its gradient, and, also in closed form, of the output where eps
    stays."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 6, generator=draw, dtype=torch.float64)
    weight = 0.1 * torch.randn(5, 6, generator=draw, dtype=torch.float64)
    y, gradient, var = _layer(weight, x, eps)
    large, flat, _ = _layer(factor * weight, x, factor**2 * eps)
    same_eps, _, _ = _layer(factor * weight, x, eps)
    ratio = (factor**2 * (var + eps) / (factor**2 * var + eps)).sqrt()
    return {
        "scaled": _largest(large - y),
        "scaled_gradient": _largest(factor * flat - gradient) / _largest(gradient),
        "scaled_same_eps": _largest(same_eps - y),
        "scaled_same_eps_closed": _largest(y * (ratio - 1)),
    }


def biased(seed: int) -> dict[str, float]:
    """A bias before batch norm: the largest change of the output and of the running mean (beyond
    the share of the bias that it is due), and the bias' gradient over the weight's."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 6, generator=draw, dtype=torch.float64)
    linear = nn.Linear(6, 5).double()
    outputs, means = [], []
    for bias in (torch.zeros(5), torch.randn(5, generator=draw)):
        with torch.no_grad():
            linear.weight.copy_(torch.linspace(-1, 1, 30).view(5, 6).sin())
            linear.bias.copy_(bias)
        norm = BatchNorm(5).double()
        outputs.append(norm(linear(x)))
        means.append(norm.running_mean)
    weights = torch.linspace(-1, 1, 160, dtype=torch.float64).view(32, 5)
    of_weight, of_bias = torch.autograd.grad(
        (weights * outputs[1]).square().sum(), (linear.weight, linear.bias)
    )
    due = 0.1 * linear.bias.detach()
    return {
        "bias": _largest(outputs[1] - outputs[0]),
        "bias_gradient": _largest(of_bias) / _largest(of_weight),
        "bias_running_mean": _largest(means[1] - means[0] - due),
    }


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())
