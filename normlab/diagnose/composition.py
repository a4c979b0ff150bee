"""Losses with batch statistics: at the NBS in use, and for batches composed by label."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normlab.diagnose.case import Case, costs
from normlab.diagnose.facts import some
from normlab.diagnose.findings import Finding
from normlab.diagnose.forwards import size_of, take

__all__ = ["gap", "leakage", "reuse"]


def gap(case: Case) -> Iterator[Finding]:
    """Population statistics, however precise, that cost something against the batch's."""
    precise, batch = case.with_precise, case.with_batch
    if not costs(precise, batch):
        return
    words = (
        f"With statistics of batches of {case.nbs} the loss is {batch.loss:.3g}, with those of the "
        f"population {precise.loss:.3g}, on the same data"
    )
    if precise.error == precise.error:
        words += f" (error {100 * batch.error:.1f} % and {100 * precise.error:.1f} %)"
    yield Finding(
        "train_test_gap", "problem", case.worst(),
        words + ": what the network learned needs its batch's statistics.",
        {"NBS": case.nbs, **case.in_numbers()},
        "fine-tune with frozen statistics (`normlab.population.freeze`), or train with a larger "
        "NBS",
    )  # fmt: skip


def reuse(case: Case) -> Iterator[Finding]:
    """Layers that a forward uses several times, with one set of statistics for all uses."""
    uses = case.live.uses if case.live else case.uses
    names = [name for name in case.norms if uses[name] > 1]
    if not names:
        return
    precise, batch = case.with_precise, case.with_batch
    words = f"{some(names)} {'is' if len(names) == 1 else 'are'} used {max(uses.values())} times"
    if precise.loss == precise.loss:
        words += (
            f" in a forward: in training each use has its batch's statistics (loss {batch.loss:.3g}"
            f"), in a test all share one set (loss {precise.loss:.3g}, if precise)"
        )
    yield Finding(
        "used_twice", "problem" if costs(precise, batch) else "notice", names, words + ".",
        {"uses": max(uses.values()), **case.in_numbers()},
        "a norm of its own for every use; weights may stay shared",
    )  # fmt: skip


def leakage(case: Case) -> Iterator[Finding]:
    """Whether batches of few labels are easier than random ones, under their own statistics."""
    sample = _pooled(case.some)
    if sample is None:
        return
    batch, labels = sample
    size = min(case.nbs, len(labels) // 2)
    if size < 2 or len(labels.unique()) < 2:
        return
    order = labels.argsort(stable=True)
    cut = len(labels) - len(labels) % size
    forwards = case.forwards
    forwards.expect(2 * (cut // size))
    by_label = forwards.run([take(batch, p) for p in order[:cut].split(size)], batch=True)
    places = torch.arange(len(labels), device=labels.device)[order[:cut].sort().values]
    random = forwards.run([take(batch, p) for p in places.split(size)], batch=True)
    if not costs(random, by_label):
        return
    yield Finding(
        "batch_leakage", "problem", [],
        f"Under their own statistics batches of one or two labels are easier than random ones: "
        f"loss {by_label.loss:.3g} against {random.loss:.3g}, error {100 * by_label.error:.1f} % "
        f"against {100 * random.error:.1f} %. The network reads labels from its batch.",
        {"loss by label": by_label.loss, "loss random": random.loss, "NBS": size,
         "error by label": by_label.error, "error random": random.error},
        "train with shuffled batches; SyncBN or shuffled samples between ranks where they share "
        "labels",
    )  # fmt: skip


def _pooled(batches: list[Any]) -> tuple[Any, Tensor] | None:
    """Some batches as one, and its labels; None where there are no whole-number ones."""
    first = batches[0]
    if not (isinstance(first, tuple | list) and len(first) > 1):
        return None
    y = first[1]
    if not (isinstance(y, Tensor) and y.dim() == 1 and not y.is_floating_point()):
        return None
    leaves = [pytree.tree_leaves(batch) for batch in batches]
    size = size_of(first)
    joined = [
        torch.cat([one[i] for one in leaves])
        if isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.size(0) == size
        else leaf
        for i, leaf in enumerate(leaves[0])
    ]
    batch = pytree.tree_unflatten(joined, pytree.tree_structure(first))
    return batch, batch[1]
