"""The steps of one route: in this process, or in several that are joined by gloo."""

import copy
import multiprocessing
import signal
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from normlab import dist as ranked
from normlab import parallel
from normlab.batchplan import BatchPlan
from normlab.norms.base import PopulationNorm, population_layers
from normlab.surgery import convert

__all__ = ["Batch", "Outcome", "RankFailed", "Trace", "formed", "over_ranks", "train"]

LR, MOMENTUM = 0.05, 0.9

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Outcome:
    """What a step computes and leaves behind, on the CPU: outputs, the others by name."""

    outputs: Tensor
    gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    buffers: dict[str, Tensor]


Trace = dict[int, Outcome]
"""The outcomes of the first and the last step, by how many have been taken."""


class RankFailed(RuntimeError):
    """A process of a route over ranks has failed; one line says how."""


def formed(network: nn.Module, norm: str, **options: Any) -> nn.Module:
    """A copy in float64 whose layers with population statistics are `norm`s."""
    return convert(
        copy.deepcopy(network).double(),
        norm,
        only=lambda _, layer: isinstance(layer, PopulationNorm),
        **options,
    )


def train(network: nn.Module, batches: list[Batch], parts: list[range]) -> Trace:
    """Steps of SGD, each on these parts of a batch, one micro-batch after the other.

    The loss of a step is the mean over the parts' samples; gradients of a network over ranks are
    averaged with the others'. Only the compared layers are in train(): dropout would draw other
    numbers on every route.
    """
    network.eval()
    for layer in population_layers(network).values():
        layer.training = True
    inner = network.module if isinstance(network, DistributedDataParallel) else network
    optimizer = torch.optim.SGD(network.parameters(), lr=LR, momentum=MOMENTUM)
    own, trace = sum(len(part) for part in parts), {}
    for step, (x, y) in enumerate(batches, start=1):
        optimizer.zero_grad()
        outputs, inputs = [], []
        for number, part in enumerate(parts, start=1):
            places = slice(part.start, part.stop)
            leaf = x[places].detach().clone().requires_grad_()
            with parallel.averaging(network, number == len(parts)):
                logits = network(leaf)
                (F.cross_entropy(logits, y[places], reduction="sum") / own).backward()
            outputs.append(logits.detach())
            inputs.append(leaf.grad)
        gradients = {k: p.grad.clone() for k, p in inner.named_parameters() if p.grad is not None}
        gradients["input"] = torch.cat([grad for grad in inputs if grad is not None])
        optimizer.step()
        if step in (1, len(batches)):
            weights = {name: p.detach().clone() for name, p in inner.named_parameters()}
            trace[step] = Outcome(torch.cat(outputs), gradients, weights, _running(inner))
    return trace


def _running(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": buffer.detach().clone()
        for name, layer in population_layers(network).items()
        for kind, buffer in (("mean", layer.running_mean), ("var", layer.running_var))
    }


def over_ranks(
    network: nn.Module, batches: list[Batch], plans: dict[str, BatchPlan]
) -> dict[str, list[Trace]]:
    """What each rank of the plans does: as many processes, joined by gloo."""
    (count,) = {made.world_size for made in plans.values()}
    # Processes that import torch one by one take longer than all they compute.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torch._dynamo"])  # what optimizers import
    with tempfile.TemporaryDirectory(prefix="normlab-equiv-") as directory:
        torch.save((network, batches, plans), Path(directory) / "steps.pt")
        processes = [
            context.Process(target=_rank, args=(rank, count, directory)) for rank in range(count)
        ]
        try:
            for process in processes:
                process.start()
            running = list(processes)
            while running and not any(process.exitcode for process in processes):
                wait([process.sentinel for process in running])
                running = [process for process in running if process.is_alive()]
            codes = [process.exitcode for process in processes]
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        if any(codes):
            raise RankFailed(_failure(codes, Path(directory)))
        loaded = [
            torch.load(Path(directory) / f"{rank}.pt", weights_only=True) for rank in range(count)
        ]
    return {
        name: [
            {step: Outcome(**outcome) for step, outcome in of_rank[name].items()}
            for of_rank in loaded
        ]
        for name in plans
    }


def _failure(codes: Sequence[int | None], directory: Path) -> str:
    """Which rank failed, and how: the first of those that have said so, unless one was killed."""
    noted = sorted(directory.glob("*.failed"), key=lambda path: path.stat().st_mtime_ns)
    said = {int(path.stem): path.read_text() for path in noted}
    killed = {
        rank: f"killed by {signal.Signals(-code).name}"
        for rank, code in enumerate(codes)
        if code and code < 0
    }
    ended = {rank: f"exit code {code}" for rank, code in enumerate(codes) if code}
    rank, how = next(iter((killed or said or ended).items()))
    return f"rank {rank} of {len(codes)}: {how}"


def _rank(rank: int, count: int, directory: str) -> None:
    """What one process does; if it fails, a file says why, in one line."""
    try:
        _steps(rank, count, directory)
    except Exception as error:
        said = f"{type(error).__name__}: {error}".splitlines()[0]
        (Path(directory) / f"{rank}.failed").write_text(said)
        sys.exit(1)


def _steps(rank: int, count: int, directory: str) -> None:
    """The rank's parts of every batch, as each plan says."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=count,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        # Written a moment ago by the process that started this one: it holds a module.
        network, batches, plans = torch.load(Path(directory) / "steps.pt", weights_only=False)
        done = {}
        for name, made in plans.items():
            layers = copy.deepcopy(network)
            if made.batch == "sync":
                layers = formed(network, "sync", group=ranked.subgroup(made.sync_group))
            trace = train(parallel.wrapped(layers, torch.device("cpu")), batches, made.parts(rank))
            done[name] = {step: vars(outcome) for step, outcome in trace.items()}
        torch.save(done, Path(directory) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()
