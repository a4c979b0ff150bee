"""A paper's sentence as contrasts between numbers of the grid."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from normlab.experiment.checks import items, mapping, named, number, refuse, text

KINDS = ("direction", "equivalence", "shape")

Term = tuple[float, str, dict[str, Any]]
"""Factor, protocol, and the axes' values of the cell it is read from, with an epoch if it names
one."""

EPOCH = "epoch"
"""What a cell may name besides axes: a number of epochs after the start, FIRST or LAST."""

FIRST, LAST = "first", "last"
"""The first epoch that was evaluated; and what counts where nothing is said."""


@dataclass(frozen=True)
class Contrast:
    """A sum of terms in the unit of their differences, taken within a seed."""

    label: str
    terms: list[Term]


@dataclass(frozen=True)
class Tested:
    """A sentence about numbers of the grid, with the contrasts that test it."""

    name: str
    sentence: str
    paper: str
    unit: str
    """Of every contrast: points for differences of errors, else the columns' own unit."""
    spec: dict[str, Any] = field(repr=False)

    def contrasts(self, axes: dict[str, list[Any]]) -> list[Contrast]:
        """The contrasts on a grid with these axes; `min` and `max` become the axis' ends.

        Raises ValueError when the grid lacks a cell that the sentence speaks of.
        """
        if "monotone" in self.spec:
            raw = list(self._steps(axes))
        else:
            raw = [[tuple(term) for term in terms] for terms in self.spec["contrasts"]]
        return [self._contrast(terms, axes) for terms in raw]

    def _steps(self, axes: dict[str, list[Any]]) -> Iterator[list[Term]]:
        """Neighbours along the axis, ordered so that a true claim makes every contrast positive."""
        spec = self.spec["monotone"]
        axis, sign = (spec["falls"], 1) if "falls" in spec else (spec["rises"], -1)
        values = [v for v in sorted(axes.get(axis, [])) if v <= spec.get("upto", v)]
        for low, high in pairwise(values):
            yield [
                (side * factor, protocol, {axis: value, **(cell[0] if cell else {})})
                for value, side in ((low, sign), (high, -sign))
                for factor, protocol, *cell in spec["terms"]
            ]

    def _contrast(self, terms: list[Any], axes: dict[str, list[Any]]) -> Contrast:
        resolved: list[Term] = []
        for factor, protocol, cell in terms:
            at = {}
            for axis, value in cell.items():
                if axis == EPOCH:
                    at[axis] = value
                    continue
                values = axes.get(axis, [])
                ends = {"min": min, "max": max}
                at[axis] = ends[value](values) if value in ends and values else value
                if at[axis] not in values:
                    raise ValueError(
                        f"{self.name} reads {axis}={value}, which this scale does not run "
                        f"(it runs {axis}={','.join(map(str, values)) or 'nothing'})"
                    )
            resolved.append((float(factor), protocol, at))
        label = " ".join(
            f"{'+' if f > 0 else '-'}{'' if abs(f) == 1 else f'{abs(f):g} '}{p}"
            f"({', '.join(f'{k}={v}' for k, v in cell.items())})"
            for f, p, cell in resolved
        )
        return Contrast(label, resolved)


@dataclass(frozen=True)
class Claim(Tested):
    """One falsifiable sentence with its test; ``margin`` in its unit."""

    kind: str
    primary: bool
    margin: float
    followup: Mapping[str, str] = field(default_factory=dict)
    """By scale, where the claim is followed up if it is contradicted there."""


@dataclass(frozen=True)
class Fact(Tested):
    """An identity or closed form: holds where no seed's contrast exceeds the tolerance."""

    tolerance: float


_TESTS = ("contrasts", "monotone")


def read(
    where: str,
    name: str,
    value: Any,
    units: Mapping[str, str],
    axes: dict[str, list[Any]],
    scales: Collection[str],
) -> Claim:
    """A claim as it stands in the file, about these protocols and axes (with all their values).

    units: protocol -> the unit of its differences. scales: those of the experiment.
    Raises ValueError that begins with `where` and the key.
    """
    keys = ("sentence", "paper", "kind", "primary", "margin")
    raw = mapping(where, value, keys, (*_TESTS, "followup"))
    if ("contrasts" in raw) == ("monotone" in raw):
        refuse(where, "needs either contrasts or monotone")
    if raw["kind"] not in KINDS:
        refuse(f"{where}.kind", f"'{raw['kind']}' is none of {', '.join(KINDS)}")
    if not isinstance(raw["primary"], bool):
        refuse(f"{where}.primary", f"must be true or false, is {raw['primary']!r}")
    if raw["kind"] == "direction" and len(raw.get("contrasts") or ()) != 1:
        refuse(where, "kind direction takes exactly one contrast")
    if raw["kind"] == "equivalence" and "monotone" in raw:
        refuse(where, "kind equivalence takes contrasts")
    if "monotone" in raw:
        used = _monotone(f"{where}.monotone", raw["monotone"], units, axes)
    else:
        used = _contrasts(f"{where}.contrasts", raw["contrasts"], units, axes)
    return Claim(
        name=name,
        sentence=text(f"{where}.sentence", raw["sentence"]),
        paper=text(f"{where}.paper", raw["paper"]),
        unit=_unit(where, used, units),
        spec={key: raw[key] for key in _TESTS if key in raw},
        kind=raw["kind"],
        primary=raw["primary"],
        margin=_not_negative(f"{where}.margin", raw["margin"]),
        followup=_followup(f"{where}.followup", raw.get("followup", {}), scales),
    )


def read_fact(
    where: str, name: str, value: Any, units: Mapping[str, str], axes: dict[str, list[Any]]
) -> Fact:
    """A fact as it stands in the file; what is wrong is refused as `read` does."""
    raw = mapping(where, value, ("sentence", "paper", "tolerance", "contrasts"))
    used = _contrasts(f"{where}.contrasts", raw["contrasts"], units, axes)
    return Fact(
        name=name,
        sentence=text(f"{where}.sentence", raw["sentence"]),
        paper=text(f"{where}.paper", raw["paper"]),
        unit=_unit(where, used, units),
        spec={"contrasts": raw["contrasts"]},
        tolerance=_not_negative(f"{where}.tolerance", raw["tolerance"]),
    )


def _followup(where: str, value: Any, scales: Collection[str]) -> dict[str, str]:
    """By scale; plain text is of every scale."""
    if isinstance(value, str):
        return dict.fromkeys(scales, value)
    if not isinstance(value, dict):
        refuse(where, f"must be text, or texts by scale, is {value!r:.60}")
    for scale, place in value.items():
        if scale not in scales:
            refuse(where, f"'{scale}' is none of {', '.join(scales)}")
        text(f"{where}.{scale}", place)
    return value


def _not_negative(where: str, value: Any) -> float:
    if (given := number(where, value)) < 0:
        refuse(where, f"must not be below 0, is {given:g}")
    return given


def _unit(where: str, used: Iterable[str], units: Mapping[str, str]) -> str:
    """The one unit of all terms: neither sums nor a margin can be of several."""
    found = {units[protocol]: protocol for protocol in used}
    if len(found) > 1:
        named_units = ", ".join(f"{protocol} in {unit}" for unit, protocol in found.items())
        refuse(where, f"terms of different units ({named_units})")
    return next(iter(found))


def _monotone(
    where: str, value: Any, units: Mapping[str, str], axes: dict[str, list[Any]]
) -> list[str]:
    raw = mapping(where, value, ("terms",), ("falls", "rises", "upto"))
    if ("falls" in raw) == ("rises" in raw):
        refuse(where, "needs either falls or rises, an axis")
    axis = raw.get("falls", raw.get("rises"))
    if axis not in axes:
        refuse(where, f"'{axis}' is no axis (axes: {', '.join(axes)})")
    for one in axes[axis]:
        number(f"{where}, a value of {axis}", one)
    number(f"{where}.upto", raw.get("upto", 0))
    return _terms(f"{where}.terms", raw["terms"], units, axes, besides=axis)


def _contrasts(
    where: str, value: Any, units: Mapping[str, str], axes: dict[str, list[Any]]
) -> list[str]:
    if not items(where, value):
        refuse(where, "has no contrast")
    found = [_terms(f"{where}[{i}]", terms, units, axes) for i, terms in enumerate(value)]
    return [protocol for here in found for protocol in here]


def _terms(
    where: str, value: Any, units: Mapping[str, str], axes: dict[str, list[Any]], besides: str = ""
) -> list[str]:
    """The protocols of a list of terms; those of a monotone along `besides` need name no cell."""
    form = ["factor", "protocol", "{axis: value}"]
    if not items(where, value):
        refuse(where, "has no term")
    for term in value:
        if not isinstance(term, list) or len(term) not in ((2, 3) if besides else (3,)):
            optional = " or without the last" if besides else ""
            refuse(where, f"a term is [{', '.join(form)}]{optional}, got {term!r:.60}")
        number(where, term[0])
        named(where, [term[1]], units)
        for axis, at in mapping(where, term[2]).items() if len(term) == 3 else ():
            if axis == EPOCH:
                epoch(where, at)
            elif axis not in axes or axis == besides or isinstance(at, list | dict):
                refuse(where, f"{axis}: {at} names no cell (axes: {', '.join(axes)})")
    return [term[1] for term in value]


def epoch(where: str, value: Any) -> None:
    """Refuse what names no epoch."""
    if value not in (FIRST, LAST) and (type(value) is not int or value < 0):
        refuse(where, f"epoch must be a number from 0 on, {FIRST} or {LAST}, is {value!r}")
