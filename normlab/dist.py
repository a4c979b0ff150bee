"""What ranks do together: collectives with gradients, merged statistics, shuffled samples.

Every function takes the ranks it speaks with as `group`, a torch.distributed process group (None:
all ranks), must be called by each of them in the same order, and is the identity in a process
that is alone: without a process group, or in a group of one. A process outside of `group` gets a
ValueError. Gradients are those of the *sum* of the ranks' losses.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, get_args

import torch
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup

__all__ = [
    "How",
    "Shuffled",
    "all_gather",
    "all_reduce",
    "average_buffers",
    "average_statistics",
    "home",
    "members",
    "merge",
    "numbers",
    "place",
    "pool",
    "shuffle",
    "stack",
    "subgroup",
    "unshuffle",
    "with_gradient",
]


def place(group: ProcessGroup | None = None) -> tuple[int, int]:
    """This process's rank in `group`, and the number of ranks: (0, 1) without a process group."""
    if not (distributed.is_available() and distributed.is_initialized()):
        if group is not None:
            raise ValueError("a group of ranks was given, but this process has no process group")
        return 0, 1
    if not isinstance(group, ProcessGroup | None) or (rank := distributed.get_rank(group)) < 0:
        raise ValueError(
            f"rank {distributed.get_rank()} is not in the group of ranks it was given: create "
            "every group on every rank, and give each rank the one that it belongs to"
        )
    return rank, distributed.get_world_size(group)


def subgroup(size: int) -> ProcessGroup | None:
    """The group of `size` consecutive ranks that this process is in; None where that is all.

    Every rank must call it, and `size` divide their number. Calls make groups anew: keep it.
    """
    if size == place()[1]:
        return None
    group: ProcessGroup = distributed.new_subgroups(size)[0]
    return group


def members(group: ProcessGroup | None) -> ProcessGroup:
    """The process group itself, that of all ranks for None; there must be one."""
    world: ProcessGroup | None = distributed.group.WORLD
    found = world if group is None else group
    assert found is not None
    return found


def home(model: nn.Module, group: ProcessGroup | None = None) -> torch.device:
    """Where numbers about `model` lie when its ranks exchange them."""
    held = next(chain(model.buffers(), model.parameters()), None)
    if held is not None:
        return held.device
    alone = place(group)[1] == 1
    return torch.device("cpu" if alone or distributed.get_backend(group) != "nccl" else "cuda")


# -- collectives with gradients -------------------------------------------------------------------


class _AllReduce(torch.autograd.Function):
    """The sum of the ranks' x; the gradient is the sum of the ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup | None) -> Tensor:
        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:
        return all_reduce(dy, ctx.group), None


class _AllGather(torch.autograd.Function):
    """The ranks' rows, one after the other; a rank's gradient is that of its rows, from all."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: list[int], group: ProcessGroup | None) -> Tensor:
        ctx.rows, ctx.group = rows, group
        padded = x.new_zeros((max(rows), *x.shape[1:]))
        padded[: x.size(0)] = x
        return torch.cat([part[:n] for part, n in zip(_gather(padded, group), rows, strict=True)])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        rank, _ = place(ctx.group)
        return all_reduce(dy, ctx.group).split(ctx.rows)[rank], None, None


def _gather(x: Tensor, group: ProcessGroup | None) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(place(group)[1])]
    distributed.all_gather(parts, x, group=group)
    return parts


def all_reduce(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The sum of `x` over the ranks, with gradients. Shapes, and requires_grad, must agree."""
    if place(group)[1] == 1:
        return x
    total: Tensor = _AllReduce.apply(x, group)
    return total


def all_gather(x: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """The rows (dimension 0) of all ranks' `x` in the order of the ranks, with gradients.

    Ranks may have different numbers of rows, and none. If `x` requires a gradient on one rank, all
    ranks take part in the backward pass.

    Raises on every rank, ValueError where anything else than the number of rows differs and for
    what cannot be gathered, RuntimeError if one rank needs a gradient where another computes none.
    """
    gathered, _ = _all_gather(x, group)
    return gathered


_DIMENSIONS = 8
_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32)


def _all_gather(x: Tensor, group: ProcessGroup | None) -> tuple[Tensor, list[int]]:
    """`all_gather`, and how many rows each rank has."""
    gatherable = 1 <= x.dim() <= _DIMENSIONS and x.dtype in _TYPES
    learns = torch.is_grad_enabled()
    wanted = learns and x.requires_grad
    own = [-1] * (5 + _DIMENSIONS - 1)
    if gatherable:
        own[:5] = [x.size(0), learns, wanted, _TYPES.index(x.dtype), x.dim()]
        own[5 : 4 + x.dim()] = x.shape[1:]
    alone = place(group)[1] == 1
    heads = [own] if alone else stack(torch.tensor(own, device=x.device), group).tolist()
    if refused := [rank for rank, head in enumerate(heads) if head[0] < 0]:
        here = f"; here, a tensor of shape {tuple(x.shape)} and type {x.dtype}" * (not gatherable)
        types = ", ".join(str(kind).removeprefix("torch.") for kind in _TYPES)
        raise ValueError(
            f"ranks {refused} have what cannot be gathered: tensors have 1 to {_DIMENSIONS} "
            f"dimensions and a type of {types}{here}"
        )
    if any(head[3:] != heads[0][3:] for head in heads):
        told = [f"{tuple(head[5 : 4 + head[4]])} of {_TYPES[head[3]]}" for head in heads]
        raise ValueError(f"ranks gather rows that differ in shape or type: {', '.join(told)}")
    if any(head[2] for head in heads):
        modes = [bool(head[1]) for head in heads]
        if not all(modes):
            raise RuntimeError(f"ranks gather what needs a gradient; some compute none: {modes}")
        x = x if wanted else with_gradient(x)
    rows = [head[0] for head in heads]
    return (x if alone or sum(rows) == 0 else _AllGather.apply(x, rows, group)), rows


def with_gradient(x: Tensor) -> Tensor:
    """`x`, detached, so that a backward pass which other ranks wait for reaches this one too."""
    return x.detach().requires_grad_()


# -- statistics -----------------------------------------------------------------------------------


def numbers(values: Sequence[float], device: torch.device) -> Tensor:
    """`values` of the CPU on the device, in float64. A GPU gets them from pinned memory, and nobody
    waits for that."""
    own = torch.tensor(values, dtype=torch.float64, pin_memory=device.type == "cuda")
    return own.to(device, non_blocking=True)


def stack(values: Tensor, group: ProcessGroup | None = None) -> Tensor:
    """`values` of every rank, (ranks, *values.shape); all must have one shape. No gradients."""
    if place(group)[1] == 1:
        return values.detach()[None]
    return torch.stack(_gather(values.detach().contiguous(), group))


def pool(
    means: Tensor, variances: Tensor, counts: Tensor, known: Sequence[float] | None = None
) -> tuple[Tensor, Tensor, float]:
    """Mean, biased variance and number of all elements, of parts that know theirs.

    means and variances (biased) are (parts, ...), counts (parts,); what a part of no elements says
    does not matter. The law of total variance, as Chan et al. (1979) merge: var = (sum n_i v_i +
    sum n_i (m_i - mean)^2) / n. No difference of large squares is ever taken. In float64.

    known: the counts once more, on the CPU; with them nothing waits for what a GPU computes.

    Raises ValueError if there is no element at all, or no finite number of them.
    """
    weights = counts.double()
    told = weights.cpu() if known is None else torch.tensor(known, dtype=torch.float64)
    total = float(told.sum())
    if not 0 < total < math.inf:
        raise ValueError(f"there are no statistics of {'no' if total == 0 else total} elements")
    some = [part for part, n in enumerate(told.tolist()) if n > 0]
    if len(some) < len(told):
        weights, means, variances = (
            torch.stack([values[part] for part in some]) for values in (weights, means, variances)
        )
    weights = (weights / total).view(-1, *[1] * (means.dim() - 1))
    means, variances = means.double(), variances.double()
    # Around the first part's mean: parts that agree give exactly their mean, whatever the weights.
    mean = means[0] + (weights * (means - means[0])).sum(0)
    inside = variances[0] + (weights * (variances - variances[0])).sum(0)
    return mean, inside + (weights * (means - mean).square()).sum(0), total


def merge(
    mean: Tensor, var: Tensor, count: float, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor, float]:
    """Mean, biased variance and number of the elements of all ranks, from each rank's own.

    mean and var have one shape, the same on all ranks; a rank with count 0 takes part and adds
    nothing. The result is float64 and bitwise the same on every rank. See `pool`.
    """
    values = torch.stack([mean.detach().double(), var.detach().double()])
    parts = stack(torch.cat([values.flatten(), values.new_tensor([count])]), group)
    both = parts[:, :-1].view(-1, *values.shape)
    return pool(both[:, 0], both[:, 1], parts[:, -1])


How = Literal["average", "mean", "broadcast"]
"""How ranks make one set of population statistics out of theirs, see `average_statistics`."""

Statistic = tuple[Tensor, Tensor, Tensor | None]
"""Means, variances, and how many updates they have seen if that is known; changed in place."""


def average_buffers(
    model: nn.Module,
    *,
    how: How = "average",
    count: float = 1.0,
    group: ProcessGroup | None = None,
) -> None:
    """Make the population statistics of `model`'s batch norms bitwise the same on all ranks.

    Concerns every module with the buffers running_mean and running_var, torch's own included; the
    rest is as in `average_statistics`.
    """
    layers: list[Any] = [
        (module.running_mean, module.running_var, getattr(module, "num_batches_tracked", None))
        for module in model.modules()
        if isinstance(getattr(module, "running_mean", None), Tensor)
        and isinstance(getattr(module, "running_var", None), Tensor)
    ]
    average_statistics(layers, how=how, count=count, group=group, device=home(model, group))


def average_statistics(
    layers: Sequence[Statistic],
    *,
    how: How = "average",
    count: float = 1.0,
    group: ProcessGroup | None = None,
    device: torch.device,
) -> None:
    """Make statistics, one triple for each layer, bitwise the same on all ranks.

    - "average": the statistics of the union of what the ranks saw, `count` being this rank's share
      (samples, say; by default ranks count alike): the variance includes the spread of the ranks'
      means (`pool`). timm, mmengine and pycls average the variances alone: too small wherever
      ranks differ. The number of updates becomes the largest.
    - "mean": the averages of the means and of the variances, weighted by `count`, as they do. Of
      running averages it is the running average of the averages: what one process has that moves
      towards the mean of the ranks' batch statistics (`norms.ghost`, population="mean"), which
      "average" is only up to the spread of the ranks' running means.
    - "broadcast": those of the group's first rank, the number of updates included.

    device: where the ranks exchange numbers. Raises ValueError on every rank, before anything
    changes, if one of them has another `how` or a count that is negative or not finite, if all
    counts are 0 where they are averaged, and where the layers of the ranks, in their order, hold
    different numbers of statistics.
    """
    hows = get_args(How)
    choice = hows.index(how) if how in hows else -1
    head = torch.tensor([choice, count, len(layers)], dtype=torch.float64)
    alone = place(group)[1] == 1
    heads = head[None] if alone else stack(head.to(device), group)
    choices, counts, numbers = heads.T.tolist()
    if choice < 0 or set(choices) != {choice}:
        raise ValueError(f"how is one of {', '.join(hows)}, on every rank the same; here {how!r}")
    if not all(0 <= value < math.inf for value in counts):
        told = ", ".join(f"{value:g}" for value in counts)
        raise ValueError(f"count must be at least 0 and finite, not {told}")
    most = int(max(numbers))
    if alone or most == 0:
        return
    own = [[0 if buffer is None else buffer.numel() for buffer in layer] for layer in layers]
    own += [[-1] * 3] * (most - len(layers))
    sizes = stack(torch.tensor(own, device=device), group)
    for number, kind in (sizes != sizes[0]).any(0).nonzero().tolist():
        told = ", ".join("no layer" if n < 0 else str(n) for n in sizes[:, number, kind].tolist())
        what = ("means", "variances", "counts of batches")[kind]
        raise ValueError(f"ranks hold different numbers of {what} in layer {number}: {told}")

    def packed(kind: int) -> Tensor:
        held = [buffer for layer in layers if (buffer := layer[kind]) is not None]
        flat = [buffer.detach().to(device).double().flatten() for buffer in held]
        return torch.cat(flat) if flat else torch.empty(0, dtype=torch.float64, device=device)

    own_values = [packed(kind) for kind in range(3)]
    parts = stack(torch.cat(own_values), group)
    means, variances, steps = parts.split([len(values) for values in own_values], dim=1)
    weights = means.new_tensor(counts)
    if how == "average":
        agreed = [*pool(means, variances, weights)[:2], steps.amax(0)]
    elif how == "mean":
        nothing = torch.zeros_like(means)
        plain = [pool(values, nothing, weights)[0] for values in (means, variances)]
        agreed = [*plain, steps.amax(0)]
    else:
        agreed = [means[0], variances[0], steps[0]]
    with torch.no_grad():
        for kind, values in enumerate(agreed):
            held = [buffer for layer in layers if (buffer := layer[kind]) is not None]
            pieces = values.split([buffer.numel() for buffer in held])
            for buffer, piece in zip(held, pieces, strict=True):
                buffer.copy_(piece.view_as(buffer))


# -- shuffled samples -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Shuffled:
    """Where `shuffle` sent the samples: sample i of the result is sample order[i] of all ranks'."""

    order: Tensor
    rows: tuple[int, ...]
    """How many samples each rank has, before and after."""


def shuffle(x: Tensor, *, seed: int, group: ProcessGroup | None = None) -> tuple[Tensor, Shuffled]:
    """Exchange samples (dimension 0) with the other ranks at random, with gradients.

    All ranks' samples are permuted as one, by a permutation that the group's first rank draws with
    its `seed` and broadcasts; each rank then has as many as before, which may be none. No global
    generator is touched. `unshuffle` brings them, or what was computed from them, back. With one
    process nothing moves.

    So batch norm in a head sees samples of several images although each rank has one image (Wu &
    Johnson 2021, sec. 5.1): the normalization batch carries no sign of where a sample is from.
    """
    everything, rows = _all_gather(x, group)
    rank, ranks = place(group)
    if ranks == 1:
        return x, Shuffled(torch.arange(x.size(0), device=x.device), (x.size(0),))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(sum(rows), generator=generator).to(x.device)
    first = distributed.get_global_rank(members(group), 0)
    distributed.broadcast(order, src=first, group=group)
    return everything[order.split(rows)[rank]], Shuffled(order, tuple(rows))


def unshuffle(y: Tensor, shuffled: Shuffled, *, group: ProcessGroup | None = None) -> Tensor:
    """Bring samples back to the ranks and the order they had before `shuffle`, with gradients.

    Raises ValueError, on every rank, if a rank's `y` has another number of samples than it had.
    """
    everything, rows = _all_gather(y, group)
    if tuple(rows) != shuffled.rows:
        raise ValueError(f"ranks had {shuffled.rows} shuffled samples, and now {tuple(rows)}")
    rank, ranks = place(group)
    if ranks == 1:
        return y
    return everything[shuffled.order.argsort().split(rows)[rank]]
