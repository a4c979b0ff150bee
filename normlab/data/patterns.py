"""Orders of an epoch that know the labels: patterned groups, and batches sorted by label.

Drawn anew for every (seed, epoch), never from a global generator. What an order leaves out differs
from epoch to epoch.
"""

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from torch.utils.data import Sampler

from normlab.data.streams import Stream, generator
from normlab.orders import Order

Indices = npt.NDArray[np.int64]


def usable(labels: npt.ArrayLike, order: Order) -> int:
    """How many of the samples an epoch of whole groups can hold, each at most once.

    All of them without a pattern. With L labels x S samples, a class of n has n // S packs, one of
    which goes into a group: there are as many groups as the largest G with
    sum over classes of min(packs, G) >= L G. Left out are the n mod S samples of each class that
    fill no pack, and packs of large classes that find no L - 1 others.
    Raises ValueError if there are fewer than L classes or a class has fewer than S samples: it
    would never be trained on.
    """
    names, counts = np.unique(np.asarray(labels), return_counts=True)
    if not order.patterned:
        return int(counts.sum())
    if order.labels > len(names):
        raise ValueError(
            f"order={order}: groups of {order.labels} labels, and there are {len(names)} classes"
        )
    if counts.min() < order.samples:
        raise ValueError(
            f"order={order}: groups of {order.samples} samples of a label, and class"
            f" {names[counts.argmin()]} has {counts.min()}"
        )
    packs = counts // order.samples
    most = int(packs.sum()) // order.labels
    groups = bisect_left(
        range(1, most + 1), True, key=lambda g: np.minimum(packs, g).sum() < order.labels * g
    )
    return groups * order.group


def epoch_batches(
    labels: npt.ArrayLike, order: Order, *, batch_size: int, seed: int, epoch: int
) -> Indices:
    """(steps, batch_size): positions of the samples of each SGD batch of an epoch, over all ranks.

    Every sample comes at most once; `usable` samples, less those that fill no batch, do. With one
    seed, "sorted" batches hold the samples of the "shuffled" ones. Raises ValueError as `usable`
    does, and for a batch size that holds no whole number of groups or is more than there is.
    """
    return arranged(labels, order, batch_size, generator(Stream.TRAIN_ORDER, seed, epoch))


def arranged(
    labels: npt.ArrayLike, order: Order, batch_size: int, rng: np.random.Generator
) -> Indices:
    """The batches of `epoch_batches`, drawn from `rng`."""
    _, classes = np.unique(np.asarray(labels), return_inverse=True)
    if classes.ndim != 1 or len(classes) == 0:
        raise ValueError(f"labels must be a list of at least one, got shape {classes.shape}")
    if batch_size < 1 or batch_size % order.group:
        raise ValueError(
            f"batch_size={batch_size} is no whole number of groups of {order.group} (order={order})"
        )
    available = usable(labels, order)
    steps = available // batch_size
    if steps == 0:
        raise ValueError(f"batch_size={batch_size}: order={order} can use {available} samples")
    if order.patterned:
        groups = steps * batch_size // order.group
        return _grouped(classes, order, groups, rng).reshape(steps, batch_size)
    batches = rng.permutation(len(classes))[: steps * batch_size].reshape(steps, batch_size)
    if order.name == "sorted":
        by_label = np.argsort(classes[batches], axis=1, kind="stable")
        batches = np.take_along_axis(batches, by_label, axis=1)
    return batches


def _grouped(classes: Indices, order: Order, groups: int, rng: np.random.Generator) -> Indices:
    """(groups, labels, samples) positions: in each group, `labels` classes with `samples` each.

    First which packs of S samples are used, all being equally likely as far as no class has more
    than one a group. Then their groups: with r_c packs of class c left for g groups, systematic
    sampling (Madow 1949) takes c into the next one with probability r_c / g. So the last groups
    have the mix of the first ones, and none is left without L different classes.
    """
    counts = np.bincount(classes)
    packs = np.minimum(counts // order.samples, groups)
    left = rng.multivariate_hypergeometric(packs, groups * order.labels)
    chosen = np.empty((groups, order.labels), dtype=np.int64)
    pack = np.empty_like(chosen)
    for group in range(groups):
        ahead = groups - group
        lined_up = rng.permutation(len(counts))
        points = rng.integers(ahead) + ahead * np.arange(order.labels)
        drawn = lined_up[np.searchsorted(left[lined_up].cumsum(), points, side="right")]
        left[drawn] -= 1
        chosen[group], pack[group] = drawn, left[drawn]
    shuffled = rng.permutation(len(classes))
    by_class = shuffled[np.argsort(classes[shuffled], kind="stable")]
    first = (counts.cumsum() - counts)[chosen] + pack * order.samples
    positions: Indices = by_class[first[..., None] + np.arange(order.samples)]
    return positions


class PatternedBatches(Sampler[list[int]]):
    """The batches of an order as a `batch_sampler` for any DataLoader, one rank's share of each.

    >>> batches = PatternedBatches([0, 0, 0, 1, 1, 1, 1, 2, 2], "2x2", batch_size=4)
    >>> len(batches), batches.dropped
    (2, 1)

    Args:
        labels: (N,) the label of each sample of the data set, in its order.
        order: "shuffled", "sorted" or "<L>x<S>", see `normlab.orders`.
        batch_size: samples of an SGD batch over all ranks; a rank gets batch_size / world_size of
            them, whole groups.
        seed: the order is a function of it and the epoch.
        rank, world_size: ranks with the same labels and seed get disjoint parts of each batch. With
            "sorted" they hold different labels, as per-GPU batches of correlated samples do.

    As with torch's DistributedSampler, call `set_epoch` before each epoch; without it, every epoch
    has the same batches. `dropped` samples of each epoch are in no batch, see `usable`.
    Raises ValueError for what cannot be formed.
    """

    def __init__(
        self,
        labels: npt.ArrayLike,
        order: str,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.order = Order.parse(order)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size}: at least 0 and below it")
        if batch_size % (world_size * self.order.group):
            raise ValueError(
                f"batch_size={batch_size} over world_size={world_size} leaves a rank no whole"
                f" number of groups of {self.order.group} (order={order})"
            )
        self.labels = np.asarray(labels)
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        self._steps = len(self._epoch())
        self.dropped = len(self.labels) - self._steps * batch_size

    def _epoch(self) -> Indices:
        return epoch_batches(
            self.labels, self.order, batch_size=self.batch_size, seed=self.seed, epoch=self.epoch
        )

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iteration draws."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._steps

    def __iter__(self) -> Iterator[list[int]]:
        share = self.batch_size // self.world_size
        mine = slice(self.rank * share, (self.rank + 1) * share)
        for batch in self._epoch():
            yield batch[mine].tolist()
