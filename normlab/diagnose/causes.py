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

import math
from collections.abc import Iterator

from normlab.diagnose import laws, origins
from normlab.diagnose.case import Case, Numbers
from normlab.diagnose.comparison import noise, scatter
from normlab.diagnose.findings import RECALIBRATE, Finding
from normlab.diagnose.moments import Moments
from normlab.diagnose.thresholds import FAR, MEMORY, NOISY, ROUNDED
from normlab.population.ema import ema_noise

__all__ = ["cause", "told"]


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
    for look in (laws.folded, laws.one_parameter, laws.biased, _memory):
        found = look(case)
        if found is not None:
            yield found
            return
    alone = _noise_alone(case)
    if alone and not case.stored_costs:
        return
    found = origins.another_eps(case) or origins.averaged(case)
    if found is None and not alone and (case.stored_costs or case.far > FAR / 2):
        found = origins.other_domain(case, target) or origins.stale(case)
    if found is not None:
        yield found


def _noise_alone(case: Case) -> bool:
    """Whether the statistics are as near as an average of batches gets.

    What they cost then is the price of every such average, and no sign of weights or inputs that
    have changed: half of the layers are within NOISY times its noise, and none is beyond it.
    """
    middles = [float(found.nanmedian()) for found in scatter(case.pairs)]
    if all(math.isnan(middle) for middle in middles):
        return False
    near = all(not middle > NOISY * noise() for middle in middles)
    return near and not any(pair.beyond_noise() for pair in case.pairs.values())


def told(case: Case) -> Numbers:
    """What the statistics tell of the training: scatter, the NBS behind it, the time constant.

    The NBS from the noise is that of an average of the model's momentum over independent batches;
    weights that moved add to the noise, so it is a lower bound.
    """
    found: Numbers = {"NBS": case.nbs}
    if not case.pairs:
        return found
    means, variances = scatter(case.pairs)
    momenta = [getattr(case.norms[name], "momentum", None) for name in case.pairs]
    momentum = next((float(m) for m in momenta if m), None)
    counts = [int(count) for count in case.counts]
    if not means.isnan().all():
        found["scatter of the stored means"] = float(means.nanmedian())
        found["scatter of the stored variances"] = float(variances.nanmedian())
    if momentum is not None and 0 < momentum < 1:
        usual = ema_noise(1 - momentum)
        found["scatter of an average of the model's momentum"] = usual
        found["time constant in updates"] = 1 / momentum
        noise = float(means.nanmedian())
        if 0 < noise < MEMORY[1]:  # else it is no noise
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
    usual = noise()
    momenta = {
        m
        for m in (getattr(norm, "momentum", None) for norm in case.norms.values())
        if m is not None
    }
    if momenta and min(momenta) >= 0.5:  # the model says so itself: less noise will do
        low = 2 * usual
    if not (low < middle < high and low / 2 < middle_var < high and top < 2 * high):
        return None
    evidence: Numbers = {
        "means in batch scatters": middle, "variances in batch scatters": middle_var,
        "of an average with decay 0.9": usual, "NBS": case.nbs, **case.in_numbers(),
    }  # fmt: skip
    told = f" (the model's momentum is {max(momenta):g})" if momenta and max(momenta) >= 0.5 else ""
    return Finding(
        "momentum_reversed", case.severity(defect=True), case.worst(),
        f"The stored means are off by {middle:.2f} of the variance of one batch's mean at an NBS "
        f"of {case.nbs}, at the first layer as at the last: they hold the last batch or two, not "
        f"an average (decay 0.9 leaves {usual:.2f}){told}; {case.said()}.",
        evidence,
        f"`momentum=0.1` in torch is what others call 0.9; {RECALIBRATE}",
    )  # fmt: skip
