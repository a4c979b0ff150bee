"""Why the stored statistics are not the precise ones: one cause, from what each would leave behind.

Every cause predicts the stored statistics of all layers and channels from the precise ones with one
parameter or none. The one whose prediction takes away the distance (`explained`) is it:

- an average with too few updates: a of the initial 0 and 1, 1 - a of the precise ones, one a;
- a factor on means and variances; a power of the variances (a deviation, an inverse);
- a biased variance: short by (n - 1) / n, which tells layers with few elements from others;
- another eps: the first layer fits, since no norm precedes it, and all others do with that eps;
- a memory of a batch or two: the error of the means is the scatter of a batch, at every layer;
- other inputs: the first layer is off as none behind it, whose inputs are normalized again, or its
  means are off as those of a shifted input would be;
- otherwise the weights moved: every layer is off, the first one least.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from normlab.diagnose.case import Case
from normlab.diagnose.comparison import Pair, explained
from normlab.diagnose.facts import RECALIBRATE, some
from normlab.diagnose.findings import Finding
from normlab.diagnose.forwards import take
from normlab.diagnose.moments import Moments
from normlab.diagnose.thresholds import EXPLAINED, FAR, INITIAL, MEMORY, ROUNDED
from normlab.population.ema import ema_noise

__all__ = ["cause", "scatter", "told"]

Law = dict[str, tuple[Tensor, Tensor]]


def cause(case: Case, target: dict[str, Moments] | None) -> Iterator[Finding]:
    """The finding on why, if the statistics are far enough to look for one."""
    pairs = case.pairs
    if not pairs:
        return
    far = max(pair.far() for pair in pairs.values())
    if far < ROUNDED and not case.stored_costs:
        return
    if case.broken and case.far < FAR:
        return  # what it costs is due to the buffers that a finding of their own is about
    for look in (_folded, _by_law, _biased, _memory):
        found = look(case)
        if found is not None:
            yield found
            return
    means, _ = scatter(case.pairs)
    moved = case.far > FAR / 2 and float(means.nanmedian()) > MEMORY[1]
    if not case.stored_costs and not moved:
        return
    yield _eps(case) or _averaged(case) or _domain(case, target) or _stale(case)


def _severity(case: Case, *, defect: bool = False) -> Any:
    return "problem" if defect or case.stored_costs else "notice"


# -- laws of one parameter over all layers --------------------------------------------------------


@dataclass(frozen=True)
class _Fit:
    name: str
    parameter: float
    share: float


def _initial_left(pairs: dict[str, Pair], weight: float) -> Law:
    return {
        name: (
            (1 - weight) * pair.precise_mean,
            weight + (1 - weight) * pair.precise_var,
        )
        for name, pair in pairs.items()
    }


def _scaled(pairs: dict[str, Pair], factor: float) -> Law:
    return {n: (p.precise_mean * factor, p.precise_var * factor) for n, p in pairs.items()}


def _power(pairs: dict[str, Pair], power: float) -> Law:
    return {n: (p.precise_mean, p.precise_var.clamp_min(1e-30) ** power) for n, p in pairs.items()}


def _by_law(case: Case) -> Finding | None:
    pairs = case.pairs
    fits = [
        _Fit("momentum_too_small", a, explained(pairs, _initial_left(pairs, a)))
        for a in _weights(pairs)
    ]
    ratios = torch.cat([pair.log_ratio() for pair in pairs.values()])
    factor = float(ratios.median().exp())
    fits.append(_Fit("common_factor", factor, explained(pairs, _scaled(pairs, factor))))
    for power in (0.5, -1.0, -0.5, 2.0):
        fits.append(_Fit("not_a_variance", power, explained(pairs, _power(pairs, power))))
    best = max(fits, key=lambda fit: fit.share)
    if best.share < EXPLAINED:
        return None
    names = case.worst()
    evidence: dict[str, float | str] = {"explained share": best.share, **case.in_numbers()}
    if best.name == "momentum_too_small":
        if best.parameter < INITIAL:
            return None
        updates = [int(c) for c in _counts(case)]
        evidence |= {"initial weight": best.parameter, "updates": max(updates, default=0)}
        return Finding(
            best.name, _severity(case, defect=best.parameter > 0.1), names,
            f"The statistics still hold {100 * best.parameter:.1f} % of their initial 0 and 1 "
            f"after {max(updates, default=0)} updates, in all layers alike "
            f"({100 * best.share:.0f} % of the distance): {case.said()}.",
            evidence,
            f"{RECALIBRATE}; a larger momentum, or more steps: momentum * updates >= 5",
        )  # fmt: skip
    if best.name == "common_factor":
        evidence["factor"] = best.parameter
        return Finding(
            best.name, _severity(case, defect=True), names,
            f"Means and variances of all layers are {best.parameter:.3g} times the precise ones "
            f"({100 * best.share:.0f} % of the distance), as Caffe's blobs before the division by "
            f"their scale factor: {case.said()}.",
            evidence, f"divide by the factor (normlab.surgery.translate), or {RECALIBRATE}",
        )  # fmt: skip
    evidence["power"] = best.parameter
    kinds = {0.5: "standard deviations", -1.0: "inverse variances", -0.5: "inverse deviations"}
    return Finding(
        best.name, _severity(case, defect=True), names,
        f"running_var holds {kinds.get(best.parameter, 'squared variances')}: the precise variance "
        f"to the power {best.parameter:g} ({100 * best.share:.0f} % of the distance); "
        f"{case.said()}.",
        evidence, f"convert the checkpoint again (normlab.surgery.translate), or {RECALIBRATE}",
    )  # fmt: skip


def _weights(pairs: dict[str, Pair]) -> Iterable[float]:
    """Candidates for what the initial values weigh: what each layer's channels say, at its median.

    From the variances, (v - v_p) / (1 - v_p), where 1 and v_p differ by a tenth at least.
    """
    found = []
    for pair in pairs.values():
        keep = pair.mask & ((pair.precise_var - 1).abs() > 0.1)
        if keep.any():
            ratio = (pair.var - pair.precise_var)[keep] / (1 - pair.precise_var)[keep]
            found.append(float(ratio.median()))
    between = [a for a in found if 0 < a < 1]
    if not between:
        return []
    middle = float(torch.tensor(between).median())
    return [middle, sum(between) / len(between)]


def _counts(case: Case) -> list[Tensor]:
    counts = [norm._buffers.get("num_batches_tracked") for norm in case.norms.values()]
    return [count for count in counts if count is not None]


# -- folded and still applied ---------------------------------------------------------------------


def _folded(case: Case) -> Finding | None:
    """Whether what reaches the norms has their own output's moments: mean bias, variance weight^2.

    So it is behind a convolution that the norm was folded into; batches that are normalized again
    leave it so at every layer.
    """
    apart = before = 0.0
    for name, pair in case.pairs.items():
        layer = case.forwards.layers[name]
        if layer.weight is None or layer.bias is None:
            return None
        own = pair.precise_var.sqrt()
        weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
        off = ((pair.precise_mean - bias) / own).square() + (own - weight.abs()).square() / own**2
        apart += float(off[pair.mask].clamp_max(25).mean())
        before += float(pair.distance().clamp_max(25).mean())
    if apart > (1 - EXPLAINED) * before:
        return None
    return Finding(
        "fused_layers", _severity(case, defect=True), list(case.pairs),
        "What reaches the batch norms already has the mean and the variance of their output: they "
        f"were folded into the layers before them, and are applied again; {case.said()}.",
        {"distance from folded": apart / len(case.pairs), "distance": case.far,
         **case.in_numbers()},
        "replace the norms by nn.Identity (normlab.surgery.fuse does), or load the weights from "
        "before the fusion",
    )  # fmt: skip


# -- short by (n - 1) / n -------------------------------------------------------------------------


def _biased(case: Case) -> Finding | None:
    """A biased variance at an NBS b, against the unbiased one at any: only the variances count."""
    pairs = case.pairs
    sizes = [b for b in (2, 3, 4, 6, 8, 12, 16, 24, 32) if b <= max(case.nbs, 2)]

    def left(law: Any) -> float:
        return sum(float(p.distance(p.mean, law(p)).mean()) for p in pairs.values()) / len(pairs)

    def unbiased(b: int) -> float:
        return left(lambda p: p.moments.expected_variance(b, unbiased=True))

    def short(b: int) -> float:
        return left(lambda p: p.moments.expected_variance(b, unbiased=False))

    def long(b: int) -> float:
        return left(lambda p: _twice_corrected(p.moments, b))

    base = min([left(lambda p: p.precise_var), *map(unbiased, sizes)])
    value, b, kind = min((f(b), b, k) for k, f in (("short", short), ("long", long)) for b in sizes)
    few = [n for n, p in pairs.items() if b * p.moments.positions <= 16]
    if not few or base < ROUNDED or 1 - value / base < EXPLAINED:
        return None
    ratio = sum(pairs[n].ratio() for n in few) / len(few)
    words = "(n - 1) / n" if kind == "short" else "n / (n - 1)"
    evidence: dict[str, float | str] = {
        "NBS": b, "ratio in layers with few elements": ratio, "explained share": 1 - value / base,
        **case.in_numbers(),
    }  # fmt: skip
    return Finding(
        "biased_variance", _severity(case, defect=abs(ratio - 1) > 0.2), case.worst(few),
        f"Stored variances are {ratio:.2f} times the precise ones where a batch has few elements "
        f"({some(few)}), which is {words} at an NBS of {b}: {case.said()}.",
        evidence, RECALIBRATE,
    )  # fmt: skip


def _twice_corrected(moments: Moments, nbs: int) -> Tensor:
    elements = nbs * moments.positions
    return moments.expected_variance(nbs, unbiased=True) * (elements / (elements - 1))


# -- how far the memory reaches -------------------------------------------------------------------


def scatter(pairs: dict[str, Pair]) -> tuple[Tensor, Tensor]:
    """Squared errors of the stored means and variances of all layers, in units of a batch's."""
    means = torch.tensor([pair.in_spreads() for pair in pairs.values()], dtype=torch.float64)
    variances = torch.tensor([p.variances_in_spreads() for p in pairs.values()]).double()
    return means, variances


def told(case: Case) -> dict[str, float | str]:
    """What the statistics tell of the training: scatter, the NBS behind it, the time constant.

    The NBS from the noise is that of an average of the model's momentum over independent batches;
    weights that moved add to the noise, so it is a lower bound.
    """
    found: dict[str, float | str] = {"NBS": case.nbs}
    if not case.pairs:
        return found
    means, variances = scatter(case.pairs)
    momenta = [getattr(case.norms[name], "momentum", None) for name in case.pairs]
    momentum = next((float(m) for m in momenta if m), None)
    counts = [int(count) for count in _counts(case)]
    if not means.isnan().all():
        found["scatter of the stored means"] = float(means.nanmedian())
        found["scatter of the stored variances"] = float(variances.nanmedian())
    if momentum is not None and 0 < momentum < 1:
        usual = ema_noise(1 - momentum)
        found["scatter of an average of the model's momentum"] = usual
        found["time constant in updates"] = 1 / momentum
        noise = float(means.nanmedian())
        if noise > 0:
            found["NBS by the noise, at least"] = case.nbs * usual / noise
        if counts:
            found["updates"] = max(counts)
            found["weight of the initial values"] = (1 - momentum) ** max(counts)
    return found


def _memory(case: Case) -> Finding | None:
    """Whether all layers are off by what a batch or two scatter, no more and no less."""
    means, variances = scatter(case.pairs)
    if means.isnan().all():
        return None
    low, high = MEMORY
    middle = float(means.nanmedian())
    middle_var = float(variances.nanmedian())
    top = max(float(means.nanquantile(0.9)), float(variances.nanquantile(0.9)))
    usual = ema_noise(0.9)
    momenta = {
        m for m in (getattr(norm, "momentum", None) for norm in case.norms.values()) if m is not None
    }
    if momenta and min(momenta) >= 0.5:  # the model says so itself: less noise will do
        low = 2 * usual
    if not (low < middle < high and low / 2 < middle_var < high and top < 2 * high):
        return None
    evidence: dict[str, float | str] = {
        "means in batch scatters": middle, "variances in batch scatters": middle_var,
        "of an average with decay 0.9": usual, "NBS": case.nbs, **case.in_numbers(),
    }  # fmt: skip
    told = f" (the model's momentum is {max(momenta):g})" if momenta and max(momenta) >= 0.5 else ""
    return Finding(
        "momentum_reversed", _severity(case, defect=True), case.worst(),
        f"The stored means are off by {middle:.2f} of the variance of one batch's mean at an NBS "
        f"of {case.nbs}, at the first layer as at the last: they hold the last batch or two, not "
        f"an average (decay 0.9 leaves {usual:.2f}){told}; {case.said()}.",
        evidence,
        f"momentum=0.1 in torch is what others call 0.9; {RECALIBRATE}",
    )  # fmt: skip


# -- another eps ----------------------------------------------------------------------------------


def _eps(case: Case) -> Finding | None:
    """Candidates of the frameworks: whether one makes stored and precise statistics agree."""
    own = {name: layer.eps for name, layer in case.forwards.layers.items()}
    names = list(case.pairs)
    first, rest = names[0], names[1:]
    if not rest or case.pairs[first].far() > 0.2 * case.far:
        return None
    best, found = case.far, 0.0
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
    if 1 - best / case.far < EXPLAINED:
        return None
    used = max(set(own.values()), key=list(own.values()).count)
    return Finding(
        "eps_mismatch", _severity(case), case.worst(),
        f"The model has eps {used:g}, and its statistics fit {found:g}: with that the distance of "
        f"stored from precise ones falls from {case.far:.2g} to {best:.2g}; {case.said()}.",
        {"eps of the model": used, "eps that fits": found, "distance": case.far,
         "distance with it": best, **case.in_numbers()},
        f"eps={found:g} in the model's batch norms",
    )  # fmt: skip


def _far_with(case: Case) -> float:
    """Mean distance of the stored statistics from those of a pass over the first batches."""
    moments: dict[str, Moments] = {}

    def look(name: str, x: Tensor) -> None:
        moments.setdefault(name, Moments(x.size(1), x.device)).add(x, None)

    case.forwards.expect(len(case.some))
    case.forwards.run(case.some, batch=True, watch=look)
    each = [
        Pair(n, p.mean, p.var, moments[n], p.eps).far() for n, p in case.pairs.items() if n in moments
    ]
    return sum(each) / len(each)


# -- other inputs, other weights ------------------------------------------------------------------


def _domain(case: Case, target: dict[str, Moments] | None) -> Finding | None:
    """Whether the first layer, in front of which no norm is, shows other inputs."""
    names = list(case.pairs)
    first = case.pairs[names[0]]
    rest = torch.tensor([case.pairs[name].far() for name in names[1:]] or [0.0])
    typical = float(rest.median())
    shifted, share = _as_of_a_shift(case, first)
    near = None
    if target is not None:
        pairs = {n: Pair(n, p.mean, p.var, target[n], p.eps) for n, p in case.pairs.items()
                 if n in target}  # fmt: skip
        near = sum(pair.far() for pair in pairs.values()) / max(len(pairs), 1)
    of_target = near is not None and near < (1 - EXPLAINED) * case.far
    if not (of_target or shifted or (first.far() > typical and first.far() > ROUNDED)):
        return None
    evidence: dict[str, float | str] = {
        "distance of the first layer": first.far(), "median of the others": typical,
        "share of the first layer's shift that shifted inputs explain": share, **case.in_numbers(),
    }  # fmt: skip
    words = f"The first layer, {first.name}, is off by {first.in_deviations():.2f} deviations and "
    words += f"its variance {first.ratio():.2f} times the precise one"
    if of_target and near is not None:
        evidence["distance from the target's"] = near
        words = (
            f"The statistics are those of the target (distance {near:.2g}), not of the data "
            f"({case.far:.2g})"
        )
    elif shifted:
        words += f", and {100 * share:.0f} % of the shift is what a constant added to the inputs is"
    else:
        words += ", more than the layers behind it, which normalize again"
    return Finding(
        "other_domain", _severity(case), [first.name, *(n for n in case.worst() if n != first.name)],
        f"{words}: other inputs, or others' preprocessing; {case.said()}.", evidence,
        f"{RECALIBRATE} on the data that the model will meet; compare the preprocessing",
    )  # fmt: skip


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
    fitted = directions @ torch.linalg.lstsq(directions, shift[:, None], driver="gelsd").solution
    share = 1 - float((shift - fitted[:, 0]).square().sum() / shift.square().sum().clamp_min(1e-300))
    beyond = first.in_spreads()
    return share > EXPLAINED and beyond > MEMORY[1], share


def _responses(case: Case, name: str) -> Tensor | None:
    """(C, K): what a constant 1 in each of K input channels adds to the means of that layer."""
    leaves, tree = pytree.tree_flatten(case.some[0])
    place = next((i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim()), -1)
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


def _averaged(case: Case) -> Finding | None:
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
        "averaged_weights", _severity(case), case.worst(),
        f"The weights are the average of those of the {len(parts)} other checkpoints, and the "
        f"statistics are not those of the average: {case.said()}.",
        {"checkpoints": len(parts), "distance": case.far, **case.in_numbers()},
        "normlab recalibrate --average, which estimates anew after averaging",
    )  # fmt: skip


def _stale(case: Case) -> Finding:
    names = case.worst()
    pairs = list(case.pairs.values())
    return Finding(
        "stale_statistics", _severity(case), names,
        f"Every layer is off, {names[0]} most (variance {case.pairs[names[0]].ratio():.2f} times "
        f"the precise one) and the first one less than most: the weights moved after the "
        f"statistics were made, by training, averaging or copying; {case.said()}.",
        {"distance": case.far, "distance of the first layer": pairs[0].far(), **case.in_numbers()},
        RECALIBRATE,
    )  # fmt: skip
