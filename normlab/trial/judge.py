"""What a diagnosis said of a case, beside what it was to say; and how often it was right."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import NormalDist

from normlab.diagnose import diagnose
from normlab.trial.case import Case, Fault
from normlab.trial.training import Trained

__all__ = ["Share", "Verdict", "alarms", "judge", "recall", "recognized", "wilson"]


@dataclass(frozen=True)
class Verdict:
    """One diagnosis.

    fault: "" for a healthy network, whose expected names are none. expected, problems, notices:
    names of findings. digest: of the data set. seconds: that the diagnosis took.
    """

    network: str
    fault: str
    pains: str
    seed: int
    data: str
    digest: str
    expected: tuple[str, ...]
    problems: tuple[str, ...]
    notices: tuple[str, ...]
    seconds: float

    @property
    def recognized(self) -> bool:
        """Whether anything was said to be wrong: a problem, or the fault's name in a notice."""
        return bool(self.problems) or self.named

    @property
    def named(self) -> bool:
        """Whether the fault was called by a right name, as a problem or in a notice."""
        return not {*self.expected}.isdisjoint(self.problems + self.notices)

    @property
    def besides(self) -> tuple[str, ...]:
        """The problems that were said to be there and have another name."""
        return tuple(name for name in self.problems if name not in self.expected)


def judge(case: Case, fault: Fault | None, of: Trained) -> Verdict:
    """Diagnose a case that was made of a network, with this fault or with none."""
    began = time.perf_counter()
    found = diagnose(
        case.model,
        case.batches,
        test=case.test,
        optimizer=case.optimizer,
        states=case.states,
        nbs=case.nbs,
        progress=False,
    ).findings
    said = {
        severity: tuple(f.name for f in found if f.severity == severity)
        for severity in ("problem", "notice")
    }
    return Verdict(
        of.network.name,
        fault.name if fault else "",
        fault.pains if fault else "",
        of.seed,
        of.material.name,
        of.material.digest,
        fault.expected if fault else (),
        said["problem"],
        said["notice"],
        time.perf_counter() - began,
    )


@dataclass(frozen=True)
class Share:
    """`hits` of `n` trials; as text with the 95 % interval of their probability."""

    hits: int
    n: int

    def __str__(self) -> str:
        low, high = wilson(self.hits, self.n)
        return f"{self.hits} of {self.n} (95 % interval {100 * low:.1f} to {100 * high:.1f} %)"


def recognized(verdicts: Sequence[Verdict]) -> Share:
    """The faults that a diagnosis saw, whatever it called them."""
    faulty = [v for v in verdicts if v.fault]
    return Share(sum(v.recognized for v in faulty), len(faulty))


def recall(verdicts: Sequence[Verdict]) -> Share:
    """The faults that a diagnosis called by a right name."""
    faulty = [v for v in verdicts if v.fault]
    return Share(sum(v.named for v in faulty), len(faulty))


def alarms(verdicts: Sequence[Verdict]) -> Share:
    """The healthy networks in which a diagnosis saw a problem."""
    healthy = [v for v in verdicts if not v.fault]
    return Share(sum(bool(v.problems) for v in healthy), len(healthy))


def wilson(hits: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """The score interval of a probability (Wilson 1927): all p with
    (hits / n - p)^2 <= z^2 p (1 - p) / n. Raises ValueError for no trials."""
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"{hits} of {n} trials")
    z = NormalDist().inv_cdf((1 + level) / 2)
    share = hits / n
    centre = share + z * z / (2 * n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    low, high = ((centre + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)
