"""Figures: one module per kind, found by its name.

``figure: {kind: curves}`` in an experiment's file calls ``draw(results, facts) -> Figure`` of
``normlab.report.figures.curves``. Files are byte-stable: no dates, no random identifiers.
"""

import io
import math
from collections.abc import Mapping, Sequence
from importlib import import_module
from pkgutil import iter_modules
from textwrap import fill
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from normlab.experiment import Experiment, Protocol
from normlab.report.grid import Results

STYLE: dict[Any, Any] = {
    "axes.edgecolor": "#555555",
    "axes.labelcolor": "#222222",
    "axes.linewidth": 0.7,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.5,
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same glyphs on every machine
    "font.size": 8.0,
    "legend.frameon": False,
    "legend.fontsize": 8.0,
    "lines.linewidth": 1.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "normlab",
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
}

COLOURS = [
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933",
]  # fmt: skip
"""Okabe and Ito's palette and two of Tol's, told apart by the colour-blind; markers differ too."""

DPI = 200

MARKERS = ["o", "s", "^", "D", "v", "P"]

NORMS = {
    "BN": "#0072B2", "GN": "#D55E00", "LN": "#009E73", "IN": "#CC79A7", "BR": "#E69F00",
    "L1": "#56B4E9", "WS+GN": "#882255", "frozen": "#44AA99", "Fixup": "#888888", "none": "#222222",
}  # fmt: skip
"""A norm has its colour in every figure; names as they stand on the axis `norm`."""

DASHES: list[Any] = ["-", (0, (5, 1, 1, 1)), (0, (1, 1))]
"""Lines of one colour, told apart; the papers' are dashed in another way."""


def looks(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Colour, marker and dashes of each line of a figure, by where it stands; the first in front.

    A line of a norm has that norm's colour, on whichever axis its name stands; others have the next
    of ``COLOURS`` that no norm of the figure has.
    """
    named = [norm_of(which) for which in lines]
    free = [colour for colour in COLOURS if colour not in {NORMS.get(one) for one in named}]
    found: list[dict[str, Any]] = []
    for i, one in enumerate(named):
        others = named[:i].count("")
        colour = NORMS[one] if one else free[others % len(free)]
        before = sum(look["color"] == colour for look in found)
        found.append({
            "color": colour,
            "marker": MARKERS[i % len(MARKERS)],
            "linestyle": DASHES[before % len(DASHES)],
            "zorder": 4 - i / 10,
        })  # fmt: skip
    return found


def norm_of(which: Mapping[str, Any]) -> str:
    """The norm that a line is of, "" for none. Elsewhere than on the axis `norm`, a value may be
    "none" or "frozen" and mean something else."""
    if str(which.get("norm")) in NORMS:
        return str(which["norm"])
    return next(
        (str(one) for one in which.values() if str(one) in NORMS and str(one).isupper()), ""
    )


def title(figure: Figure, experiment: Experiment, subtitle: str) -> None:
    """Over all panels: what is shown, at which scale, and over how many seeds."""
    words = fill(f"{experiment.title}: {subtitle}", 104)
    figure.suptitle(words, fontsize=8.5, x=0.01, ha="left")


def axis_label(column: Protocol) -> str:
    """What an axis with a column's numbers says: the quantity and its unit."""
    measured = "" if column.column == "value" else f"{column.column} "
    return f"{measured}({column.unit})" if measured else column.unit


def change_label(column: Protocol) -> str:
    """What an axis with differences says."""
    return f"change ({column.difference_unit.replace('points', 'percentage points')})"


def names() -> list[str]:
    """The kinds of figure there are."""
    return sorted(module.name for module in iter_modules(__path__))


def draw(results: Results, subtitle: str) -> Figure:
    """The experiment's figure at one scale. Raises ValueError for an unknown kind."""
    kind = results.experiment.figure["kind"]
    if kind not in names():
        raise ValueError(f"no figure kind '{kind}' (kinds: {', '.join(names())})")
    with mpl.rc_context(STYLE):
        figure: Figure = import_module(f"{__name__}.{kind}").draw(results, subtitle)
        figure.dpi = DPI
        # Laid out once: each format would do it again, which takes longer than drawing.
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        return figure


def render(figure: Figure, kind: str) -> bytes:
    """The figure as `png` or `svg`, the same bytes every time."""
    out = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context(STYLE):
        figure.savefig(out, format=kind, dpi=DPI, metadata=metadata)
    return out.getvalue()


def nice_powers(values: list[float]) -> list[float]:
    """Ticks of a log2 axis: the powers of two that the values span."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return [2.0**k for k in range(low, high + 1)]
