"""Synchronized batch norm between two processes, as a multiple of detectron2's.

Each rank has one thread and half of the batch, and they exchange statistics over gloo. Ours, the
peer and torch's batch norm of a rank's own half, which exchanges nothing, take turns in the same
two processes. torch's SyncBatchNorm is no contestant: it refuses tensors on a CPU.
"""

import json
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import distributed, nn

from normlab import allocator, kernels, norms
from normlab.bench import layers, peers
from normlab.bench.measure import Spread, Together
from normlab.models.base import NormConstructor
from normlab.models.cifar_resnet import build
from normlab.turns import take_turns

RANKS = 2

NETWORK = "ResNet-20"
IMAGES = (128, 3, 32, 32)
"""What the network gets, on all ranks together."""

NORMS: Mapping[str, NormConstructor] = {
    "ours": norms.find("sync"),
    "peer": peers.NaiveSyncBatchNorm,
    "native": nn.BatchNorm2d,
}

BAR = 0.90
"""What our time may be of detectron2's."""

COLLECTIVES = ("all_reduce", "all_gather", "all_gather_into_tensor", "broadcast", "all_to_all")

Turn = tuple[float, float]
"""CPU seconds and elapsed seconds of one step, averaged over the ranks."""


@dataclass(frozen=True)
class RankRow:
    """Forward and backward on two ranks; times are milliseconds of a step, per rank."""

    what: str
    """A layer, or the network with it."""
    shape: str
    """The input of one rank."""
    format: str
    dtype: str
    ranks: int
    clock: str
    rounds: int
    ours: Spread
    peer: Spread
    native: Spread
    ratio: Spread
    """Our CPU time over detectron2's."""
    over_native: Spread
    """Our CPU time over that of torch's BatchNorm2d, which exchanges nothing."""
    peer_over_native: Spread
    elapsed: Spread
    """Our elapsed time over detectron2's."""
    collectives: int
    """In one step."""
    peer_collectives: int
    bar: float = BAR
    kernels: bool = False
    """Whether the layer could use the fused kernels."""

    @property
    def met(self) -> bool:
        return self.ratio.median <= self.bar


def rows(*, quick: bool) -> Generator[RankRow]:
    """The layers, then the network: about a minute. Quick: the smaller layers, some 20 seconds.

    The processes end with the generator: close it where its rows are not all taken. Raises
    RuntimeError if one of them fails.
    """
    shapes = layers.SHAPES[:-1] if quick else layers.SHAPES
    cells = [("layer", shape, format) for shape in shapes for format in layers.FORMATS]
    if not quick:
        cells += [(NETWORK, IMAGES, format) for format in layers.FORMATS]
    with (
        tempfile.TemporaryDirectory() as folder,
        Together([_code(rank, Path(folder) / "meeting") for rank in range(RANKS)]) as processes,
    ):
        processes.ask(["ready"])
        deadline = time.perf_counter() + (10 if quick else 50)
        for number, cell in enumerate(cells):
            share = (deadline - time.perf_counter()) / (len(cells) - number)
            yield row(processes, *cell, rounds=6 if quick else 12, seconds=share)


def _code(rank: int, meeting: Path) -> str:
    return f"from normlab.bench import ranks; ranks.serve({rank}, {str(meeting)!r})"


def row(
    processes: Together,
    what: str,
    shape: Sequence[int],
    format: str,
    *,
    rounds: int,
    seconds: float,
) -> RankRow:
    """Measure one cell, for at most `rounds` rounds or about `seconds`."""
    share = [shape[0] // RANKS, *shape[1:]]
    collectives = processes.ask(["make", what, share, format])[0]
    turns: dict[str, list[Turn]] = {name: [] for name in NORMS}

    def turn(name: str, repeats: int) -> None:
        taken = processes.ask(["turn", name, repeats])
        cpu, elapsed = (sum(part) / len(taken) / repeats for part in zip(*taken, strict=True))
        turns[name].append((cpu, elapsed))

    for _ in range(3):
        turn("native", 1)
    native = median(cpu for cpu, _ in turns["native"])
    repeats = max(1, round(layers.REPEAT / max(native, 1e-6)))
    turns["native"].clear()
    take_turns({name: partial(turn, name, repeats) for name in NORMS}, rounds, seconds=seconds)
    counted = {name: taken[1:] for name, taken in turns.items()}  # the first round warms up
    return _row(what, "x".join(map(str, share)), format, counted, collectives)


def _row(
    what: str,
    shape: str,
    format: str,
    turns: Mapping[str, Sequence[Turn]],
    collectives: Mapping[str, int],
) -> RankRow:
    def milliseconds(name: str) -> Spread:
        return Spread.of([1000 * cpu for cpu, _ in turns[name]])

    def over(name: str, base: str, clock: int = 0) -> Spread:
        pairs = zip(turns[name], turns[base], strict=True)
        return Spread.of([a[clock] / b[clock] for a, b in pairs])

    return RankRow(
        what=what,
        shape=shape,
        format=format,
        dtype="float32",
        ranks=RANKS,
        clock="CPU time of the processes, 1 thread for computing",
        rounds=len(turns["ours"]),
        ours=milliseconds("ours"),
        peer=milliseconds("peer"),
        native=milliseconds("native"),
        ratio=over("ours", "peer"),
        over_native=over("ours", "native"),
        peer_over_native=over("peer", "native"),
        elapsed=over("ours", "peer", clock=1),
        collectives=collectives["ours"],
        peer_collectives=collectives["peer"],
        kernels=kernels.enabled() and kernels.available(),
    )


# -- in the ranks ---------------------------------------------------------------------------------


def serve(rank: int, meeting: str) -> None:
    """One rank of the layers and networks."""
    with joined(rank, meeting):
        answer_all(Rank().answer)


@contextmanager
def joined(rank: int, meeting: str) -> Iterator[None]:
    """In the process group of the ranks, with a thread to compute; freed memory is kept."""
    torch.set_num_threads(1)
    allocator.keep_freed_memory()
    distributed.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=60),
    )
    yield
    distributed.destroy_process_group()


def answer_all(answer: Callable[..., Any]) -> None:
    """Answer what `Together` asks until it asks nothing any more."""
    for line in sys.stdin:
        print(json.dumps(answer(*json.loads(line))), flush=True)


class Rank:
    """One rank's contestants. Every rank must be asked the same."""

    def __init__(self) -> None:
        self._steps: dict[str, layers.Step] = {}

    def answer(self, what: str, *details: Any) -> Any:
        tasks: dict[str, Callable[..., Any]] = {
            "ready": lambda: True, "make": self.make, "turn": self.turn
        }  # fmt: skip
        return tasks[what](*details)

    def make(self, what: str, shape: Sequence[int], format: str) -> dict[str, int]:
        """Make the contestants for an input of that shape; collectives in a step of each."""
        self._steps.clear()  # the memory of the cell before
        size = shape[2], shape[3]
        torch.manual_seed(distributed.get_rank() if distributed.is_initialized() else 0)
        x = torch.randn(*shape).to(memory_format=layers.FORMATS[format])
        counts = {}
        for name, norm in NORMS.items():
            torch.manual_seed(0)
            if what == NETWORK:
                net = build(norm, num_classes=10, shape=(3, *size), depth=20)
                net.to(memory_format=layers.FORMATS[format])
                step = layers.Step(net, x, torch.contiguous_format)
            else:
                step = layers.Step(norm(shape[1]), x.requires_grad_(), layers.FORMATS[format])
            counts[name] = collectives(partial(step, 1))
            self._steps[name] = step
        return counts

    def turn(self, name: str, repeats: int) -> Turn:
        """CPU and elapsed seconds of that many steps."""
        cpu, started = time.process_time(), time.perf_counter()
        self._steps[name](repeats)
        return time.process_time() - cpu, time.perf_counter() - started


def collectives(action: Callable[[], object]) -> int:
    """How many exchanges between ranks an action makes."""
    with ExitStack() as stack:
        spies = [
            stack.enter_context(
                mock.patch.object(distributed, name, wraps=getattr(distributed, name))
            )
            for name in COLLECTIVES
        ]
        action()
        return sum(spy.call_count for spy in spies)
