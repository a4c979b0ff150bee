"""Where statistics come from that no law explains: other inputs, other weights, another eps."""

import math

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normlab.diagnose.case import Case, Numbers
from normlab.diagnose.comparison import Pair
from normlab.diagnose.findings import AVERAGE, RECALIBRATE, Finding
from normlab.diagnose.forwards import take
from normlab.diagnose.moments import Moments
from normlab.diagnose.thresholds import EXPLAINED, FIRST, MEMORY, ROUNDED

__all__ = ["another_eps", "averaged", "other_domain", "stale"]


def another_eps(case: Case) -> Finding | None:
    """Candidates of the frameworks: whether one makes stored and precise statistics agree."""
    own = {name: layer.eps for name, layer in case.forwards.layers.items()}
    names = list(case.pairs)
    first, rest = names[0], names[1:]
    if not rest or case.pairs[first].far() > 0.2 * case.far:
        return None
    before = best = _far_with(case)
    found = 0.0
    for eps in (1e-3, 1e-5, 1e-2, 1e-4, 1e-6):
        if all(abs(value / eps - 1) < 1e-6 for value in own.values()):
            continue
        try:
            case.forwards.eps(eps)
            far = _far_with(case)
        finally:
            case.forwards.eps(own)
        if far < best:
            best, found = far, eps
    if best > (1 - EXPLAINED) * before:
        return None
    used = max(set(own.values()), key=list(own.values()).count)
    return Finding(
        "eps_mismatch", case.severity(), case.worst(),
        f"The model has eps {used:g}, and its statistics fit {found:g}: with that the distance of "
        f"stored from precise ones falls from {before:.2g} to {best:.2g}; {case.said()}.",
        {"eps of the model": used, "eps that fits": found, "distance": before,
         "distance with it": best, **case.in_numbers()},
        f"eps={found:g} in the model's batch norms",
    )  # fmt: skip


def _far_with(case: Case) -> float:
    """Mean distance of the stored statistics from those of a pass over the first batches.

    At the NBS in use: statistics of larger groups are others behind every norm.
    """
    moments: dict[str, Moments] = {}

    def look(name: str, x: Tensor) -> None:
        moments.setdefault(name, Moments(x.size(1), x.device)).add(x, min(case.nbs, x.size(0)))

    case.forwards.expect(len(case.some))
    case.forwards.run(case.some, batch=True, group_size=case.nbs, watch=look)
    each = [
        Pair(n, p.mean, p.var, moments[n], p.eps).far()
        for n, p in case.pairs.items()
        if n in moments
    ]
    return sum(each) / len(each)


def other_domain(case: Case, target: dict[str, Moments] | None) -> Finding | None:
    """Whether the statistics are the target's, or the first layer shows other inputs.

    No norm is in front of it; the layers behind it normalize again what other inputs shift.
    """
    near = _distance_from(case, target)
    of_target = near < (1 - EXPLAINED) * case.far
    name = next(iter(case.moments))
    first = case.pairs.get(name)
    if first is None and not of_target:
        return None
    evidence: Numbers = {"distance from the target's": near} if target is not None else {}
    words = (
        f"The statistics are those of the target (distance {near:.2g}), not of the data "
        f"({case.far:.2g})"
    )
    if first is not None and not of_target:
        shifted, share = _as_of_a_shift(case, first)
        others = [pair for other, pair in case.pairs.items() if other != name]
        if not shifted and not _stands_out(first, others):
            return None
        evidence |= {
            "distance of the first layer": first.far(),
            "distance of the others": _median([pair.far() for pair in others]),
            "share of the first layer's shift that shifted inputs explain": share,
        }
        words = (
            f"The first layer, {name}, is off by {first.in_deviations():.2f} deviations and its "
            f"variance {first.ratio():.2f} times the precise one, "
        )
        if shifted:
            words += f"{100 * share:.0f} % of it as a constant added to the inputs shifts it"
        else:
            words += "far more than the layers behind it, which normalize again"
    return Finding(
        "other_domain", case.severity(), [name, *(n for n in case.worst() if n != name)],
        f"{words}: other inputs, or others' preprocessing; {case.said()}.",
        evidence | case.in_numbers(),
        f"{RECALIBRATE} on the data that the model will meet; compare the preprocessing",
    )  # fmt: skip


def _distance_from(case: Case, target: dict[str, Moments] | None) -> float:
    """Mean distance of the stored statistics from the target's; infinite where there is none."""
    if target is None:
        return math.inf
    each = [
        Pair(name, pair.mean, pair.var, target[name], pair.eps).far()
        for name, pair in case.pairs.items()
        if name in target
    ]
    return sum(each) / len(each) if each else math.inf


def _stands_out(first: Pair, others: list[Pair]) -> bool:
    """Whether the first layer is further off than weights that moved would leave it.

    By its distance, or by its variances in units of how those of batches scatter.
    """
    of_batches = first.moments.variances.mean  # what a running average at this NBS holds
    own = min(first.far(), float(first.distance(None, of_batches).mean()))
    if own < ROUNDED or not first.beyond_noise():
        return False
    scatter = _median([pair.variances_in_spreads() for pair in others])
    return (
        own > FIRST * _median([pair.far() for pair in others])
        or first.variances_in_spreads() > FIRST * max(scatter, 1.0)
    )  # fmt: skip


def _median(values: list[float]) -> float:
    """Of those that are numbers; 0 of none."""
    known = sorted(value for value in values if value == value)
    return known[len(known) // 2] if known else 0.0


def _as_of_a_shift(case: Case, first: Pair) -> tuple[bool, float]:
    """Whether the first layer's means are off as a constant added to each input channel makes it.

    A convolution of constant images gives the directions, one per input channel. Weights that moved
    shift the means in all directions, and the variances more than the means.
    """
    directions = _responses(case, first.name)
    if directions is None or directions.size(1) * 4 > directions.size(0):
        return False, 0.0
    shift = (first.mean - first.precise_mean)[first.mask]
    directions = directions[first.mask]
    if not torch.isfinite(directions).all():
        return False, 0.0
    solved = torch.linalg.lstsq(directions.cpu(), shift[:, None].cpu(), driver="gelsd").solution
    fitted = directions @ solved.to(directions.device)
    share = 1 - float(
        (shift - fitted[:, 0]).square().sum() / shift.square().sum().clamp_min(1e-300)
    )
    beyond = first.in_spreads()
    return share > EXPLAINED and beyond > MEMORY[1], share


def _responses(case: Case, name: str) -> Tensor | None:
    """(C, K): what a constant 1 in each of K input channels adds to the means of that layer."""
    leaves, tree = pytree.tree_flatten(case.some[0])
    place = next(
        (i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()), -1
    )
    x = leaves[place]
    if not x.is_floating_point() or x.dim() < 3 or x.size(1) >= x.size(0):
        return None
    channels = x.size(1)
    constant = torch.zeros_like(x[: channels + 1])
    for k in range(channels):
        constant[k, k] = 1
    batch = take(case.some[0], slice(channels + 1))
    leaves = pytree.tree_leaves(batch)
    leaves[place] = constant
    seen: list[Tensor] = []

    def look(layer: str, inputs: Tensor) -> None:
        if layer == name and not seen:
            seen.append(inputs.double().flatten(2).mean(2))

    case.forwards.expect(1)
    case.forwards.run([pytree.tree_unflatten(leaves, tree)], watch=look)
    return (seen[0][:-1] - seen[0][-1]).T if seen else None


def averaged(case: Case) -> Finding | None:
    """Whether the weights are the average of those in the other checkpoints."""
    own = dict(case.model.named_parameters())
    parts = [state for state in case.states if own.keys() <= state.keys()]
    if len(parts) < 2:
        return None
    apart = near = 0.0
    for name, value in own.items():
        stack = torch.stack([state[name].detach().cpu().double() for state in parts])
        mine = value.detach().cpu().double()
        near += float((stack.mean(0) - mine).square().sum())
        apart += float((stack - mine).square().mean(0).sum())
    if apart == 0 or near > 1e-3 * apart:
        return None
    return Finding(
        "averaged_weights", case.severity(), case.worst(),
        f"The weights are the average of those of the {len(parts)} other checkpoints, and the "
        f"statistics are not those of the average: {case.said()}.",
        {"checkpoints": len(parts), "distance": case.far, **case.in_numbers()},
        f"{AVERAGE}, which estimates anew after averaging",
    )  # fmt: skip


def stale(case: Case) -> Finding:
    names = case.worst()
    pairs = list(case.pairs.values())
    return Finding(
        "stale_statistics", case.severity(), names,
        f"Every layer is off, {names[0]} most (variance {case.pairs[names[0]].ratio():.2f} times "
        f"the precise one) and the first one less than most: the weights moved after the "
        f"statistics were made, by training, averaging or copying; {case.said()}.",
        {"distance": case.far, "distance of the first layer": pairs[0].far(), **case.in_numbers()},
        RECALIBRATE,
    )  # fmt: skip
