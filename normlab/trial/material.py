"""The images and signals of the trial: as they are, and as they look in other domains."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from normlab import data
from normlab.data.base import Dataset
from normlab.domains import Domain

__all__ = ["DEVELOPMENT", "FOG", "Labelled", "Material", "batched", "load", "stream"]

DEVELOPMENT = range(10)
"""Seeds on which thresholds may be chosen: their test images are of the validation split."""

CLASSES = {"cifar10": 5, "digits": 10}
"""A few classes, so that a short training learns something."""

FOG = "contrast-4"
"""The other domain, as `normlab.domains` names it: images of little contrast."""

Labelled = tuple[Tensor, Tensor]
"""x (N, C, H, W) or (N, 1, L), normalized, and y (N,)."""


@dataclass(frozen=True)
class Material:
    """What a network of the trial is trained on and diagnosed with.

    train, test: disjoint. fogged: the training set in FOG, image by image. digest, name: of the
    data set.
    """

    name: str
    digest: str
    classes: int
    train: Labelled
    test: Labelled
    fogged: Labelled


def load(name: str, *, seed: int, train: int, test: int, signals: bool = False) -> Material:
    """`cifar10` or `digits`, the first classes of it, `train` and `test` images of them at most.

    signals: images row by row, as (N, 1, L). Raises ValueError where the data set is not there.
    """
    found = data.find(name)(os.environ.get("NORMLAB_DATA", "data"), seed=seed, augment="none")
    judged = "val" if seed in DEVELOPMENT else "test"
    classes = CLASSES[name]

    def part(split: str, limit: int, domain: str = "none") -> Labelled:
        x, y = _some(found, split, classes, limit, seed, Domain.parse(domain))
        if signals:
            return x.flatten(1)[:, None], y
        return x.contiguous(memory_format=torch.channels_last), y

    return Material(
        name,
        found.digest,
        classes,
        part("train", train),
        part(judged, test),
        part("train", train, FOG),
    )


def _some(
    found: Dataset, split: str, classes: int, limit: int, seed: int, domain: Domain
) -> Labelled:
    """The first images of a few classes in the seed's order, the same in every domain."""
    wanted = min(found.size(split), limit * found.num_classes // classes)
    batches = found.eval_batches(
        split, batch_size=500, order=seed, samples=wanted, domains=(domain,)
    )
    parts = [(x[y < classes], y[y < classes]) for x, y in batches]
    x, y = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return x[:limit], y[:limit]


def batched(of: Labelled, size: int, limit: int | None = None) -> list[Labelled]:
    """Whole batches of `size` in stored order, of the first `limit` samples."""
    x, y = (tensor[:limit] for tensor in of)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x) - size + 1, size)]


def stream(of: Labelled, size: int, seed: int) -> Iterator[Labelled]:
    """Batches without end: epoch after epoch in another order, the remainder dropped."""
    x, y = of
    if size > len(x):
        raise ValueError(f"batches of {size} out of {len(x)} samples")
    order = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(x), generator=order).split(size):
            if len(chosen) == size:
                yield _layout(x[chosen]), y[chosen]


def _layout(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
