"""The contract of a data set: splits and subsets, and the batches of training and evaluation."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from normlab.data.patterns import Indices, arranged, usable
from normlab.data.streams import SPLIT_SEED, Stream, generator
from normlab.domains import Domain
from normlab.orders import SHUFFLED, Order

SPLITS = ("train", "val", "test")

Batch = tuple[Tensor, Tensor]  # x (B, C, H, W) float32 normalized, y (B,) int64


def balanced(
    labels: npt.ArrayLike, among: Indices, per_class: int, rng: np.random.Generator
) -> Indices:
    """Sorted indices of `per_class` random members of each class, drawn from `among`.

    With the same generator state a larger `per_class` yields a superset, so that a curve over
    subset sizes adds images and never swaps them. Raises ValueError if a class has too few.
    """
    own = np.asarray(labels)[among]
    chosen = []
    for c in np.unique(own):
        members = rng.permutation(among[own == c])
        if len(members) < per_class:
            raise ValueError(
                f"{per_class} images of each class wanted, but class {c} has {len(members)}"
            )
        chosen.append(members[:per_class])
    return np.sort(np.concatenate(chosen)).astype(np.int64)


def subset_of(
    labels: npt.ArrayLike, among: Indices, subset: int | None, *, num_classes: int, seed: int
) -> Indices:
    """`among`, or a class-balanced `subset` of it, drawn per seed: the same for all arms."""
    if subset is None:
        return among
    largest = int(np.bincount(np.asarray(labels)[among], minlength=num_classes).min()) * num_classes
    if subset < 1 or subset % num_classes or subset > largest:
        raise ValueError(
            f"data.subset={subset}: a class-balanced subset is a multiple of the {num_classes}"
            f" classes and at most {largest}"
        )
    rng = generator(Stream.SUBSET, seed)
    return balanced(labels, among, subset // num_classes, rng)


@dataclass(frozen=True)
class Augment:
    """Which random stream augments: batch k of an iteration uses generator(stream, *key, k)."""

    stream: Stream
    seed: int
    epoch: int

    def generator(self, step: int, *key: int) -> np.random.Generator:
        return generator(self.stream, self.seed, self.epoch, step, *key)


class Planned(NamedTuple):
    """Images to deliver together: those at some places of a batch that is augmented as one.

    So a rank's share of a batch is, pixel by pixel, what one process has at these places.
    """

    step: int
    """Which batch of the iteration."""
    images: Indices
    """Positions within the split."""
    places: Indices
    """Where in the batch each of them is."""
    size: int
    """How many images the batch has in all."""
    domains: tuple[Domain, ...] = ()
    """How each of them is to look; empty: as they are stored."""


def in_turn(positions: Indices, domains: int) -> Indices:
    """As many as fit of `positions`, so that place p is one of domain p mod `domains`.

    Position i belongs to domain i mod `domains`: every image has one, always the same, and a split
    that is stored by class has its classes in all of them. Of one domain, `positions` as they are.
    """
    if domains == 1:
        return positions
    members = [positions[positions % domains == domain] for domain in range(domains)]
    each = min(map(len, members))
    return np.stack([of_one[:each] for of_one in members], axis=1).ravel()


def half(size: int, which: int) -> Indices:
    """Sorted positions of the first (0) or second (1) half of a split: class-blind, the same for
    all runs. Of an odd number, the second has one more."""
    positions = generator(Stream.HALVES, SPLIT_SEED).permutation(size)
    chosen = positions[size // 2 :] if which else positions[: size // 2]
    return np.sort(chosen).astype(np.int64)


class Dataset(ABC):
    """Images with labels in three splits, delivered as normalized batches on the run's device.

    name          what the user typed
    num_classes   labels are 0 .. num_classes - 1
    shape         (C, H, W) of one image
    digest        16 hex digits of the underlying data (files or pixels), not of the options
    note          what a reader of the numbers must know, e.g. that the images are lossy; else ""
    """

    name: str
    num_classes: int
    shape: tuple[int, int, int]
    digest: str
    note: str

    corrupts: ClassVar[bool] = False
    """Whether `_batches` shows images as the domains of their plan say."""

    @abstractmethod
    def size(self, split: str) -> int:
        """Number of images of "train" (after subsetting), "val" or "test"."""

    @abstractmethod
    def labels(self, split: str) -> Indices:
        """(size,) the label of each image of a split, in stored order."""

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Black and white as batches have them, (C, 1, 1) each.

        Raises ValueError where the data set does not say.
        """
        raise ValueError(f"data={self.name} does not say which pixels there are")

    @abstractmethod
    def _batches(
        self,
        split: str,
        plan: Sequence[Planned],
        *,
        augment: Augment | None,
        device: torch.device,
        channels_last: bool,
    ) -> Iterator[Batch]:
        """Deliver what is planned, one after the other; corrupted where `corrupts` says so."""

    def check_domains(self, domains: Sequence[Domain]) -> None:
        """Raise ValueError for what would be delivered as it is stored."""
        asked = [str(domain) for domain in domains if domain.corrupts]
        if asked and not self.corrupts:
            raise ValueError(
                f"data={self.name} shows its images as they are stored, not as {', '.join(asked)}"
            )

    def train_size(self, order: Order = SHUFFLED) -> int:
        """Number of training images that an epoch of `order` can use. Raises ValueError, as
        `normlab.data.patterns.usable` does, if the labels do not allow the order."""
        return usable(self.labels("train"), order) if order.patterned else self.size("train")

    def train_batches(
        self,
        *,
        batch_size: int,
        seed: int,
        epoch: int,
        start_step: int = 0,
        order: Order = SHUFFLED,
        places: Sequence[int] | None = None,
        domains: Sequence[Domain] = (),
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[Batch]:
        """Augmented batches of one epoch from `start_step` on, in `order`; a remainder is dropped.

        Batch k of an epoch is bitwise the same from whichever step the iteration started, and so is
        a part of it: with `places`, only what is at these places of each batch is read. With D
        `domains`, every image belongs to one of them, and place p of a batch has one of domain
        p mod D, augmented and then corrupted.
        Raises ValueError at the call if not one batch fits, `start_step` is beyond the epoch, the
        order does not go with the labels, the batch size or several domains, or the data set does
        not corrupt its images.
        """
        self.check_domains(domains)
        several = max(1, len(domains))
        if several > 1 and order != SHUFFLED:
            raise ValueError(f"order={order} does not go with {several} domains")
        n = self.train_size(order) // several * several
        steps = n // batch_size if batch_size > 0 else 0
        if steps == 0:
            can_use = f"has {n} training images" + f" for order={order}" * order.patterned
            raise ValueError(f"batch_size={batch_size}: {self.name} {can_use}")
        if not 0 <= start_step <= steps:
            raise ValueError(f"start_step={start_step}: an epoch has {steps} steps")
        rng = generator(Stream.TRAIN_ORDER, seed, epoch)
        if order == SHUFFLED:  # without the labels of a million images
            shuffled = in_turn(rng.permutation(n), several)
            batches = shuffled[: steps * batch_size].reshape(steps, batch_size)
        else:
            batches = arranged(self.labels("train"), order, batch_size, rng)
        chosen = np.arange(batch_size) if places is None else np.asarray(places, dtype=np.int64)
        shown = tuple(domains[int(place) % several] for place in chosen) if domains else ()
        plan = [
            Planned(k, batches[k][chosen], chosen, batch_size, shown)
            for k in range(start_step, steps)
        ]
        return self._batches(
            "train",
            plan,
            augment=Augment(Stream.TRAIN_AUGMENT, seed, epoch),
            device=torch.device(device),
            channels_last=channels_last,
        )

    def eval_batches(
        self,
        split: str,
        *,
        batch_size: int,
        order: int | None,
        samples: int | None = None,
        augment: bool = False,
        drop_last: bool = False,
        share: tuple[int, int] = (0, 1),
        unit: int | None = None,
        pattern: Order = SHUFFLED,
        within: int = 0,
        domains: Sequence[Domain] = (),
        part: int | None = None,
        device: torch.device | str = "cpu",
        channels_last: bool = False,
    ) -> Iterator[Batch]:
        """Batches of a split for evaluation: every image once, not augmented unless asked.

        order    None: stored order (many data sets are stored by class: never for mini-batch
                 statistics); a number: a permutation seeded with it, from a stream of its own
        samples  only the first that many of the order
        share    (rank, ranks): only this rank's part of them, whole units of `unit` images (a batch
                 unless given; what is left over goes to the last rank), in pieces of the batches
                 that one rank has: augmented as there. There may be nothing in it.
        pattern  an order of training, drawn for SGD batches of `within` samples and seeded with
                 `order`: only the images that it can use
        domains  how the images look: all as in the only one, or, of D, the k-th as in number
                 k mod D, to which it belongs as in training
        part     0 or 1: only the first or second `half` of the split
        Without `drop_last` the last batch may be smaller. Raises ValueError at the call for an
        unknown split, more samples than there are, settings that leave no batch, or a data set that
        does not corrupt its images.
        """
        self.check_domains(domains)
        among = np.arange(self.size(split)) if part is None else half(self.size(split), part)
        if pattern != SHUFFLED:
            rng = generator(Stream.EVAL_ORDER, order or 0)
            positions = among[arranged(self.labels(split)[among], pattern, within, rng).ravel()]
        elif order is None:
            positions = among
        else:
            positions = among[generator(Stream.EVAL_ORDER, order).permutation(len(among))]
        several = max(1, len(domains))
        positions = in_turn(positions, several)
        n = len(positions)
        if samples is not None and not 1 <= samples <= n:
            raise ValueError(f"samples={samples}: {split} of {self.name} has {n} images")
        wanted = n if samples is None else samples
        end = wanted // batch_size * batch_size if drop_last and batch_size > 0 else wanted
        if batch_size < 1 or end == 0:
            raise ValueError(
                f"batch_size={batch_size}: {split} of {self.name} offers {wanted} images"
            )
        ours = dealt(end, unit or batch_size, share)
        plan = []
        for k, first in enumerate(range(0, end, batch_size)):
            last = min(first + batch_size, end)
            here = np.arange(max(first, ours.start), min(last, ours.stop))
            if len(here):
                shown = tuple(domains[int(at) % several] for at in here) if domains else ()
                plan.append(Planned(k, positions[here], here - first, last - first, shown))
        return self._batches(
            split,
            plan,
            augment=Augment(Stream.EVAL_AUGMENT, order or 0, 0) if augment else None,
            device=torch.device(device),
            channels_last=channels_last,
        )


def dealt(images: int, unit: int, share: tuple[int, int]) -> range:
    """Which of so many images a rank has, of `share` = (rank, ranks): whole units, one after the
    other; what is left over goes to the last rank."""
    rank, ranks = share
    units = -(-images // unit)
    begin, until = (min(images, units * at // ranks * unit) for at in (rank, rank + 1))
    return range(begin, until)


def numbers(split: str, positions: Indices) -> Indices:
    """A number for each of a split's images that none of another split has."""
    return positions * len(SPLITS) + SPLITS.index(split)


def upload(x: Tensor, device: torch.device) -> Tensor:
    """`x` of the CPU on the device. A GPU gets it from pinned memory, and nobody waits for that: a
    plain copy would let the queue of its work run empty at every batch."""
    if device.type == "cuda":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def unknown_split(split: str) -> ValueError:
    return ValueError(f"unknown split '{split}': one of {', '.join(SPLITS)}")
