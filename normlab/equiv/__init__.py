"""`normlab equiv`: one SGD step's batch, formed in several ways, gives the same numbers in float64.

k chunks inside one forward (ghost), k micro-batches one after the other (accumulation), and k
processes with a part each (ranks) are the same normalization of the same batch: outputs, every
gradient and the weights afterwards agree to rounding, and so they do after many steps. So do one
batch and ranks that synchronize their statistics, all of them, in pairs, or with two micro-batches
each. Running statistics do not: one forward, k forwards and k sets of buffers move them
differently. The policies that reproduce each route are shown with it.
"""

import copy
import math
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from normlab import build, config
from normlab.batchplan import BatchPlan, plan
from normlab.equiv.steps import RankFailed, Trace, formed, over_ranks, train
from normlab.norms.base import population_layers
from normlab.norms.ghost import Population

__all__ = ["Row", "compare", "main"]

TOLERANCE = 1e-12
"""What counts as equal, relative to the largest value of the quantity, 1 at least."""

STEPS = 20
"""How many steps of SGD with momentum are taken; step t has the samples turned round by t places.

Rounding grows from step to step, by about the factor that a change of the weights does; with the
learning rate of `steps` it stays within the same tolerance.
"""

_FORMS: dict[str, tuple[object, str]] = {
    "norm.grouping": ("contiguous", "chunks of consecutive samples, as ranks have them"),
    "norm.population": ("mean", "the population rules with the routes they reproduce, all at once"),
    "norm.statistics": (None, "layers that normalize with the statistics of their batches"),
    "norm.update": (None, "layers that keep the statistics of their batches"),
    "micro_batch": (None, "micro-batches of one chunk with a forward of all chunks"),
    "world_size": (1, "as many ranks as there are chunks"),
    "order": ("shuffled", "the routes on samples as they come"),
    "domains": (["none"], "the routes on images as they are stored"),
    "freeze_after": (None, "layers that are never frozen"),
    "buffers": ("average", "what ranks may do with their buffers, all of it at once"),
    "precision": ("fp32", "the routes in float64"),
}
"""What a run may form its batches and statistics by and is given here, with what that is."""

RANKS = 16
"""How many processes are started at most."""


@dataclass(frozen=True)
class Row:
    """The largest relative difference of one quantity between two routes, after so many steps, and
    whether it should be nothing but rounding. One that is not finite is wrong in any case."""

    routes: str
    quantity: str
    difference: float
    equal: bool = True
    steps: int = 1

    @property
    def holds(self) -> bool:
        return math.isfinite(self.difference) and (self.difference <= TOLERANCE) == self.equal


def main(overrides: Sequence[str]) -> int:
    """Compare the routes for a run's step; 1 if one is not as stated.

    The step has the run's model, conv, init, data, seed, batch_size, nbs, decay, norm.eps and
    norm.affine; its images are not augmented. The rest of a run (recipe, evaluations) has no part
    in it; also 1 if a process fails. Raises ConfigError and ValueError for what no run could have,
    for a batch of one chunk or of more than RANKS, and for other ways to form the batch than those
    compared.
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
    if samples // nbs > RANKS:
        raise ValueError(
            f"batch_size={samples} nbs={nbs}: {samples // nbs} chunks, and equiv starts a process "
            f"for each, at most {RANKS}: batch_size={RANKS * nbs} or less, or nbs="
            f"{math.ceil(samples / RANKS)} or more"
        )
    data = build.data(given)
    x, y = next(iter(data.eval_batches("train", batch_size=samples, order=given["seed"])))
    network = build.model(given, data).cpu()
    try:
        rows = compare(network, x, y, nbs=nbs, decay=given["decay"])
    except RankFailed as error:
        print(f"normlab: {error}", file=sys.stderr)
        return 1
    print(f"{given['model']['name']}, {samples} samples, nbs {nbs}, in float64:")
    width = max(len(row.routes) for row in rows)
    for row in rows:
        verdict = ("equal" if row.equal else "differ, as they must") if row.holds else "WRONG"
        after = f"{row.steps:2} step{'s' if row.steps > 1 else ' '}"
        print(
            f"  {row.routes:{width}}  {after}  {row.quantity:9}  {row.difference:7.1e}  {verdict}"
        )
    sys.stdout.flush()
    return 0 if all(row.holds for row in rows) else 1


def compare(
    network: nn.Module, x: Tensor, y: Tensor, *, nbs: int, decay: float = 0.9, steps: int = STEPS
) -> list[Row]:
    """The routes against each other, for steps of `network` on x (N, ...) with labels y (N,).

    Every PopulationNorm of the network stands for the layer that each route has in its place, with
    its weights and buffers; the network itself is not changed. All in float64; the loss is the mean
    cross-entropy over the N samples; all other layers are in eval(). Raises ValueError unless
    nbs >= 2 divides N into two chunks or more, and without a layer to compare.
    """
    samples = len(x)
    chunks, rest = divmod(samples, nbs)
    if rest or chunks < 2:
        raise ValueError(f"nbs={nbs} does not divide {samples} samples into two chunks or more")
    if not population_layers(network):
        raise ValueError("the network has no layer with population statistics")
    x = x.double()
    batches = [(x.roll(-step, 0), y.roll(-step, 0)) for step in range(steps)]

    def alone(layers: nn.Module, size: int = samples) -> Trace:
        parts = [range(start, start + size) for start in range(0, samples, size)]
        return train(layers, batches, parts)

    def ghost(population: Population, size: int = nbs, kept: float = decay) -> Trace:
        return alone(formed(network, "ghost", nbs=size, population=population, decay=kept))

    plain = formed(network, "bn", decay=decay)
    plans = _plans(samples, nbs)
    over = over_ranks(plain, batches, plans)
    together = {name: _joined(over[name], made) for name, made in plans.items()}
    accumulated = alone(copy.deepcopy(plain), nbs)
    # What ranks form in pairs, one process does in larger chunks, and all together in none.
    whole = alone(copy.deepcopy(plain))
    sizes = {made.nbs for made in plans.values() if made.nbs is not None} - {samples}
    chunked = {size: ghost("mean", size) for size in sizes}
    first, mean, sequential = ghost("first"), chunked[nbs], None
    # A forward that takes k steps of a share of 1 - decay each has to be told to take whole ones.
    if (forgetting := chunks * (1 - decay)) <= 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a decay this low is meant
            sequential = ghost("sequential", kept=1 - forgetting)

    rows = []
    for count in dict.fromkeys((1, steps)):
        rows += _differences("ghost = accumulation", mean, accumulated, count)
        for name, made in plans.items():
            size = made.nbs or samples
            alike = "one batch" if size == samples else "ghost" + f", nbs={size}" * (size != nbs)
            theirs = whole if size == samples else chunked[size]
            rows += _differences(f"{alike} = {name}", theirs, together[name], count)
            if made.accumulation > 1:
                continue
            if size == samples:
                alike = "one batch = each rank of " + name
                rows.append(_buffers(alike, theirs, over[name][-1], count))
            else:
                alike += f", population=mean = {name}, buffers=mean"
                rows.append(_buffers(alike, theirs, _averaged(over[name], "mean"), count))
        # The law of total variance adds the spread of the ranks' means to the variance.
        ranks = over["ranks"]
        rows.append(_buffers("ghost, population=first = rank 0", first, ranks[0], count))
        rows.append(
            _buffers(
                "ghost, population=mean, but ranks, buffers=average",
                mean, _averaged(ranks, "average"), count, equal=False,
            )
        )  # fmt: skip
        # k forwards forget 1 - decay^k of the old values, one forward 1 - decay.
        rows.append(
            _buffers(
                f"ghost, population=mean, but accumulation (forget {1 - decay:.3g}, "
                f"{1 - decay**chunks:.3g})",
                mean, accumulated, count, equal=False,
            )
        )  # fmt: skip
        if sequential is not None:
            name = f"ghost, population=sequential, decay={1 - forgetting:.3g} = accumulation"
            rows.append(_buffers(name, sequential, accumulated, count))
    return rows


def _plans(samples: int, nbs: int) -> dict[str, BatchPlan]:
    """How as many ranks as there are chunks form batches: alone, all together, and, where that is
    something else again, in pairs and in two micro-batches each."""
    ranks = samples // nbs
    sync: dict[str, Any] = {"world_size": ranks, "batch": "sync", "norm": "sync"}
    plans = {"ranks": plan(samples, nbs, world_size=ranks), "sync": plan(samples, None, **sync)}
    if ranks > 2 and ranks % 2 == 0:
        plans["sync in pairs"] = plan(samples, 2 * nbs, sync_group_size=2, **sync)
    if nbs % 2 == 0:
        halves = plan(samples, samples // 2, sync_group_size=ranks, **sync)
        plans["sync in two micro-batches"] = halves
    return plans


def _joined(ranks: list[Trace], made: BatchPlan) -> Trace:
    """Outputs and input gradients of all ranks at their places in the batch; what is left is rank
    0's. A rank's input gradients are those of its own mean, whose share is one of the ranks'."""
    places = [place for rank in range(len(ranks)) for part in made.parts(rank) for place in part]
    order = torch.tensor(places).argsort()
    joined = {}
    for step, outcome in ranks[0].items():
        inputs = torch.cat([rank[step].gradients["input"] for rank in ranks]) / len(ranks)
        joined[step] = replace(
            outcome,
            outputs=torch.cat([rank[step].outputs for rank in ranks])[order],
            gradients={**outcome.gradients, "input": inputs[order]},
        )
    return joined


def _averaged(ranks: list[Trace], how: Literal["average", "mean"]) -> Trace:
    """Rank 0's outcomes with the buffers that a run's ranks would agree on."""
    averaged = {}
    for step, outcome in ranks[0].items():
        buffers = {
            name: torch.stack([rank[step].buffers[name] for rank in ranks])
            for name in outcome.buffers
        }
        found = {name: values.mean(0) for name, values in buffers.items()}
        if how == "average":
            for name in (name for name in found if name.endswith(".var")):
                means = buffers[name.removesuffix("var") + "mean"]
                found[name] = found[name] + means.var(0, correction=0)
        averaged[step] = replace(outcome, buffers=found)
    return averaged


def _differences(routes: str, ours: Trace, theirs: Trace, steps: int) -> list[Row]:
    one, other = ours[steps], theirs[steps]
    assert one.gradients.keys() == other.gradients.keys()
    return [
        Row(routes, "outputs", _difference(one.outputs, other.outputs), steps=steps),
        Row(routes, "gradients", _largest(one.gradients, other.gradients), steps=steps),
        Row(routes, "weights", _largest(one.weights, other.weights), steps=steps),
    ]


def _buffers(routes: str, ours: Trace, theirs: Trace, steps: int, equal: bool = True) -> Row:
    difference = _largest(ours[steps].buffers, theirs[steps].buffers)
    return Row(routes, "buffers", difference, equal, steps)


def _largest(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    # Python's max passes over a nan that is not the first.
    return torch.tensor([_difference(ours[name], theirs[name]) for name in ours]).max().item()


def _difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1)).item()
