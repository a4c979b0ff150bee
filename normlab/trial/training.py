"""Short trainings, as a careful user would do them: the healthy networks, from which faults start.

A batch norm in training normalizes with its batch, whatever its momentum: so one training has, as
by-products, the buffers of every momentum.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from normlab.trial.material import Labelled, Material, batched, stream
from normlab.trial.networks import Network, norms

__all__ = ["MOMENTUM", "Size", "Trained", "careful", "optimizer_of", "seeded", "train", "trained"]

MOMENTUM = 0.1
"""Of the healthy networks, whatever their library's default: right for a hundred steps."""

MOMENTA: dict[str, float | None] = {
    "0.1": MOMENTUM, "0.001": 0.001, "0.9": 0.9, "0.999": 0.999, "None": None,
}  # fmt: skip
"""The momenta whose buffers are kept; None is torch's cumulative average."""


@dataclass(frozen=True)
class Size:
    """How much of everything: steps of a training from scratch and of one that goes on from there,
    samples of a batch, images to train on, to diagnose with and to test on."""

    steps: int = 120
    further: int = 40
    batch: int = 32
    train: int = 2560
    shown: int = 384
    test: int = 256


@dataclass(frozen=True)
class Trained:
    """A healthy network, and what faults are made of.

    state: its state_dict. optimizer: that of its optimizer. buffers: by momentum, the entries of
    `state` that the same training would have left with it.
    """

    network: Network
    seed: int
    size: Size
    material: Material
    state: dict[str, Tensor]
    optimizer: dict[str, object]
    buffers: dict[str, dict[str, Tensor]]

    def model(self) -> nn.Module:
        """The network as trained, in training mode, to be changed at will."""
        model = self.network.build(self.material.classes, self.seed)
        set_momentum(model, MOMENTUM)
        found = model.state_dict()
        for key, value in self.state.items():  # MNASNet loads no state without a version
            found[key].copy_(value)
        return model.train()

    def shown(self, of: Labelled | None = None) -> list[Labelled]:
        """The batches that a diagnosis gets: of the training set, unless of others."""
        return batched(of or self.material.train, self.size.batch, self.size.shown)

    def test(self) -> list[Labelled]:
        """The batches of images that nothing was trained on."""
        return batched(self.material.test, self.size.batch)

    def stream(self, of: Labelled | None = None, size: int | None = None) -> Iterator[Labelled]:
        """Batches of the training set without end, in other orders than those of the training."""
        return stream(of or self.material.train, size or self.size.batch, self.seed + 1000)


def trained(network: Network, seed: int, size: Size, material: Material) -> Trained:
    """Train a network from scratch; every momentum's buffers come out of the one training."""
    model = network.build(material.classes, seed)
    layers = norms(model)
    set_momentum(model, 1.0)  # the buffers are then the last batch's statistics
    averages = {name: _initial(model) for name in MOMENTA}

    def follow(step: int) -> None:
        for name, momentum in MOMENTA.items():
            share = 1 / (step + 1) if momentum is None else momentum
            for key, value in averages[name].items():
                if not key.endswith("num_batches_tracked"):
                    value.lerp_(model.get_buffer(key), share)

    with seeded(seed):
        optimizer = careful(model)
        batches = stream(material.train, size.batch, seed)
        train(model, optimizer, batches, size.steps, after=follow)
    for values in averages.values():
        for name, layer in layers.items():
            assert layer.num_batches_tracked is not None
            values[f"{name}.num_batches_tracked"] = layer.num_batches_tracked.clone()
    state = {key: value.clone() for key, value in model.state_dict().items()} | averages["0.1"]
    return Trained(network, seed, size, material, state, optimizer.state_dict(), averages)


def _initial(model: nn.Module) -> dict[str, Tensor]:
    """The buffers of the batch norms before any step."""
    return {
        f"{name}.{key}": value.clone()
        for name, layer in norms(model).items()
        for key, value in layer.named_buffers()
    }


def set_momentum(model: nn.Module, momentum: float | None) -> None:
    """Give every batch norm this momentum, in torch's sense."""
    for layer in norms(model).values():
        layer.momentum = momentum


def careful(model: nn.Module, lr: float = 3e-3) -> torch.optim.Optimizer:
    """AdamW that decays the matrices and kernels of a model and nothing else."""
    learnt = [p for p in model.parameters() if p.requires_grad]
    return optimizer_of(
        [
            {"params": [p for p in learnt if p.dim() > 1], "weight_decay": 0.05},
            {"params": [p for p in learnt if p.dim() <= 1], "weight_decay": 0.0},
        ],
        lr,
    )


def optimizer_of(groups: list[dict[str, object]], lr: float) -> torch.optim.Optimizer:
    """AdamW of these groups."""
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=lr)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Labelled],
    steps: int,
    *,
    micro: int = 1,
    constant: bool = False,
    after: Callable[[int], None] = lambda _: None,
) -> None:
    """So many steps of SGD in training mode.

    micro: forwards of a step, whose gradients are averaged. constant: whether the learning rate
    stays; else it goes up in a tenth of the steps and down to 0 along a cosine. after: called after
    each step with its number.
    """
    model.train()
    peaks = [float(group["lr"]) for group in optimizer.param_groups]
    for step in range(steps):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak if constant else peak * _share(step, steps)
        optimizer.zero_grad()
        for _ in range(micro):
            x, y = next(batches)
            (cross_entropy(model(x), y) / micro).backward()
        optimizer.step()
        after(step)


def _share(step: int, steps: int) -> float:
    """Of the peak learning rate: up in a tenth of the steps, then down along a cosine."""
    warm = max(1, steps // 10)
    if step < warm:
        return (step + 1) / warm
    return (1 + cos(pi * (step - warm + 1) / (steps - warm + 1))) / 2


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within, torch's own generator (dropout, stochastic depth) is at this seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield
