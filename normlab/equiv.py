"""`normlab equiv`: one SGD step's batch, formed in three ways, gives the same numbers in float64.

k chunks inside one forward (ghost), k micro-batches one after the other (accumulation), and k
processes with a part each (ranks, gradients averaged) are the same normalization of the same
batch: outputs and every gradient agree to rounding. Running statistics do not: one forward, k
forwards and k sets of buffers move them differently. The population policies of `GhostBatchNorm`
that reproduce each route are shown with it.
"""

import copy
import math
import multiprocessing
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from normlab import build, config
from normlab.norms.base import PopulationNorm, population_layers
from normlab.norms.ghost import Population
from normlab.surgery import convert

__all__ = ["Row", "compare", "main"]

TOLERANCE = 1e-12
"""What counts as equal, relative to the largest value of the quantity, 1 at least."""


_FORMS: dict[str, tuple[object, str]] = {
    "norm.grouping": (
        "contiguous",
        "chunks of consecutive samples, as ranks have them",
    ),
    "norm.population": ("mean", "the population rules with the routes they reproduce, all at once"),
    "micro_batch": (None, "micro-batches of one chunk with a forward of all chunks"),
    "world_size": (1, "as many ranks as there are chunks"),
    "order": ("shuffled", "the routes on samples as they come"),
}
"""What forms a batch in a run and is given here, with what that is."""


@dataclass(frozen=True)
class Outcome:
    """What one step computes, on the CPU: outputs, gradients and buffers by name."""

    outputs: Tensor
    gradients: dict[str, Tensor]
    buffers: dict[str, Tensor]


@dataclass(frozen=True)
class Row:
    """The largest relative difference of one quantity between two routes, and whether it should be
    nothing but rounding. One that is not finite is wrong in any case."""

    routes: str
    quantity: str
    difference: float
    equal: bool = True

    @property
    def holds(self) -> bool:
        return math.isfinite(self.difference) and (self.difference <= TOLERANCE) == self.equal


def main(overrides: Sequence[str]) -> int:
    """Compare the routes for a run's step; 1 if one is not as stated.

    The step has the run's model, conv, init, data, seed, batch_size, nbs, decay, norm.eps and
    norm.affine; its images are not augmented. The rest of a run (recipe, precision, evaluations)
    has no part in it. Raises ConfigError and ValueError for what no run could have, for a batch of
    one chunk, and for other ways to form the batch than those compared.
    """
    given = config.compose(["norm=ghost", "nbs=16", *overrides])
    if given["norm"]["name"] != "ghost":
        raise ValueError(f"equiv compares ways to form ghost batches; norm={given['norm']['name']}")
    for key, (value, compared) in _FORMS.items():
        found = given["norm"][key.removeprefix("norm.")] if "." in key else given[key]
        if found != value:
            raise ValueError(f"{key}={found}: equiv compares {compared}; leave {key} out")
    nbs, samples = given["nbs"], given["batch_size"]
    if samples == nbs:
        raise ValueError(f"batch_size={samples} nbs={nbs}: one chunk can be formed in one way only")
    data = build.data(given)
    x, y = next(iter(data.eval_batches("train", batch_size=samples, order=given["seed"])))
    network = build.model(given, data).cpu()
    rows = compare(network, x, y, nbs=nbs, decay=given["decay"])
    print(f"{given['model']['name']}, {samples} samples, nbs {nbs}, one step in float64:")
    width = max(len(row.routes) for row in rows)
    for row in rows:
        verdict = ("equal" if row.equal else "differ, as they must") if row.holds else "WRONG"
        print(f"  {row.routes:{width}}  {row.quantity:9}  {row.difference:7.1e}  {verdict}")
    sys.stdout.flush()
    return 0 if all(row.holds for row in rows) else 1


def compare(network: nn.Module, x: Tensor, y: Tensor, *, nbs: int, decay: float = 0.9) -> list[Row]:
    """The routes against each other, for the step of `network` on x (N, ...) with labels y (N,).

    Every PopulationNorm of the network stands for the layer that each route has in its place, with
    its weights and buffers; the network itself is not changed. All in float64; the loss is the mean
    cross-entropy over the N samples; all other layers are in eval(). Raises ValueError unless
    nbs >= 2 divides N into two chunks or more, and without a layer to compare.
    """
    chunks, rest = divmod(len(x), nbs)
    if rest or chunks < 2:
        raise ValueError(f"nbs={nbs} does not divide {len(x)} samples into two chunks or more")
    if not population_layers(network):
        raise ValueError("the network has no layer with population statistics")
    x = x.double()

    def ghost(population: Population, kept: float = decay) -> Outcome:
        formed = _formed(network, "ghost", nbs=nbs, population=population, decay=kept)
        return _step(formed, [x], [y])

    plain = _formed(network, "bn", decay=decay)
    accumulated = _step(copy.deepcopy(plain), list(x.split(nbs)), list(y.split(nbs)))
    ranks = _over_ranks(plain, x, y, chunks)
    first, mean = ghost("first"), ghost("mean")
    averaged = {
        name: torch.stack([rank.buffers[name] for rank in ranks]).mean(0)
        for name in ranks[0].buffers
    }
    rows = [
        *_differences("ghost = accumulation", first, accumulated),
        *_differences("ghost = ranks", first, _joined(ranks)),
        _buffers("ghost, population=first = rank 0", first.buffers, ranks[0].buffers),
        _buffers("ghost, population=mean = mean of ranks", mean.buffers, averaged),
    ]
    # k forwards forget 1 - decay^k of the old values, one forward 1 - decay.
    rows.append(
        Row(
            f"ghost, population=mean, against accumulation ({1 - decay:.3g} of the old forgotten, "
            f"{1 - decay**chunks:.3g})",
            "buffers",
            _largest(mean.buffers, accumulated.buffers),
            equal=False,
        )
    )
    # A forward that takes k steps of a share of 1 - decay each has to be told to take whole ones.
    forgetting = chunks * (1 - decay)
    if forgetting <= 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a decay this low is meant
            sequential = ghost("sequential", 1 - forgetting).buffers
        name = f"ghost, population=sequential, decay={1 - forgetting:.3g} = accumulation"
        rows.append(_buffers(name, sequential, accumulated.buffers))
    return rows


def _formed(network: nn.Module, norm: str, **options: Any) -> nn.Module:
    """A copy in float64 whose layers with population statistics are `norm`s."""
    return convert(
        copy.deepcopy(network).double(),
        norm,
        only=lambda _, layer: isinstance(layer, PopulationNorm),
        **options,
    )


def _step(network: nn.Module, xs: list[Tensor], ys: list[Tensor]) -> Outcome:
    """Forward and backward over the micro-batches, each weighted by its share of the samples.

    Only the compared layers are in train(): dropout would draw other numbers on every route.
    """
    network.eval()
    for layer in population_layers(network).values():
        layer.training = True
    samples = sum(len(y) for y in ys)
    outputs, inputs = [], []
    for x, y in zip(xs, ys, strict=True):
        leaf = x.detach().clone().requires_grad_()
        logits = network(leaf)
        (F.cross_entropy(logits, y, reduction="sum") / samples).backward()
        outputs.append(logits.detach())
        inputs.append(leaf.grad)
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    gradients["input"] = torch.cat([grad for grad in inputs if grad is not None])
    return Outcome(torch.cat(outputs), gradients, _running(network))


def _running(network: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{kind}": buffer.detach().clone()
        for name, layer in population_layers(network).items()
        for kind, buffer in (("mean", layer.running_mean), ("var", layer.running_var))
    }


def _over_ranks(network: nn.Module, x: Tensor, y: Tensor, ranks: int) -> list[Outcome]:
    """One process per chunk, joined by gloo; each one's outcome, its gradients averaged by all."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="normlab-equiv-") as directory:
        torch.save((network, x, y), Path(directory) / "step.pt")
        processes = [
            context.Process(target=_rank, args=(rank, ranks, directory)) for rank in range(ranks)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
        if any(process.exitcode for process in processes):
            raise RuntimeError("a rank of normlab equiv failed; its traceback is above")
        loaded = [
            torch.load(Path(directory) / f"{rank}.pt", weights_only=True) for rank in range(ranks)
        ]
    return [Outcome(**outcome) for outcome in loaded]


def _rank(rank: int, ranks: int, directory: str) -> None:
    """What one process does: its part of the batch, then the mean of all ranks' gradients."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{directory}/meeting", rank=rank, world_size=ranks,
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    try:
        # Written a moment ago by the process that started this one: it holds a module.
        network, x, y = torch.load(Path(directory) / "step.pt", weights_only=False)
        done = _step(network, [x.chunk(ranks)[rank]], [y.chunk(ranks)[rank]])
        for name, gradient in done.gradients.items():
            if name == "input":  # each rank's own: its part of the mean over all samples
                gradient /= ranks
            else:
                dist.all_reduce(gradient)
                gradient /= ranks
        torch.save(vars(done), Path(directory) / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


def _joined(ranks: list[Outcome]) -> Outcome:
    """Outputs and input gradients of all ranks in order; the parameters' gradients are rank 0's."""
    gradients = {**ranks[0].gradients}
    gradients["input"] = torch.cat([rank.gradients["input"] for rank in ranks])
    return Outcome(torch.cat([rank.outputs for rank in ranks]), gradients, ranks[0].buffers)


def _differences(routes: str, ours: Outcome, theirs: Outcome) -> list[Row]:
    assert ours.gradients.keys() == theirs.gradients.keys()
    return [
        Row(routes, "outputs", _difference(ours.outputs, theirs.outputs)),
        Row(routes, "gradients", _largest(ours.gradients, theirs.gradients)),
    ]


def _buffers(routes: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> Row:
    return Row(routes, "buffers", _largest(ours, theirs))


def _largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    # Python's max passes over a nan that is not the first.
    return torch.tensor([_difference(ours[name], theirs[name]) for name in ours]).max().item()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
