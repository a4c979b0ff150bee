"""One column against another, a point for each cell, with the intervals of both.

On the left our numbers, on the right changes to the baseline, with the papers' as hollow points
where a source has both columns. Options in the experiment's file: x (a column), xlabel, series
(the columns of the other axis, of one unit), by (axes that tell the colours apart).
"""

import math
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normlab.report.figures import change_label, curves, looks, title
from normlab.report.grid import Point, Results
from normlab.report.papers import published
from normlab.report.statistics import Sample
from normlab.report.tables import axis_name, baseline_name


def draw(results: Results, subtitle: str) -> Figure:
    """Two panels, or one without a baseline; each point says where it stands."""
    experiment, options = results.experiment, results.experiment.figure
    x, series = options["x"], options["series"]
    figure = Figure(figsize=(7.2, 4.1), layout="constrained")
    panels = figure.subplots(1, 2 if experiment.baseline else 1, squeeze=False)[0]
    title(figure, experiment, subtitle)
    drawn = [(p, line) for p in series for line in curves.lines(results, options.get("by", []))]
    told = looks([which for _, (which, _) in drawn])
    handles: list[Line2D] = []
    cited: dict[str, None] = {}
    for look, (protocol, (which, points)) in zip(told, drawn, strict=True):
        style = {key: look[key] for key in ("color", "marker", "zorder")}
        for point in points:
            name = ", ".join(f"{axis_name(a)} {v}" for a, v in point if a not in which)
            dot(panels[0], results.sample(point, x), results.sample(point, protocol), name, style)
            if experiment.baseline:
                change = results.change(point, x), results.change(point, protocol)
                dot(panels[1], *change, name, style)
                cited |= papers(panels[1], results, point, x, protocol, style)
        said = curves.said_of(which)
        said += [experiment.protocols[protocol].label] if len(series) > 1 or not said else []
        handles.append(Line2D([], [], linestyle="", markersize=5, label=", ".join(said), **style))
    across, up = experiment.protocols[x], experiment.protocols[series[0]]
    panels[0].set_title("Ours", loc="left")
    panels[0].set_xlabel(f"{options['xlabel']} ({across.unit})")
    panels[0].set_ylabel(f"{up.label} ({up.unit})")
    if experiment.baseline:
        panels[1].set_title(f"Change from own {baseline_name(experiment)}", loc="left")
        panels[1].set_xlabel(change_label(across))
        panels[1].set_ylabel(change_label(up))
    for panel in panels:
        panel.grid(color="#e6e6e6", linewidth=0.6)
        panel.set_axisbelow(True)
    dark = "#333333"
    handles.append(Line2D([], [], color=dark, label="ours: mean and 95 % interval over seeds"))
    hollow: dict[str, Any] = {"linestyle": "", "marker": "o", "markerfacecolor": "white"}
    handles += [Line2D([], [], color=dark, label=fill(one, 52), **hollow) for one in cited]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handlelength=1.8)
    return figure


def dot(axes: Axes, x: Sample, y: Sample, name: str, style: dict[str, Any]) -> None:
    """A point with both intervals, where there are any; nothing without both numbers."""
    if not (x.n and y.n):
        return
    halves = [0.0 if math.isnan(one.half()) else one.half() for one in (x, y)]
    axes.errorbar(
        x.mean, y.mean, xerr=halves[0], yerr=halves[1], linestyle="", markersize=4.5, capsize=1.5,
        elinewidth=0.8, **style,
    )  # fmt: skip
    axes.annotate(
        name, (x.mean, y.mean), xytext=(4, 3), textcoords="offset points", fontsize=6.5,
        color="#444444",
    )  # fmt: skip


def papers(
    axes: Axes, results: Results, point: Point, x: str, protocol: str, style: dict[str, Any]
) -> dict[str, None]:
    """Draw a point for each source that has both changes here; the sources."""
    across = {one.source: one.change for one in published(results, point, x)}
    found: dict[str, None] = {}
    for one in published(results, point, protocol):
        at = across.get(one.source, math.nan)
        if not math.isnan(at + one.change):
            axes.plot(at, one.change, markerfacecolor="white", markersize=4.5, **style)
            found[one.source] = None
    return found
