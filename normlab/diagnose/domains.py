"""Other data: what adapting to a target gains, and whether the training data are of two kinds."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from normlab.diagnose.case import Case, costs
from normlab.diagnose.comparison import Pair
from normlab.diagnose.findings import ADAPT, RECALIBRATE, Finding
from normlab.diagnose.forwards import Losses, size_of, take
from normlab.diagnose.moments import Moments, of_samples
from normlab.diagnose.thresholds import APART, BATCHES, BIMODAL, FAR, HELD_SAMPLES

__all__ = ["Structure", "Target", "measure_target", "mixed", "shift", "split"]


class Structure:
    """How samples and batches differ at every layer with population statistics.

    batches: the spread of batch means beside that of samples, by layer; samples: the means of the
    first HELD_SAMPLES samples, (N, C) float32.
    """

    def __init__(self) -> None:
        self.samples: dict[str, list[Tensor]] = {}
        self.moments: dict[str, Moments] = {}
        self._left = HELD_SAMPLES

    def look(self, name: str, x: Tensor) -> None:
        """Called with every layer's input."""
        self.moments.setdefault(name, Moments(x.size(1), x.device)).add(x, None)
        if self._left > 0:
            means, _, _ = of_samples(x[: self._left])
            self.samples.setdefault(name, []).append(means.float())

    def next_batch(self, batch: Any) -> None:
        """Called after every batch."""
        self._left -= size_of(batch)

    def between(self) -> dict[str, float]:
        """Variance of the batches' means in units of what random batches have: mean over channels.

        1 for random draws, up to the number of samples in a batch; only of layers with enough of
        them.
        """
        found = {}
        for name, moments in self.moments.items():
            if moments.groups.count >= BATCHES:
                one = moments.samples.var / moments.group_size
                alive = one > 1e-12
                if alive.any():
                    found[name] = float((moments.groups.var[alive] / one[alive]).mean())
        return found


class Target:
    """What the layers see of a target, and what it costs with each statistics."""

    def __init__(self, moments: dict[str, Moments], stored: Losses, adapted: Losses) -> None:
        self.moments, self.stored, self.adapted = moments, stored, adapted
        self.far: dict[str, float] = {}


def measure_target(case_forwards: Any, target: Iterable[Any], precise: Any) -> Target:
    """Three passes over the target: its statistics, then the losses with the training data's
    (`precise`) and with its own."""
    moments: dict[str, Moments] = {}

    def look(name: str, x: Tensor) -> None:
        moments.setdefault(name, Moments(x.size(1), x.device)).add(x, None)

    case_forwards.run(target, batch=True, watch=look)
    adapted = {n: moments[n].statistics() for n in case_forwards.estimated if n in moments}
    before = case_forwards.run(target, statistics=precise)
    return Target(moments, before, case_forwards.run(target, statistics=adapted))


def shift(case: Case, target: Target) -> Iterator[Finding]:
    """How far the target's statistics are from the data's, and what its own gain on it."""
    for name, moments in target.moments.items():
        own = case.moments.get(name)
        if own is not None:
            found = own.statistics()
            target.far[name] = Pair(
                name, found.mean, found.var, moments, case.forwards.layers[name].eps
            ).far()
    far = sum(target.far.values()) / max(len(target.far), 1)
    labelled = target.stored.loss == target.stored.loss
    gains = costs(target.stored, target.adapted)
    if not (gains or far > FAR):
        return
    names = sorted(target.far, key=lambda name: -target.far[name])
    words = f"The target's statistics are {far:.2g} from the data's, most in {names[0]}"
    if labelled:
        words += (
            f"; on it the loss is {target.stored.loss:.3g} with the data's and "
            f"{target.adapted.loss:.3g} with its own, the error {100 * target.stored.error:.1f} % "
            f"and {100 * target.adapted.error:.1f} %"
        )
    yield Finding(
        "domain_shift", "problem" if gains else "notice", names, words + ".",
        {"distance": far, "loss": target.stored.loss, "loss adapted": target.adapted.loss,
         "error": target.stored.error, "error adapted": target.adapted.error},
        f"{ADAPT} (Adaptive BN: no labels are needed)" if gains or not labelled
        else "",
    )  # fmt: skip


def split(rows: Tensor) -> tuple[Tensor, float]:
    """Two kinds of samples (N, D), if there are: which each belongs to, and how well that tells.

    Along the first principal axis of the standardized columns, the cut that leaves the least
    variance within both sides; the share of the variance along the axis that it takes away.
    """
    spread = rows.std(0)
    rows = ((rows - rows.mean(0)) / spread.clamp_min(1e-12))[:, spread > 1e-9]
    if rows.size(0) < 4 or rows.size(1) == 0:
        return torch.zeros(len(rows), dtype=torch.bool), 0.0
    _, _, axes = torch.linalg.svd(rows, full_matrices=False)
    along = rows @ axes[0]
    ordered, places = along.sort()
    total = ordered.square().sum() - ordered.mean().square() * len(ordered)
    sums, n = ordered.cumsum(0), len(ordered)
    left = torch.arange(1, n, dtype=rows.dtype, device=rows.device)
    mean_left = sums[:-1] / left
    mean_right = (sums[-1] - sums[:-1]) / (n - left)
    between = left * (n - left) / n * (mean_left - mean_right).square()
    between[: n // 10], between[len(between) - n // 10 :] = 0, 0  # a few outliers are no domain
    cut = int(between.argmax())
    second = torch.zeros(n, dtype=torch.bool, device=rows.device)
    second[places[cut + 1 :]] = True
    return second, float(between[cut] / total)


def mixed(case: Case, structure: Structure) -> Iterator[Finding]:
    """Whether the data are of two kinds that one set of statistics does not serve.

    Kinds are looked for where batches are no random draws, else where the means of the samples fall
    into two groups. They are domains if statistics of each kind's own cost less than those of both:
    classes are two kinds as well, and statistics of their own cost more. Batches of two kinds are a
    notice whatever they cost: a network may have learnt both with one set of statistics.
    """
    kinds = _kinds(structure)
    if kinds is None:
        return
    layer, second, evidence = kinds
    gathered: list[list[Any]] = [[], []]
    start = 0
    for batch in case.some:
        own = second[start : start + size_of(batch)].cpu()
        start += len(own)
        for kind in (0, 1):
            places = (own == bool(kind)).nonzero().flatten()
            if len(places) > 1:
                gathered[kind].append(take(batch, places.to(case.forwards.device)))
    if not all(gathered):
        return
    case.forwards.expect(3 * sum(map(len, gathered)))
    apart, together = Losses(), Losses()
    for batches in gathered:
        moments: dict[str, Moments] = {}

        def look(name: str, x: Tensor, moments: dict[str, Moments] = moments) -> None:
            moments.setdefault(name, Moments(x.size(1), x.device)).add(x, None)

        case.forwards.run(batches, batch=True, watch=look)
        stats = {n: moments[n].statistics() for n in case.forwards.estimated if n in moments}
        apart.extend(case.forwards.run(batches, statistics=stats))
        together.extend(case.forwards.run(batches, statistics=case.precise))
    costly = costs(together, apart)
    if not costly and "between batches" not in evidence:
        return
    yield Finding(
        "mixed_domains", "problem" if costly else "notice", [layer],
        f"The data are of two kinds, plainest in {layer}, and one set of statistics serves both: "
        f"loss {together.loss:.3g} with it and {apart.loss:.3g} with each kind's own, error "
        f"{100 * together.error:.1f} % and {100 * apart.error:.1f} %.",
        {**evidence, "share of the second kind": float(second.double().mean()),
         "loss together": together.loss, "loss apart": apart.loss,
         "error together": together.error, "error apart": apart.error},
        'statistics by domain: `normlab.convert(model, "separate", num_domains=2)`, or a '
        f"checkpoint for each by {RECALIBRATE}",
    )  # fmt: skip


def _kinds(structure: Structure) -> tuple[str, Tensor, dict[str, float | str]] | None:
    """The layer that tells two kinds of the held samples apart best, and which each is of."""
    between = structure.between()
    if between and max(between.values()) > APART:
        layer = max(between, key=lambda name: between[name])
        means = structure.samples[layer]
        second, _ = split(torch.stack([batch.mean(0) for batch in means]).double())
        sizes = torch.tensor([len(batch) for batch in means], device=second.device)
        return layer, second.repeat_interleave(sizes), {"between batches": between[layer]}
    shares = {}
    for name, batches in structure.samples.items():
        shares[name] = split(torch.cat(batches).double())
    if not shares:
        return None
    layer = max(shares, key=lambda name: shares[name][1])
    second, share = shares[layer]
    return (layer, second, {"explained share": share}) if share > BIMODAL else None
