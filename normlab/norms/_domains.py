"""Whose sample is whose: labels read, checked and sorted once for all layers of a forward."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Labels", "Sets", "read"]


@dataclass(frozen=True)
class Sets:
    """Samples that share statistics: set k has the next sizes[k] samples, in sorted order."""

    domains: list[int]
    sizes: list[int]
    order: Tensor | None
    """Sorts the batch by set; None where it is sorted."""
    inverse: Tensor | None

    def parts(self, x: Tensor) -> list[tuple[Tensor, int]]:
        return list(zip(_take(x, self.order).split(self.sizes), self.domains, strict=True))

    def join(self, parts: list[Tensor]) -> Tensor:
        return _take(parts[0] if len(parts) == 1 else torch.cat(parts), self.inverse)


def _take(x: Tensor, samples: Tensor | None) -> Tensor:
    """The samples in that order, in the memory layout of x."""
    if samples is None:
        return x
    if x.is_contiguous():
        return x.index_select(0, samples)
    return x.movedim(1, -1).index_select(0, samples).movedim(-1, 1)


class Labels:
    """The domain of each sample, or of all of them, sorted once for all layers."""

    def __init__(self, labels: int | Tensor) -> None:
        self.labels = labels
        self._sets: dict[tuple[int | None, torch.device], Sets] = {}
        if not isinstance(labels, int):
            self._sets[None, labels.device] = self._sort(labels, None, labels.device)

    def check(self, samples: int) -> None:
        if not isinstance(self.labels, int) and len(self.labels) != samples:
            raise ValueError(
                f"a batch of {samples} samples came with {len(self.labels)} domain labels"
            )

    def rows(self, device: torch.device) -> Tensor:
        """Indices into (D, ...): one per sample, or one that stands for all of them."""
        labels = [self.labels] if isinstance(self.labels, int) else self.labels
        return torch.as_tensor(labels, device=device)

    def sets(self, x: Tensor, group_size: int | None = None) -> Sets:
        """The samples of one domain each, within consecutive groups of group_size samples."""
        if isinstance(self.labels, int):
            sizes = [group_size or x.size(0)] * (x.size(0) // group_size if group_size else 1)
            return Sets([self.labels] * len(sizes), sizes, None, None)
        key = (group_size, x.device)
        if key not in self._sets:
            self._sets[key] = self._sort(self.labels, group_size, x.device)
        return self._sets[key]

    @staticmethod
    def _sort(labels: Tensor, group_size: int | None, device: torch.device) -> Sets:
        several = int(labels.max()) + 1 if len(labels) else 1
        keys = labels
        if group_size is not None:
            keys = keys + torch.arange(len(keys)) // group_size * several
        present, sizes = keys.unique(return_counts=True)
        order = keys.argsort(stable=True)
        sets = Sets((present % several).tolist(), sizes.tolist(), None, None)
        if torch.equal(order, torch.arange(len(order))):
            return sets
        return replace(sets, order=order.to(device), inverse=order.argsort().to(device))


def read(labels: int | Sequence[int] | Tensor) -> int | Tensor:
    """Labels as a number or an int64 vector on the CPU, or a refusal."""
    if isinstance(labels, int) and not isinstance(labels, bool):
        return labels
    read = torch.as_tensor(labels)
    integral = not (read.is_floating_point() or read.is_complex() or read.dtype == torch.bool)
    if read.dim() > 1 or not (integral or read.numel() == 0):
        raise ValueError(
            "domain labels are whole numbers, one for each sample (N,) or one for all, "
            f"not {read.dtype} of shape {tuple(read.shape)}"
        )
    read = read.detach().to("cpu", torch.int64, copy=True)
    return int(read) if read.dim() == 0 else read
