"""Figures: one module per kind, found by its name.

``figure: {kind: curves}`` in an experiment's file calls ``draw(results, facts) -> Figure`` of
``normlab.report.figures.curves``. Files are byte-stable: no dates, no random identifiers.
"""

import io
import math
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

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

COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]
"""Okabe and Ito's palette, told apart by the colour-blind; markers differ as well."""

MARKERS = ["o", "s", "^", "D", "v", "P"]


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
        return figure


def render(figure: Figure, kind: str) -> bytes:
    """The figure as `png` or `svg`, the same bytes every time."""
    out = io.BytesIO()
    metadata: dict[str, Any] = {"Date": None} if kind == "svg" else {"Software": None}
    with mpl.rc_context(STYLE):
        figure.savefig(out, format=kind, dpi=200, metadata=metadata)
    return out.getvalue()


def nice_powers(values: list[float]) -> list[float]:
    """Ticks of a log2 axis: the powers of two that the values span."""
    low, high = math.floor(math.log2(min(values))), math.ceil(math.log2(max(values)))
    return [2.0**k for k in range(low, high + 1)]
