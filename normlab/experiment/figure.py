"""What an experiment's file says of its figure, checked before anything is drawn."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from normlab.experiment.cells import Scale
from normlab.experiment.checks import mapping, named, refuse, text
from normlab.experiment.entry import Protocol

FIGURES = Path(__file__).parent.parent / "report" / "figures"
"""The kinds of figure, a module each: looked up by name, since importing one takes a second."""

SERIES = "series"
"""What `x` of a figure of bars may be besides an axis: each column is a group of bars."""

_OVER_EPOCHS = ("epochs", "bands")
_ONE_UNIT = ("curves", "sweeps", "bars", "bands")
_LINES = 2
"""As many as look unlike (``normlab.report.figures.bands.LINES``)."""


def kinds() -> list[str]:
    """The kinds of figure there are."""
    return sorted(path.stem for path in FIGURES.glob("[!_]*.py"))


def read(
    where: str,
    value: Any,
    scales: Mapping[str, Scale],
    columns: Mapping[str, Protocol],
    told: Collection[str],
) -> None:
    """Refuse what cannot be drawn, by `where` and key, in one line.

    told: what tells rows of the table apart besides the axes.
    """
    raw = mapping(where, value, ("kind", "x", "xlabel", "series"), optional=None)
    if raw["kind"] not in kinds():
        refuse(f"{where}.kind", f"no figure kind '{raw['kind']}' (kinds: {', '.join(kinds())})")
    named(f"{where}.series", raw["series"], columns)
    for label in raw["xlabel"] if isinstance(raw["xlabel"], list) else [raw["xlabel"]]:
        text(f"{where}.xlabel", label)
    if raw["kind"] == "scatter":
        named(f"{where}.x", [raw["x"]], columns)
    elif raw["kind"] in _OVER_EPOCHS:
        if raw["x"] != "epoch":
            refuse(f"{where}.x", f"a figure of {raw['kind']} is over epoch, not '{raw['x']}'")
    elif (raw["kind"], raw["x"]) != ("bars", SERIES):
        for axis in _listed(raw["x"]):
            for scale, grid in scales.items():
                if axis not in grid.places:
                    refuse(f"{where}.x", f"'{axis}' is no axis of scale {scale}")
    somewhere = {axis for grid in scales.values() for axis in grid.places}.union(told)
    for key in ("by", "only"):  # arms of one scale may be told apart by what others lack
        for axis in _listed(raw.get(key, [])):
            if axis not in somewhere:
                refuse(f"{where}.{key}", f"'{axis}' is an axis of no scale")
    lines = raw.get("lines", [])
    if lines:
        if raw["kind"] != "bands" or len(lines) > _LINES:
            refuse(f"{where}.lines", f"are of a figure of bands, at most {_LINES}")
        named(f"{where}.lines", lines, columns)
    units = {columns[name].unit: name for name in [*raw["series"], *lines]}
    if raw["kind"] in _ONE_UNIT and len(units) > 1:
        found = ", ".join(f"{name} in {unit}" for unit, name in units.items())
        refuse(f"{where}.series", f"one axis for columns of different units ({found})")


def _listed(value: Any) -> list[str]:
    """An axis, a list of them or a mapping from them, as a list."""
    return [value] if isinstance(value, str) else list(value)
