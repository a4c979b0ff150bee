"""Causes that predict all layers' statistics from the precise ones by a law of one parameter.

The law whose prediction takes away the distance (`comparison.explained`) is the cause: so much of
the initial values, one factor on all, a power of the variances, a bias of (n - 1) / n, or no
parameter: what reaches the norms is their own output.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from normlab.diagnose.case import Case, Numbers
from normlab.diagnose.comparison import Pair, explained
from normlab.diagnose.facts import some
from normlab.diagnose.findings import RECALIBRATE, Finding
from normlab.diagnose.moments import Moments
from normlab.diagnose.thresholds import EXPLAINED, INITIAL, ROUNDED

__all__ = ["biased", "folded", "one_parameter"]

Law = dict[str, tuple[Tensor, Tensor]]


def folded(case: Case) -> Finding | None:
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
        "fused_layers", case.severity(defect=True), list(case.pairs),
        "What reaches the batch norms already has the mean and the variance of their output: they "
        f"were folded into the layers before them, and are applied again; {case.said()}.",
        {"distance from folded": apart / len(case.pairs), "distance": case.far,
         **case.in_numbers()},
        "replace the norms by nn.Identity (`normlab.surgery.fuse` does), or load the weights from "
        "before the fusion",
    )  # fmt: skip


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


def _scaled(pairs: dict[str, Pair], factor: float, means: float | None = None) -> Law:
    shift = factor if means is None else means
    return {n: (p.precise_mean * shift, p.precise_var * factor) for n, p in pairs.items()}


def _power(pairs: dict[str, Pair], power: float) -> Law:
    return {n: (p.precise_mean, p.precise_var.clamp_min(1e-30) ** power) for n, p in pairs.items()}


def one_parameter(case: Case) -> Finding | None:
    pairs = case.pairs
    fits = [
        _Fit("momentum_too_small", a, explained(pairs, _initial_left(pairs, a)))
        for a in _weights(pairs)
    ]
    ratios = torch.cat([pair.log_ratio() for pair in pairs.values()])
    factor = float(ratios.median().exp())
    scaled = explained(pairs, _scaled(pairs, factor))
    if scaled > explained(pairs, _scaled(pairs, factor, means=1)):  # else the means say no
        fits.append(_Fit("common_factor", factor, scaled))
    for power in (0.5, -1.0, -0.5, 2.0):
        fits.append(_Fit("not_a_variance", power, explained(pairs, _power(pairs, power))))
    best = max(fits, key=lambda fit: fit.share)
    if best.share < EXPLAINED:
        return None
    names = case.worst()
    evidence: Numbers = {"explained share": best.share, **case.in_numbers()}
    if best.name == "momentum_too_small":
        if best.parameter < INITIAL:
            return None
        updates = [int(c) for c in case.counts]
        evidence |= {"initial weight": best.parameter, "updates": max(updates, default=0)}
        return Finding(
            best.name, case.severity(defect=best.parameter > 0.1), names,
            f"The statistics still hold {100 * best.parameter:.1f} % of their initial 0 and 1 "
            f"after {max(updates, default=0)} updates, in all layers alike "
            f"({100 * best.share:.0f} % of the distance): {case.said()}.",
            evidence,
            f"{RECALIBRATE}; a larger momentum, or more steps: momentum * updates >= 5",
        )  # fmt: skip
    if best.name == "common_factor":
        evidence["factor"] = best.parameter
        return Finding(
            best.name, case.severity(defect=True), names,
            f"Means and variances of all layers are {best.parameter:.3g} times the precise ones "
            f"({100 * best.share:.0f} % of the distance), as Caffe's blobs before the division by "
            f"their scale factor: {case.said()}.",
            evidence, f"divide by the factor (`normlab.surgery.translate`), or {RECALIBRATE}",
        )  # fmt: skip
    evidence["power"] = best.parameter
    kinds = {0.5: "standard deviations", -1.0: "inverse variances", -0.5: "inverse deviations"}
    return Finding(
        best.name, case.severity(defect=True), names,
        f"running_var holds {kinds.get(best.parameter, 'squared variances')}: the precise variance "
        f"to the power {best.parameter:g} ({100 * best.share:.0f} % of the distance); "
        f"{case.said()}.",
        evidence, f"convert the checkpoint again (`normlab.surgery.translate`), or {RECALIBRATE}",
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


def biased(case: Case) -> Finding | None:
    """A biased variance at an NBS b, against the unbiased one at any: only the variances count."""
    pairs = case.pairs
    sizes = [b for b in (2, 3, 4, 6, 8, 12, 16, 24, 32) if b <= max(case.nbs, 2)]

    def left(law: Any) -> float:
        return sum(float(p.distance(p.mean, law(p)).mean()) for p in pairs.values()) / len(pairs)

    def unbiased(b: int) -> float:
        return left(lambda p: _of_batches(p.moments, b))

    def short(b: int) -> float:
        return left(lambda p: _of_batches(p.moments, b) * (1 - 1 / (b * p.moments.positions)))

    def long(b: int) -> float:
        return left(lambda p: _of_batches(p.moments, b) / (1 - 1 / (b * p.moments.positions)))

    base = min([left(lambda p: p.precise_var), *map(unbiased, sizes)])
    value, b, kind = min((f(b), b, k) for k, f in (("short", short), ("long", long)) for b in sizes)
    few = [n for n, p in pairs.items() if b * p.moments.positions <= 16]
    if not few or base < ROUNDED or 1 - value / base < EXPLAINED:
        return None
    ratio = sum(pairs[n].ratio() for n in few) / len(few)
    words = "(n - 1) / n" if kind == "short" else "n / (n - 1)"
    evidence: Numbers = {
        "NBS": b, "ratio in layers with few elements": ratio, "explained share": 1 - value / base,
        **case.in_numbers(),
    }  # fmt: skip
    return Finding(
        "biased_variance", case.severity(defect=abs(ratio - 1) > 0.2), case.worst(few),
        f"Stored variances are {ratio:.2f} times the precise ones where a batch has few elements "
        f"({some(few)}), which is {words} at an NBS of {b}: {case.said()}.",
        evidence, RECALIBRATE,
    )  # fmt: skip


def _of_batches(moments: Moments, nbs: int) -> Tensor:
    """The mean unbiased variance of batches of that NBS: as it was, where they had it; else of
    random ones. The halves of a pair that was normalized together are no two random samples."""
    if nbs == moments.group_size:
        return moments.variances.mean
    return moments.expected_variance(nbs)
