"""A paper's sentence as contrasts between numbers of the grid."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from normlab.experiment.checks import items, mapping, named, number, refuse, text

KINDS = ("direction", "equivalence", "shape")

Term = tuple[float, str, dict[str, Any]]
"""Factor, protocol, and the axes' values of the cell it is read from."""


@dataclass(frozen=True)
class Contrast:
    """A sum of terms in percentage points, taken within a seed."""

    label: str
    terms: list[Term]


@dataclass(frozen=True)
class Claim:
    """One falsifiable sentence with its test; ``margin`` in percentage points."""

    name: str
    sentence: str
    paper: str
    kind: str
    primary: bool
    margin: float
    spec: dict[str, Any] = field(repr=False)

    def contrasts(self, axes: dict[str, list[Any]]) -> list[Contrast]:
        """The contrasts on a grid with these axes; `min` and `max` become the axis' ends.

        Raises ValueError when the grid lacks a cell that the claim speaks of.
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
                values = axes.get(axis, [])
                ends = {"min": min, "max": max}
                at[axis] = ends[value](values) if value in ends and values else value
                if at[axis] not in values:
                    raise ValueError(
                        f"claim {self.name} reads {axis}={value}, which this scale does not run "
                        f"(it runs {axis}={','.join(map(str, values)) or 'nothing'})"
                    )
            resolved.append((float(factor), protocol, at))
        label = " ".join(
            f"{'+' if f > 0 else '-'}{'' if abs(f) == 1 else f'{abs(f):g} '}{p}"
            f"({', '.join(f'{k}={v}' for k, v in cell.items())})"
            for f, p, cell in resolved
        )
        return Contrast(label, resolved)


def read(
    where: str, name: str, value: Any, known: Collection[str], axes: dict[str, list[Any]]
) -> Claim:
    """A claim as it stands in the file, about these protocols and axes (with all their values).

    Raises ValueError that begins with `where` and the key.
    """
    tests = ("contrasts", "monotone")
    raw = mapping(where, value, ("sentence", "paper", "kind", "primary", "margin"), tests)
    if ("contrasts" in raw) == ("monotone" in raw):
        refuse(where, "needs either contrasts or monotone")
    if raw["kind"] not in KINDS:
        refuse(f"{where}.kind", f"'{raw['kind']}' is none of {', '.join(KINDS)}")
    if not isinstance(raw["primary"], bool):
        refuse(f"{where}.primary", f"must be true or false, is {raw['primary']!r}")
    if (margin := number(f"{where}.margin", raw["margin"])) < 0:
        refuse(f"{where}.margin", f"must not be below 0, is {margin:g}")
    if raw["kind"] == "direction" and len(raw.get("contrasts") or ()) != 1:
        refuse(where, "kind direction takes exactly one contrast")
    if raw["kind"] == "equivalence" and "monotone" in raw:
        refuse(where, "kind equivalence takes contrasts")
    if "monotone" in raw:
        _monotone(f"{where}.monotone", raw["monotone"], known, axes)
    else:
        if not items(f"{where}.contrasts", raw["contrasts"]):
            refuse(f"{where}.contrasts", "has no contrast")
        for i, terms in enumerate(raw["contrasts"]):
            _terms(f"{where}.contrasts[{i}]", terms, known, axes)
    return Claim(
        name=name,
        sentence=text(f"{where}.sentence", raw["sentence"]),
        paper=text(f"{where}.paper", raw["paper"]),
        kind=raw["kind"],
        primary=raw["primary"],
        margin=margin,
        spec={key: raw[key] for key in tests if key in raw},
    )


def _monotone(where: str, value: Any, known: Collection[str], axes: dict[str, list[Any]]) -> None:
    raw = mapping(where, value, ("terms",), ("falls", "rises", "upto"))
    if ("falls" in raw) == ("rises" in raw):
        refuse(where, "needs either falls or rises, an axis")
    axis = raw.get("falls", raw.get("rises"))
    if axis not in axes:
        refuse(where, f"'{axis}' is no axis (axes: {', '.join(axes)})")
    for one in axes[axis]:
        number(f"{where}, a value of {axis}", one)
    number(f"{where}.upto", raw.get("upto", 0))
    _terms(f"{where}.terms", raw["terms"], known, axes, besides=axis)


def _terms(
    where: str, value: Any, known: Collection[str], axes: dict[str, list[Any]], besides: str = ""
) -> None:
    """Refuse all but a list of terms; those of a monotone along `besides` need name no cell."""
    form = ["factor", "protocol", "{axis: value}"]
    if not items(where, value):
        refuse(where, "has no term")
    for term in value:
        if not isinstance(term, list) or len(term) not in ((2, 3) if besides else (3,)):
            optional = " or without the last" if besides else ""
            refuse(where, f"a term is [{', '.join(form)}]{optional}, got {term!r:.60}")
        number(where, term[0])
        named(where, [term[1]], known)
        for axis, at in mapping(where, term[2]).items() if len(term) == 3 else ():
            if axis not in axes or axis == besides or isinstance(at, list | dict):
                refuse(where, f"{axis}: {at} names no cell (axes: {', '.join(axes)})")
