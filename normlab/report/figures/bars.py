"""Groups of bars: our numbers on the left, changes to the baseline on the right.

The papers' changes stand on the right as white diamonds: their numbers and ours are of different
tasks. Options in the experiment's file: x (an axis, or `series`: each column is a group), xlabel,
series (columns), by (axes that tell the bars of a group apart).
"""

import math
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from normlab.experiment.figure import SERIES
from normlab.report.figures import axis_label, change_label, curves, looks, title
from normlab.report.grid import Point, Results
from normlab.report.papers import published
from normlab.report.statistics import Sample
from normlab.report.tables import baseline_name

Bars = list[tuple[int, Point, str]]
"""Of one colour: the group's place, the point and the column of each."""

PAPER: dict[str, Any] = {
    "linestyle": "", "marker": "D", "markersize": 4, "markerfacecolor": "white", "zorder": 5,
    "markeredgecolor": "#222222", "markeredgewidth": 0.9,
}  # fmt: skip

WIDTH = 0.84
"""Of a group, where 1 is the distance of groups."""


def draw(results: Results, subtitle: str) -> Figure:
    """Two panels, or one without a baseline; the legend stands below them."""
    experiment, options = results.experiment, results.experiment.figure
    groups, members = arranged(results)
    figure = Figure(figsize=(7.2, 4.1), layout="constrained")
    panels = figure.subplots(1, 2 if experiment.baseline else 1, squeeze=False)[0]
    title(figure, experiment, subtitle)
    width = WIDTH / max(1, len(members))
    told = looks([which for which, _ in members])
    for i, (look, (_, bars)) in enumerate(zip(told, members, strict=True)):
        shift = (i - (len(members) - 1) / 2) * width
        places = [group + shift for group, _, _ in bars]
        values = [results.sample(point, protocol) for _, point, protocol in bars]
        ours(panels[0], places, values, width, look)
        if experiment.baseline:
            changes = [results.change(point, protocol) for _, point, protocol in bars]
            ours(panels[1], places, changes, width, look)
            theirs = [
                (place, paper.change)
                for place, (_, point, protocol) in zip(places, bars, strict=True)
                for paper in published(results, point, protocol)
                if not math.isnan(paper.change)
            ]
            panels[1].plot(*zip(*theirs, strict=True), **PAPER) if theirs else None
    column = experiment.protocols[options["series"][0]]
    panels[0].set_ylabel(axis_label(column))
    panels[0].set_title("Ours", loc="left")
    if experiment.baseline:
        panels[1].set_ylabel(change_label(column))
        name = fill(f"Change from own {baseline_name(experiment)}", 52)
        panels[1].set_title(name, loc="left")
        panels[1].axhline(0, color="#999999", linewidth=0.7, zorder=1)
    for panel in panels:
        dress(panel, options["xlabel"], groups)
    legend(figure, results, members, told)
    return figure


def arranged(results: Results) -> tuple[list[str], list[tuple[dict[str, Any], Bars]]]:
    """The groups' names, and by what tells them apart the bars of one colour.

    Raises ValueError where `by` leaves several cells to one bar.
    """
    experiment, options = results.experiment, results.experiment.figure
    series = [key for key in options["series"] if key in experiment.columns(results.scale)]
    by: list[str] = options.get("by", [])
    if options["x"] == SERIES:
        groups = [experiment.protocols[protocol].label for protocol in series]
        cells = curves.single(results)
        return groups, [
            (which, [(i, point, protocol) for i, protocol in enumerate(series)])
            for which, point in cells
        ]
    axis = options["x"]
    values = list(dict.fromkeys(dict(p)[axis] for p in results.drawn if axis in dict(p)))
    members = []
    for which, points in curves.lines(results, by):
        at = [dict(point)[axis] for point in points if axis in dict(point)]
        if len(set(at)) < len(at):
            raise ValueError(f"figure.by: several cells are one bar, {which}")
        for protocol in series:
            column = {"column": experiment.protocols[protocol].label} if series[1:] else {}
            bars = [
                (values.index(dict(point)[axis]), point, protocol)
                for point in points
                if axis in dict(point)
            ]
            members.append((which | column, bars))
    return [str(value) for value in values], members


def ours(
    axes: Axes, places: list[float], samples: list[Sample], width: float, look: dict[str, Any]
) -> None:
    """Bars with their intervals (two seeds or more); nothing where there is no number."""
    known = [(place, one) for place, one in zip(places, samples, strict=True) if one.n]
    if not known:
        return
    halves = [0.0 if math.isnan(one.half()) else one.half() for _, one in known]
    axes.bar(
        [place for place, _ in known], [one.mean for _, one in known], width * 0.92, yerr=halves,
        **filled(look), zorder=2, error_kw={"elinewidth": 0.9, "capsize": 1.5, "ecolor": "#222222"},
    )  # fmt: skip


def filled(look: dict[str, Any]) -> dict[str, Any]:
    """The colour of a bar, hatched where another bar of it has the colour already."""
    hatched = {"hatch": "///", "edgecolor": "white", "linewidth": 0}
    return {"facecolor": look["color"], **(hatched if look["linestyle"] != "-" else {})}


def dress(axes: Axes, xlabel: str, groups: list[str]) -> None:
    """Names of the groups in lines that do not run into each other."""
    axes.set_xlabel(xlabel)
    room = max(6, round(44 / max(1, len(groups))))
    labels = [fill(name, room, break_long_words=False) for name in groups]
    crowded = any(
        label.count("\n") > 2 or max(map(len, label.split("\n"))) > room for label in labels
    )
    labels = groups if crowded else labels
    turned: dict[str, Any] = {"rotation": 35, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(len(groups)), labels, fontsize=7, **(turned if crowded else {}))
    axes.set_xlim(-0.5, len(groups) - 0.5)  # also where the last groups have no bars yet
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)


def legend(
    figure: Figure,
    results: Results,
    members: list[tuple[dict[str, Any], Bars]],
    told: list[dict[str, Any]],
) -> None:
    """What the colours are, what the intervals are, and whose the diamonds are."""
    handles: list[Any] = [
        Patch(**filled(look), label=", ".join(curves.said_of(which)))
        for look, (which, _) in zip(told, members, strict=True)
        if which
    ]
    handles.append(
        Line2D([], [], color="#222222", label="ours: mean and 95 % interval over seeds", lw=0.9)
    )
    cited = {
        paper.source: None
        for _, bars in members
        for _, point, protocol in bars
        for paper in published(results, point, protocol)
        if not math.isnan(paper.change)
    }
    handles += [Line2D([], [], label=fill(source, 52), **PAPER) for source in cited]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handlelength=1.8)
