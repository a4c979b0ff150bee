"""The columns of an experiment: what each of them reads from a run, in which unit.

An entry of ``protocols:`` names an evaluation (its error or its loss), several draws of one, or a
number that a probe or a task has measured. All become one number a run and epoch.
"""

import math
import statistics
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from normlab import protocols
from normlab.experiment.checks import items, mapping, refuse, text

PERCENT = "%"

MEASURES = {"error": PERCENT, "loss": "nats"}
"""What an evaluation measures, with its unit: the columns of ``evals.csv``."""


def jumps(curve: Sequence[float]) -> float:
    """Mean absolute difference between consecutive numbers; nan for fewer than two."""
    return statistics.fmean(abs(b - a) for a, b in pairwise(curve)) if curve[1:] else math.nan


def rise(curve: Sequence[float]) -> float:
    """The last number minus the lowest; nan for fewer than two."""
    return curve[-1] - min(curve) if curve[1:] else math.nan


OVER: dict[str, Callable[[Sequence[float]], float]] = {
    "jumps": jumps, "max": max, "mean": statistics.fmean, "rise": rise,
}  # fmt: skip
"""Ways to make one number of those over the epochs, in ascending order."""


@dataclass(frozen=True)
class Protocol:
    """One column: a number of every run. The rows it is read from are named `specs` there.

    `specs`: evaluations as runs record them, one for each draw, or ``<probe>.<quantity>``.
    `column`: of the table of runs: error, loss or value.
    `spread`: the standard deviation over the draws (n - 1) in place of their mean.
    `over`: one of ``OVER``; "" for the number of the last evaluated epoch or epochs.
    `task`: the number was measured by a task, whose last row counts at every scale.
    """

    label: str
    specs: tuple[str, ...]
    column: str
    unit: str
    spread: bool = False
    over: str = ""
    task: bool = False
    scales: tuple[str, ...] = ()
    """Where it is measured; () for everywhere."""

    def measured_at(self, scale: str) -> bool:
        """Whether a scale has it: what takes 1,000 images does not exist where there are fewer."""
        return not self.scales or scale in self.scales

    @property
    def probe(self) -> str:
        """The probe that measures it, "" for an evaluation and for a task's number."""
        return self.specs[0].partition(".")[0] if self.column == "value" and not self.task else ""

    @property
    def split(self) -> str:
        """The split that is evaluated, "" where nothing is."""
        return "" if self.column == "value" else protocols.Protocol.parse(self.specs[0]).split

    @property
    def difference_unit(self) -> str:
        """The unit of a difference of two such numbers: of percents, points."""
        return "points" if self.unit == PERCENT else self.unit


def read(where: str, value: Any, tasks: Collection[str], scales: Collection[str]) -> Protocol:
    """An entry of ``protocols:``; `tasks`: those that the experiment runs; `scales`: those it has.

    Raises ValueError that begins with `where` and the key.
    """
    raw = mapping(where, value, ("label",), _KEYS)
    if ("eval" in raw) == ("probe" in raw):
        refuse(where, "needs either eval or probe")
    label = text(f"{where}.label", raw["label"])
    over = raw.get("over", "")
    if over not in ("", *OVER):
        refuse(f"{where}.over", f"'{over}' is none of {', '.join(OVER)}")
    at = tuple(items(f"{where}.scales", raw.get("scales", [])))
    if unknown := [scale for scale in at if scale not in scales]:
        refuse(f"{where}.scales", f"'{unknown[0]}' is none of {', '.join(scales)}")
    if "probe" in raw:
        mapping(where, raw, ("label", "probe"), ("over", "scales", "unit"))
        return replace(_probed(where, raw, label, over, tasks), scales=at)
    optional = ("measure", "draws", "spread", "over", "scales", "unit")
    mapping(where, raw, ("label", "eval"), optional)
    measure = raw.get("measure", "error")
    if measure not in MEASURES:
        refuse(f"{where}.measure", f"'{measure}' is none of {', '.join(MEASURES)}")
    if raw.get("unit", MEASURES[measure]) != MEASURES[measure]:
        refuse(f"{where}.unit", f"{measure} is in {MEASURES[measure]}, not in {raw['unit']}")
    spread = raw.get("spread", False)
    if not isinstance(spread, bool) or (spread and "draws" not in raw):
        refuse(f"{where}.spread", "must be true or false, and is over draws")
    specs = _specs(where, text(f"{where}.eval", raw["eval"]), raw.get("draws"))
    return Protocol(label, specs, measure, MEASURES[measure], spread, over, scales=at)


_KEYS = ("eval", "probe", "measure", "draws", "spread", "over", "scales", "unit")


def _specs(where: str, spec: str, draws: Any) -> tuple[str, ...]:
    """The evaluations of an entry as runs record them, whatever the order of their options."""
    if draws is None:
        return (_parsed(where, spec),)
    if type(draws) is not int or not 2 <= draws <= protocols.ORDERS:
        refuse(f"{where}.draws", f"must be one of 2..{protocols.ORDERS}, is {draws!r}")
    if "/order:" in spec:
        refuse(f"{where}.eval", f"'{spec}': draws are orders of their own: leave order out")
    return tuple(_parsed(where, f"{spec}/order:{draw}") for draw in range(draws))


def _parsed(where: str, spec: str) -> str:
    try:
        return str(protocols.Protocol.parse(spec))
    except ValueError as error:
        refuse(where, str(error))


def _probed(
    where: str, raw: Mapping[str, Any], label: str, over: str, tasks: Collection[str]
) -> Protocol:
    name = text(f"{where}.probe", raw["probe"])
    probe, _, quantity = name.partition(".")
    if not probe or not quantity:
        refuse(f"{where}.probe", f"'{name}' is not <probe>.<quantity>")
    unit = text(f"{where}.unit", raw.get("unit", PERCENT))
    return Protocol(label, (name,), "value", unit, over=over, task=probe in tasks)
