"""The curves of a diagnosis, as SVG."""

import matplotlib as mpl
from matplotlib.figure import Figure

from normlab.diagnose.curves import Curve
from normlab.diagnose.diagnosis import Diagnosis
from normlab.report.figures import COLOURS, MARKERS, STYLE, render

__all__ = ["drawn"]

_AXES = {
    "samples": "samples that the statistics are estimated on",
    "batch": "samples in a batch of the estimate",
}


def drawn(found: Diagnosis) -> dict[str, str]:
    """By its title, each figure as an SVG file: a panel for each curve, and the layers by depth."""
    figures = {}
    for name, curve in found.curves.items():
        figures[f"Error and loss by {_AXES[name]}"] = _curve(curve, _AXES[name])
    return {title: render(figure, "svg").decode() for title, figure in figures.items()}


def _curve(curve: Curve, axis: str) -> Figure:
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(4.4, 2.9), layout="constrained")
        left = figure.subplots()
        left.set_xscale("log", base=2)
        left.set_xticks(curve.xs, _labels(curve.xs))
        left.minorticks_off()
        left.set_xlabel(axis)
        left.set_ylabel("loss", color=COLOURS[0])
        left.plot(curve.xs, curve.losses, color=COLOURS[0], marker=MARKERS[0])
        if all(error == error for error in curve.errors):
            right = left.twinx()
            right.spines["right"].set_visible(True)
            right.set_ylabel("error (%)", color=COLOURS[1])
            errors = [100 * error for error in curve.errors]
            right.plot(curve.xs, errors, color=COLOURS[1], marker=MARKERS[1])
        if curve.needed is not None:
            left.axvline(curve.needed, color="#888888", linewidth=0.8, linestyle=(0, (4, 2)))
            left.set_title(f"enough: {curve.needed}", loc="left")
        return figure


def _labels(xs: list[int]) -> list[str]:
    """Of the ticks: the last one's, and before it those that are half of the next at most."""
    labels = [str(x) for x in xs]
    kept = xs[-1]
    for i in range(len(xs) - 2, -1, -1):
        if 2 * xs[i] > kept:
            labels[i] = ""
        else:
            kept = xs[i]
    return labels
