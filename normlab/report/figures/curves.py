"""Curves over one axis: our errors on the left, changes to the baseline on the right.

The papers' errors and ours are of different tasks, so only the changes share axes; the papers'
stand behind ours. Options in the experiment's file: x (axis), xlabel, log2, series (protocols).
"""

import math
from collections.abc import Callable
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normlab.report.figures import COLOURS, MARKERS, nice_powers
from normlab.report.grid import Point, Results
from normlab.report.statistics import Sample
from normlab.report.tables import baseline_name, paper_baseline

Curve = list[tuple[float, Sample]]

PAPER: dict[str, Any] = {"alpha": 0.55, "linestyle": (0, (3, 1.5)), "linewidth": 1.2}


def draw(results: Results, subtitle: str) -> Figure:
    """Two panels; the legend stands below them and covers no data."""
    experiment, options = results.experiment, results.experiment.figure
    x: str = options["x"]
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    figure.suptitle(f"{experiment.title}: {subtitle}", fontsize=8.5, x=0.01, ha="left")
    over = [point for point in results.points if x in dict(point)]

    handles: list[Line2D] = []
    cited: list[str] = []
    paper_xs: list[float] = []
    right.axhline(0, color="#999999", linewidth=0.7, zorder=1)
    for i, protocol in enumerate(options["series"]):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        for source in experiment.published:
            base = paper_baseline(experiment, source, protocol)
            if source.x != x or math.isnan(base):
                continue
            points = sorted(source.values[protocol].items())
            paper_xs += [float(at) for at, _ in points]
            right.plot(
                [at for at, _ in points], [error - base for _, error in points], color=colour,
                marker=marker, markersize=3, markerfacecolor="white", zorder=2,
                label=f"paper {protocol}", **PAPER,
            )  # fmt: skip
            if source.label not in cited:
                cited.append(source.label)
        look = {"color": colour, "marker": marker, "zorder": 4 - i / 10}  # the first in front
        _ours(left, _curve(over, x, results.sample, protocol), protocol, look)
        _ours(right, _curve(over, x, results.change, protocol), protocol, look)
        name = experiment.protocols[protocol].label
        handles.append(Line2D([], [], color=colour, marker=marker, markersize=4, label=name))

    left.set_ylabel("error (%)")
    right.set_ylabel("change (percentage points)")
    left.set_title("Ours", loc="left")
    right.set_title(f"Change from own {baseline_name(experiment)}", loc="left")
    ours_xs = [float(dict(point)[x]) for point in over]
    _dress(left, options, ours_xs)
    _dress(right, options, ours_xs + paper_xs)
    dark = "#333333"
    handles.append(Line2D([], [], color=dark, label="ours: mean and 95 % interval over seeds"))
    handles += [Line2D([], [], color=dark, label=fill(label, 52), **PAPER) for label in cited]
    figure.legend(handles=handles, loc="outside lower left", ncols=2, handlelength=2.6)
    return figure


def _curve(
    points: list[Point], x: str, statistic: Callable[[Point, str], Sample], protocol: str
) -> Curve:
    samples = [(float(dict(point)[x]), statistic(point, protocol)) for point in points]
    return sorted((pair for pair in samples if pair[1].n), key=lambda pair: pair[0])


def _ours(axes: Axes, curve: Curve, protocol: str, look: dict[str, Any]) -> None:
    """Solid and in front; the interval is drawn where there is one (two seeds or more)."""
    xs, means = [at for at, _ in curve], [sample.mean for _, sample in curve]
    halves = [0.0 if math.isnan(sample.half()) else sample.half() for _, sample in curve]
    low = [mean - half for mean, half in zip(means, halves, strict=True)]
    high = [mean + half for mean, half in zip(means, halves, strict=True)]
    axes.fill_between(xs, low, high, color=look["color"], alpha=0.18, linewidth=0, zorder=3)
    axes.errorbar(
        xs, means, yerr=halves, markersize=3.5, capsize=2, elinewidth=0.9,
        label=f"ours {protocol}", **look,
    )  # fmt: skip


def _dress(axes: Axes, options: dict[str, Any], xs: list[float]) -> None:
    axes.set_xlabel(options["xlabel"])
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    if options.get("log2"):
        axes.set_xscale("log", base=2)
        ticks = nice_powers(xs)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
