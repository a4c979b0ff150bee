"""What the ways of forming a batch and of estimating a population cost: time, memory, exchanges.

All on one head, a few 3x3 convolutions with norms, and one batch of features:

- Exchanges between ranks are counted, not timed (`normlab.tasks.mirror`): the time of synchronized
  norms is a rank's own part, without the exchange. Synchronized norms meet
  twice per layer, with 7 + 2 C numbers forward and 2 C backward, of 8 bytes. Shuffling exchanges
  whole samples, B of F bytes on each of R ranks, before the head and after it: two gathers of 96
  bytes that say what comes, two of B F, the order of 8 B R, and backward two sums of B F R.
- Memory is what the forward pass keeps for the backward pass, each piece of memory once, over what
  plain batch norm keeps.
- Times are of a forward and a backward pass, as a ratio to plain batch norm's in the same round,
  the median over rounds in which the contestants take turns. They are of the machine that measured
  them, and never pooled with another's.

Sources: the talk "Devils in BatchNorm" and a survey, on what each of them is said to cost.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from normlab import dist, population
from normlab.norms.base import normalization
from normlab.norms.bn import BatchNorm
from normlab.norms.ghost import GhostBatchNorm
from normlab.norms.gn import GroupNorm
from normlab.norms.renorm import BatchRenorm
from normlab.norms.sync import SyncBatchNorm
from normlab.norms.virtual import VirtualBatchNorm, forward_with
from normlab.tasks.base import Row
from normlab.tasks.mirror import mirrored
from normlab.turns import take_turns

KEYS: tuple[str, ...] = ()

Norm = Callable[[int], nn.Module]
Pass = Callable[[], Tensor]
Ways = dict[str, list[Pass]]

HEAD, ROWS = 7, 12
"""Numbers that a synchronized layer, and an exchange of samples, say before their own."""


def run(
    *,
    seed: int,
    device: torch.device,
    width: int,
    depth: int,
    size: int,
    samples: int,
    ranks: int,
    batches: int,
    rounds: int,
) -> Iterator[Row]:
    """Yield all numbers as epoch 0: counts and bytes, exact, and ratios of times.

    Args:
        width, depth, size: the head's channels, its convolutions, and the sides of its features.
        samples: on each rank, a multiple of 4.
        ranks: for the exchanges.
        batches: of a training that a precise estimate is compared with; it takes an eighth of them.
        rounds: of the times.

    `collectives_<way>` and `bytes_<way>` are per rank and step, `..._closed` in closed form;
    `memory_<way>`, `time_<way>` ratios to plain batch norm; `time_precise` an estimate's time over
    the training's, `time_batch` a forward pass with batch over one with population statistics;
    `other_batch`, `other_population`: how far an output is from what it is among other samples, the
    largest change over the outputs' standard deviation.

    Raises ValueError for numbers out of their range.
    """
    counts = {
        "depth": depth, "size": size, "samples": samples, "batches": batches, "rounds": rounds,
    }  # fmt: skip
    for key, given in counts.items():
        if given < 1:
            raise ValueError(f"task.{key}={given}: it is at least 1")
    if width < 4 or width % 4:
        raise ValueError(f"task.width={width}: it must be a multiple of 4, for group norm's groups")
    if samples % 4:
        raise ValueError(f"task.samples={samples}: it must be a multiple of 4, for ghost chunks")
    if ranks < 2:
        raise ValueError(f"task.ranks={ranks}: an exchange needs at least 2")
    if batches % 8:
        raise ValueError(f"task.batches={batches}: an estimate takes an eighth of them")
    torch.manual_seed(seed)
    x = torch.randn(samples, width, size, size)
    make = partial(head, width=width, depth=depth, device=device)
    yield from _rows(exchanged(x, width, depth, ranks))
    yield from _rows(synchronized(x, width, depth, ranks, rounds))
    x = x.to(device)
    ways = passes(make, x)
    yield from _rows(kept(ways))
    yield from _rows(timed(ways, rounds, device))
    yield from _rows(inference(make(BatchNorm), x, batches, rounds))


def _rows(found: dict[str, float]) -> Iterator[Row]:
    return (Row(0, quantity, value) for quantity, value in found.items())


def head(norm: Norm, *, width: int, depth: int, device: torch.device) -> nn.Sequential:
    """Convolutions, each with a norm and ReLU, their weights the same whatever the norm."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), norm(width), nn.ReLU()]
    return nn.Sequential(*layers).to(device)


CPU = torch.device("cpu")


def exchanged(x: Tensor, width: int, depth: int, ranks: int) -> dict[str, float]:
    """Collectives and bytes of a step: synchronized norms, and samples shuffled around the head."""
    with mirrored(ranks) as traffic:
        found = {}
        together = head(SyncBatchNorm, width=width, depth=depth, device=CPU)
        plain = head(BatchNorm, width=width, depth=depth, device=CPU)

        def shuffled(x: Tensor) -> Tensor:
            there, how = dist.shuffle(x, seed=0)
            return dist.unshuffle(plain(there), how)

        for way, through in (("sync", together), ("shuffle", shuffled), ("bn", plain)):
            before = traffic.collectives, traffic.volume
            y: Tensor = through(x.clone().requires_grad_())
            y.sum().backward()
            found[f"collectives_{way}"] = float(traffic.collectives - before[0])
            found[f"bytes_{way}"] = float(traffic.volume - before[1])
    rows = x.numel() * x.element_size()
    return found | {
        "collectives_sync_closed": 2.0 * depth,
        "bytes_sync_closed": 8.0 * depth * (HEAD + 2 * width + 2 * width),
        "collectives_shuffle_closed": 7.0,
        "bytes_shuffle_closed": 2.0 * 8 * ROWS + 2 * rows + 8 * len(x) * ranks + 2 * rows * ranks,
    }


def synchronized(x: Tensor, width: int, depth: int, ranks: int, rounds: int) -> dict[str, float]:
    """Memory of synchronized norms, and the time of a rank's own part, on the CPU."""
    with mirrored(ranks):
        ways: Ways = {
            way: [partial(head(norm, width=width, depth=depth, device=CPU), x)]
            for way, norm in (("bn", BatchNorm), ("sync", SyncBatchNorm))
        }
        return kept(ways) | timed(ways, rounds, CPU)


def passes(make: Callable[[Norm], nn.Sequential], x: Tensor) -> Ways:
    """Way -> the forward passes of a step of training, each followed by its backward pass."""
    half = len(x) // 2

    def through(norm: Norm) -> list[Pass]:
        return [partial(make(norm), x)]

    plain, virtual = make(BatchNorm), make(VirtualBatchNorm)
    others = torch.randn_like(x)
    return {
        "bn": [partial(plain, x)],
        "ghost": through(partial(GhostBatchNorm, nbs=len(x) // 4)),
        "accumulated": [partial(plain, x[:half]), partial(plain, x[half:])],
        "virtual": [partial(forward_with, virtual, x, others)],
        "renorm": through(BatchRenorm),
        "gn": through(partial(GroupNorm, groups=4)),
    }


def kept(ways: Ways) -> dict[str, float]:
    """Bytes that the largest forward pass of each way keeps, over batch norm's."""
    found = {}
    for way, forwards in ways.items():
        largest = 0
        for forward in forwards:
            held: dict[int, int] = {}

            def hold(tensor: Tensor, held: dict[int, int] = held) -> Tensor:
                memory = tensor.untyped_storage()
                held[memory.data_ptr()] = memory.nbytes()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(hold, lambda tensor: tensor):
                y = forward()
            largest = max(largest, sum(held.values()))
            del y
        found[way] = largest
    return {f"memory_{way}": size / found["bn"] for way, size in found.items() if way != "bn"}


def timed(ways: Ways, rounds: int, device: torch.device) -> dict[str, float]:
    """The time of a step of each way over batch norm's."""

    def step(forwards: list[Pass]) -> None:
        for forward in forwards:
            forward().sum().backward()

    contestants = {way: partial(step, fs) for way, fs in ways.items()}
    ratios = in_turns(contestants, rounds, "bn", device)
    return {f"time_{way}": ratio for way, ratio in ratios.items()}


def inference(network: nn.Sequential, x: Tensor, batches: int, rounds: int) -> dict[str, float]:
    """What an estimate and batch statistics take, and what the latter make of other samples."""
    network.train()
    data = [x] * (batches // 8)

    def train() -> None:
        for _ in range(batches):
            network(x).sum().backward()

    def estimate() -> None:
        population.estimate(network, data, estimator="pooled")

    estimates = in_turns(
        {"train": train, "precise": estimate}, max(1, rounds // 4), "train", x.device
    )
    network.eval()
    of_batch = partial(normalization, network, statistics="batch", update=False)

    def forward(choose: Callable[[], AbstractContextManager[None]]) -> Tensor:
        with torch.no_grad(), choose():
            y: Tensor = network(x)
        return y

    latency = in_turns(
        {"population": partial(forward, nullcontext), "batch": partial(forward, of_batch)},
        rounds, "population", x.device,
    )  # fmt: skip
    found = {"time_precise": estimates["precise"], "time_batch": latency["batch"]}
    half = len(x) // 2
    for source, choose in (("batch", of_batch), ("population", nullcontext)):
        with torch.no_grad(), choose():
            among, alone = network(x)[:half], network(x[:half])
        found[f"other_{source}"] = float((among - alone).abs().max() / among.std())
    return found


def in_turns(
    contestants: Mapping[str, Callable[[], object]], rounds: int, base: str, device: torch.device
) -> dict[str, float]:
    """Median over rounds of each one's time over that of `base` in the same round.

    The clock is that of the process where the work is the CPU's: other programs disturb it least.
    """

    def timed(contestant: Callable[[], object]) -> Callable[[], object]:
        def go() -> None:
            contestant()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        return go

    clock = time.perf_counter if device.type == "cuda" else time.process_time
    taken = take_turns({name: timed(one) for name, one in contestants.items()}, rounds, clock=clock)
    return {
        name: median(a / b for a, b in zip(seconds, taken[base], strict=True))
        for name, seconds in taken.items()
        if name != base
    }
