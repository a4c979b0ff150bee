"""The verdict on every claim and fact of an experiment at one scale, as docs/claims.md says."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from normlab.experiment import PERCENT, Claim, Contrast, Fact
from normlab.report import papers
from normlab.report.given import DRAWS
from normlab.report.grid import Results
from normlab.report.statistics import Sample, holm

LEVEL = 0.05
"""What a wrong verdict may cost: 95 % intervals, and Holm's limit over the primary claims."""

SEEDS_OF_A_PRIMARY = 10

ROUNDING = 1e-12
"""Of the largest term of a sum: a standard deviation that rounding alone may leave."""

REPRODUCED, CONTRADICTED, NEGLIGIBLE = "reproduced", "contradicted", "negligible"
NOT_RESOLVED, NOT_RUN = "not resolved", "not run"
VERDICTS = (REPRODUCED, CONTRADICTED, NEGLIGIBLE, NOT_RESOLVED, NOT_RUN)
RESOLVED = (REPRODUCED, CONTRADICTED, NEGLIGIBLE)

HOLDS, FAILS = "holds", "fails"
"""Outcomes of a fact, besides NOT_RUN."""


@dataclass(frozen=True)
class Judged:
    """One contrast of a claim: in its unit within a seed, its own verdict and p-values."""

    label: str
    sample: Sample
    published: float
    """The same contrast of a source's numbers; nan without them."""
    verdict: str
    p_for: float
    p_against: float


@dataclass(frozen=True)
class Verdict:
    """A claim judged at one scale. The deciding contrast stands for it; `contrasts` has all."""

    claim: Claim
    scale: str
    verdict: str
    label: str
    n: int
    """Seeds of the deciding contrast (another one with fewer may make the claim exploratory)."""
    effect: float
    low: float
    high: float
    level: int
    """The interval's confidence in %: 90 where an equivalence is established by it, else 95."""
    p: float
    p_holm: float
    notes: tuple[str, ...]
    contrasts: tuple[Judged, ...]
    published: float = math.nan
    """The paper's effect: the deciding contrast of the numbers that one source printed, in the same
    sign and unit as `effect`; nan if none printed all of its terms."""

    @property
    def followup(self) -> str:
        """Where it is followed up, if it was contradicted and the file says so of this scale."""
        return self.claim.followup.get(self.scale, "") if self.verdict == CONTRADICTED else ""


def judge_direction(sample: Sample, margin: float) -> tuple[str, float, float]:
    """Verdict, p for and p against "the mean exceeds +margin".

    Each p is the smallest level at which the two-sided interval lies on that side: reproduced and
    contradicted are exactly "the 95 % interval lies above +margin" and "below -margin".
    """
    p_for = min(1.0, 2 * sample.p_above(margin))
    p_against = min(1.0, 2 * sample.p_below(-margin))
    if p_for <= LEVEL:
        return REPRODUCED, p_for, p_against
    if p_against <= LEVEL:
        return CONTRADICTED, p_for, p_against
    inside = p_inside(sample, margin, sides=2) <= LEVEL
    return (NEGLIGIBLE if inside else NOT_RESOLVED), p_for, p_against


def judge_equivalence(sample: Sample, margin: float) -> tuple[str, float, float]:
    """Verdict, p for and p against "the mean lies inside +-margin".

    For: two one-sided tests, which is the 90 % interval inside. Against: the 95 % interval outside.
    """
    p_for = p_inside(sample, margin, sides=1)
    outside = min(sample.p_above(margin), sample.p_below(-margin))
    p_against = min(1.0, 2 * outside)
    if p_for <= LEVEL:
        return REPRODUCED, p_for, p_against
    return (CONTRADICTED if p_against <= LEVEL else NOT_RESOLVED), p_for, p_against


def p_inside(sample: Sample, margin: float, *, sides: int) -> float:
    """Smallest level at which the interval lies inside +-margin: one-sided (TOST) or two-sided."""
    return min(1.0, sides * max(sample.p_below(margin), sample.p_above(-margin)))


_KINDS: dict[str, Callable[[Sample, float], tuple[str, float, float]]] = {
    "direction": judge_direction,
    "equivalence": judge_equivalence,
    "shape": judge_direction,  # of every contrast
}


def judge(claim: Claim, results: Results) -> Verdict:
    """One claim before Holm's correction.

    A claim holds if all its contrasts do (intersection-union: its p is their largest) and is
    contradicted if one of them is (its p is the smallest times their number: Bonferroni).
    """
    notes = []
    if older := edited(results):
        notes.append(f"exploratory: declared or edited after {older} of the runs")
    try:
        wanted = claim.contrasts(results.places)
        samples = [sampled(results, one) for one in wanted]
        theirs = [papers.effect(results, one) for one in wanted]
    except ValueError as error:
        return _empty(claim, results.scale, (str(error),), ())
    contrasts = tuple(
        Judged(one.label, sample, their, *_KINDS[claim.kind](sample, claim.margin))
        for one, sample, their in zip(wanted, samples, theirs, strict=True)
    )
    run = sum(one.sample.n > 0 for one in contrasts)
    if run < len(contrasts) or not contrasts:
        note = (f"{run} of {len(contrasts)} contrasts have runs",) if run else ()
        return _empty(claim, results.scale, note, contrasts)

    found = {one.verdict for one in contrasts}
    if CONTRADICTED in found:
        verdict, decides = CONTRADICTED, min(contrasts, key=lambda one: one.p_against)
    else:
        verdict = found.pop() if len(found) == 1 else NOT_RESOLVED
        if claim.kind == "shape" and verdict == NEGLIGIBLE:
            verdict = NOT_RESOLVED
        decides = max(contrasts, key=lambda one: one.p_for)
    p = {
        REPRODUCED: decides.p_for,
        CONTRADICTED: min(1.0, len(contrasts) * decides.p_against),
        NEGLIGIBLE: p_inside(decides.sample, claim.margin, sides=2),
    }.get(verdict, min(1.0, decides.p_for, len(contrasts) * decides.p_against))
    if len(contrasts) > 1:
        held = sum(one.verdict == REPRODUCED for one in contrasts)
        notes.append(f"{held} of {len(contrasts)} contrasts hold; shown: {decides.label}")
    fewest = min(one.sample.n for one in contrasts)
    if any(one.sample.still for one in contrasts):
        notes.append("no spread over the seeds gives no interval")
    if fewest < 2:
        notes.append("one seed gives no interval")
    level = 90 if claim.kind == "equivalence" and verdict != CONTRADICTED else 95
    low, high = decides.sample.interval(level / 100)
    drawn = results.repeated == DRAWS
    exploratory = not claim.primary or fewest < SEEDS_OF_A_PRIMARY or edited(results) > 0 or drawn
    if drawn:
        notes.append(f"exploratory: n counts {DRAWS}, and no trainings")
    elif claim.primary and fewest < SEEDS_OF_A_PRIMARY:
        of = f"{SEEDS_OF_A_PRIMARY} {results.repeated}"
        notes.append(f"exploratory: {fewest} of the {of} of a primary claim")
    return Verdict(
        claim=claim,
        scale=results.scale,
        verdict=verdict,
        label="exploratory" if exploratory else "primary",
        n=decides.sample.n,
        effect=decides.sample.mean,
        low=low,
        high=high,
        level=level,
        p=p,
        p_holm=math.nan,
        notes=tuple(notes),
        contrasts=contrasts,
        published=decides.published,
    )


def sampled(results: Results, wanted: Contrast) -> Sample:
    """A contrast over the seeds.

    Numbers of a probe or a task that are each the same in every seed are counts or closed forms: of
    them a difference without spread is exact. Errors never are, however they were measured. What
    rounding leaves of a sum is no spread.

    Raises ValueError when a term names no single point of the grid.
    """
    sums = results.contrast(wanted)
    sample = Sample.of(sums.values())
    columns = [results.experiment.protocols[protocol] for _, protocol, _ in wanted.terms]
    terms = [
        [factor * results.numbers(results.place(cell), protocol)[seed] for seed in sums]
        for factor, protocol, cell in wanted.terms
    ]
    largest = max((abs(value) for values in terms for value in values), default=0.0)
    if sample.n < 2 or sample.sd > ROUNDING * largest:
        return sample
    counted = all(one.column == "value" and one.unit != PERCENT for one in columns)
    return replace(sample, sd=0.0, exact=counted and all(len(set(of)) == 1 for of in terms))


@dataclass(frozen=True)
class Outcome:
    """A fact at one scale: whether it holds in every seed, and how far off the worst one is."""

    fact: Fact
    scale: str
    outcome: str
    n: int
    """Seeds of the contrast that has fewest."""
    worst: float
    """The largest absolute contrast over seeds and contrasts, in the fact's unit."""
    note: str = ""


def check(fact: Fact, results: Results) -> Outcome:
    """Whether an identity holds: every contrast within the tolerance, in every seed."""
    try:
        wanted = fact.contrasts(results.places)
        found = [results.contrast(one) for one in wanted]
    except ValueError as error:
        return Outcome(fact, results.scale, NOT_RUN, 0, math.nan, str(error))
    fewest = min(map(len, found))
    if not fewest:
        return Outcome(fact, results.scale, NOT_RUN, 0, math.nan)
    worst = max(abs(value) for values in found for value in values.values())
    outcome = HOLDS if worst <= fact.tolerance else FAILS
    return Outcome(fact, results.scale, outcome, fewest, worst)


def judge_all(every: Sequence[Results]) -> list[list[Verdict]]:
    """Every claim of the experiments at one scale, Holm's correction over all their primary ones.

    All primary claims of an experiment count in the correction, those without runs with p = 1, as
    soon as a contrast of one of them has a seed: before, the experiment asks nothing here, also
    where it shares runs with another. A verdict that does not survive becomes "not resolved" and
    says what it was.
    """
    verdicts = [[judge(one, found) for one in found.experiment.claims.values()] for found in every]
    primary = [
        (i, j)
        for i, here in enumerate(verdicts)
        if any(each.sample.n for one in here if one.claim.primary for each in one.contrasts)
        for j, one in enumerate(here)
        if one.claim.primary
    ]
    adjusted = holm([verdicts[i][j].p for i, j in primary])
    for (i, j), p_holm in zip(primary, adjusted, strict=True):
        verdicts[i][j] = corrected(verdicts[i][j], p_holm)
    return verdicts


def corrected(one: Verdict, p_holm: float) -> Verdict:
    """The verdict after Holm's correction."""
    if one.verdict == NOT_RUN:
        return one
    if one.verdict in RESOLVED and p_holm > LEVEL:
        note = f"{one.verdict} alone, but does not survive Holm's correction"
        one = replace(one, verdict=NOT_RESOLVED, notes=(note, *one.notes))
    return replace(one, p_holm=p_holm)


def edited(results: Results) -> int:
    """Judged runs made before the claims were declared as they stand.

    A run records `experiment:digest` of every experiment there was: experiments may share it.
    """
    declared = f"{results.experiment.name}:{results.experiment.claims_digest(results.scale)}"
    return sum(declared not in row["claims"].split() for row in results.rows)


def _empty(
    claim: Claim, scale: str, notes: tuple[str, ...], contrasts: tuple[Judged, ...]
) -> Verdict:
    nan = math.nan
    label = "primary" if claim.primary else "exploratory"
    return Verdict(claim, scale, NOT_RUN, label, 0, nan, nan, nan, 95, 1.0, nan, notes, contrasts)
