"""`diagnose`: a trained model's batch norms measured on data, and what is wrong with them."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from torch import Tensor, nn

from normlab.diagnose import causes, composition, curves, domains, facts, training
from normlab.diagnose.case import Case, Numbers
from normlab.diagnose.comparison import Pair
from normlab.diagnose.findings import Finding, verdict
from normlab.diagnose.forwards import Forwards, Losses, half, rows, size_of
from normlab.diagnose.layers import Layer, table
from normlab.diagnose.live import watch
from normlab.diagnose.moments import Moments, of_samples
from normlab.diagnose.thresholds import HELD_SAMPLES
from normlab.population import Population
from normlab.subject import Scoring

__all__ = ["Diagnosis", "diagnose"]


@dataclass(frozen=True)
class Diagnosis:
    """What was found: problems first.

    layers: a row for every batch norm that a forward reached, the furthest from precise first.
    scores: loss and error (in [0, 1]) by data ("train", "test", "target") and statistics ("stored",
    "precise", "batch", "adapted"); NaN without labels. curves: by what they vary, "samples" and
    "batch". facts: what the statistics tell besides, such as the NBS that they were made with.
    """

    findings: list[Finding]
    layers: list[Layer]
    scores: dict[tuple[str, str], dict[str, float]]
    curves: dict[str, curves.Curve]
    facts: Numbers = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """In one line."""
        return verdict(self.findings)

    @property
    def healthy(self) -> bool:
        """Whether there is no problem; notices there may be."""
        return not any(finding.severity == "problem" for finding in self.findings)


def diagnose(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    test: Iterable[Any] | None = None,
    target: Iterable[Any] | None = None,
    scoring: Scoring | None = None,
    optimizer: Mapping[str, Any] | None = None,
    states: Sequence[Mapping[str, Tensor]] = (),
    nbs: int | None = None,
    progress: bool = True,
) -> Diagnosis:
    """Measure the batch norms of `model` on data and say what is wrong with them, and the cure.

        found = diagnose(model, loader)
        print(found.verdict)

    Compares the stored statistics with precise ones (those of the data under the present weights)
    and with batch statistics, layer by layer and by what they cost; names the cause where they
    differ; looks for defects of buffers, modes and uses; and estimates how many samples this
    model's statistics need. "problem": it costs something that was measured, or is a defect
    whatever it costs.

    The model is copied: it, its modes and the random state stay as they are. Forwards are in eval
    mode without gradients, except one training step of a copy on 16 samples. Memory does not grow
    with the number of batches: of each layer and channel a few numbers are kept, and some 500
    samples.

    Args:
        model: with its checkpoint loaded, on the device of the batches.
        batches: of the training data as random draws, without augmentation: a list or a loader,
            gone through several times, the same each time. Eight batches at least tell how far the
            statistics of a batch scatter.
        test: held-out batches, for the losses alone.
        target: batches of another domain, of which no label is needed.
        scoring: how to run and to judge the model (`normlab.subject.Scoring`); default:
            cross-entropy and top-1 of (x, y).
        optimizer: the optimizer's state_dict, for what weight decay reached.
        states: state_dicts of other checkpoints: of the other ranks of the training, or of the
            parts whose average the model is.
        nbs: samples that shared statistics in training; default: a batch.
        progress: a bar over all forwards, where there is a terminal.

    Raises ValueError for batches that can be passed over only once, for none, and for an `nbs`
    below 2 or above a batch.
    """
    _check_again(batches, test, target)
    forwards = Forwards(model, scoring or Scoring(), progress=progress)
    try:
        return _diagnose(model, forwards, batches, test, target, optimizer, states, nbs)
    finally:
        forwards.bar.close()


def _check_again(*sources: Iterable[Any] | None) -> None:
    for source in sources:
        if source is not None and iter(source) is source:
            raise ValueError(
                "a diagnosis passes over its batches several times: give a list or a loader, not "
                "an iterator that is spent after one pass"
            )


def _diagnose(
    model: nn.Module,
    forwards: Forwards,
    batches: Iterable[Any],
    test: Iterable[Any] | None,
    target: Iterable[Any] | None,
    optimizer: Mapping[str, Any] | None,
    states: Sequence[Mapping[str, Tensor]],
    nbs: int | None,
) -> Diagnosis:
    some = list(rows(batches, HELD_SAMPLES))
    if not some:
        raise ValueError("a diagnosis needs at least one batch; there was none")
    size = size_of(some[0])
    if nbs is not None and not 2 <= nbs <= size:
        raise ValueError(f"nbs is 2 to {size}, the samples of a batch, not {nbs}")
    for source in (*[batches] * 4, test, test, test, target, target, target):
        forwards.expect(_length(source))
    snapshots = curves.Snapshots()
    moments, halves, with_batch, uses = _survey(forwards, batches, nbs, snapshots)
    precise = _statistics(forwards, moments)
    # A batch is scored with statistics that it is no part of, as it is with the stored ones.
    others = [_statistics(forwards, part) for part in reversed(halves) if part]
    live = watch(model, some[0], forwards.scoring)
    held = forwards.run(batches)
    structure = domains.Structure()
    forwards.run(batches, statistics=precise, watch=structure.look, after=structure.next_batch)
    case = Case(
        model, forwards, batches, some, nbs or size, optimizer, states, live, uses, moments,
        {}, precise, held, forwards.run(batches, statistics=others), with_batch,
    )  # fmt: skip
    if test is not None:
        case.tested = forwards.run(test), forwards.run(test, statistics=precise)
    found = list(facts.buffers(case))
    case.pairs.update(_pairs(case))
    measured = None if target is None else domains.measure_target(forwards, target, precise)
    found += _findings(case, structure, measured)
    found.sort(key=lambda finding: finding.severity != "problem")
    scores = _scores(case, test, measured)
    curve = _curves(case, snapshots, test)
    return Diagnosis(found, table(case, measured), scores, curve, causes.told(case))


def _findings(
    case: Case, structure: domains.Structure, target: domains.Target | None
) -> Iterator[Finding]:
    """All but the buffers' defects. What follows from another finding is not one of its own."""
    yield from facts.structure(case)
    yield from training.weight_decay(case)
    of_ranks = list(training.ranks(case))
    composed = [*composition.leakage(case), *domains.mixed(case, structure)]
    reused = list(composition.reuse(case))
    if reused or case.stored_costs:  # which has a cause of its own, and it comes first
        composed = [finding for finding in composed if finding.severity == "problem"]
    yield from chain(of_ranks, composed, reused)
    if not any(finding.severity == "problem" for finding in composed):
        # Batches of two kinds are no random draws: their scatter tells nothing of what was stored.
        skip = of_ranks or any(finding.name == "mixed_domains" for finding in composed)
        why = [] if skip else list(causes.cause(case, target.moments if target else None))
        yield from why
        if not any(finding.name == "momentum_reversed" for finding in why):
            yield from facts.short_memory(case)
        if not reused and not any(f.name == "fused_layers" for f in why):
            yield from composition.gap(case)
    if target is not None:
        yield from domains.shift(case, target)


def _survey(
    forwards: Forwards, batches: Iterable[Any], nbs: int | None, snapshots: curves.Snapshots
) -> tuple[dict[str, Moments], list[dict[str, Moments]], Losses, Counter[str]]:
    """One pass under batch statistics: the moments of every layer, and the losses.

    Moments of all batches, and of each half of them.
    """
    moments: dict[str, Moments] = {}
    halves: list[dict[str, Moments]] = [{}, {}]
    uses: Counter[str] = Counter()
    seen = [0, 0]

    def look(name: str, x: Tensor) -> None:
        if seen[0] == 0:
            uses[name] += 1
        seen_here = of_samples(x)
        for kept in (moments, halves[half(seen[0])]):
            kept.setdefault(name, Moments(x.size(1), x.device)).include(*seen_here, nbs)

    def after(batch: Any) -> None:
        seen[0] += 1
        seen[1] += size_of(batch)
        snapshots.look(seen[0], seen[1], moments)

    losses = forwards.run(batches, batch=True, group_size=nbs, watch=look, after=after)
    return moments, halves, losses, uses


def _statistics(forwards: Forwards, moments: dict[str, Moments]) -> Population:
    return {n: moments[n].statistics() for n in forwards.estimated if n in moments}


def _pairs(case: Case) -> dict[str, Pair]:
    """Stored beside precise, of layers that have both and are used once in a forward."""
    found = {}
    for name, layer in case.forwards.layers.items():
        norm = case.norms.get(name)
        untracked = norm is None or norm._buffers.get("running_mean") is None
        skip = untracked or layer.frozen or name in case.broken or case.uses[name] > 1
        if skip or name not in case.moments:
            continue
        mean, var = layer.running_mean.double(), layer.running_var.double()
        pair = Pair(name, mean, var, case.moments[name], layer.eps)
        if bool(pair.mask.any()):
            found[name] = pair
    return {name: found[name] for name in case.moments if name in found}


def _length(source: Any) -> int:
    try:
        return len(source) if source is not None else 0
    except TypeError:  # known at the end of a pass
        return 0


def _scores(
    case: Case, test: Iterable[Any] | None, target: domains.Target | None
) -> dict[tuple[str, str], dict[str, float]]:
    all_losses = {
        ("train", "stored"): case.with_stored,
        ("train", "precise"): case.with_precise,
        ("train", "batch"): case.with_batch,
    }
    if test is not None:
        assert case.tested is not None
        all_losses["test", "stored"], all_losses["test", "precise"] = case.tested
        all_losses["test", "batch"] = case.forwards.run(test, batch=True, group_size=case.nbs)
    if target is not None:
        all_losses["target", "precise"] = target.stored
        all_losses["target", "adapted"] = target.adapted
    return {
        key: {"samples": losses.samples, "loss": losses.loss, "error": losses.error}
        for key, losses in all_losses.items()
        if losses.samples
    }


def _curves(
    case: Case, snapshots: curves.Snapshots, test: Iterable[Any] | None
) -> dict[str, curves.Curve]:
    """Over samples and over the samples of a batch, where there are labels to judge by."""
    if math.isnan(case.with_precise.loss) or not case.precise:
        return {}
    held = list(rows(case.batches if test is None else test, HELD_SAMPLES // 2))
    whole = (case.with_precise.samples, case.precise)
    sizes = [b for b in (2, 4, 8, 16, 32, 64, 128) if b <= size_of(case.some[0])]
    if any(moments.positions == 1 for moments in case.moments.values()):
        sizes = sizes[1:] or sizes  # two elements a channel are always at +-1
    some = list(rows(case.some, HELD_SAMPLES // 2))
    return {
        "samples": curves.by_samples(case.forwards, held, snapshots, whole),
        "batch": curves.by_batch(case.forwards, some, held, sizes),
    }
