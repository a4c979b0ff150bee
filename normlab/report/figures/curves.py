"""Curves over one axis: our numbers on the left, changes to the baseline on the right.

The papers' numbers and ours are of different tasks, so only the changes share axes; the papers'
stand behind ours. Options in the experiment's file: x (axis), xlabel, log2, series (protocols), and
by (axes that tell several lines of one protocol apart; a line without a place on x is level).
"""

import math
from collections.abc import Callable
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normlab.report.figures import axis_label, change_label, looks, nice_powers, title
from normlab.report.grid import Point, Results
from normlab.report.papers import paper_baseline
from normlab.report.statistics import Sample
from normlab.report.tables import axis_name, baseline_name

Curve = list[tuple[float, Sample]]
Statistic = Callable[[Point, str], Sample]

PAPER: dict[str, Any] = {"alpha": 0.55, "linestyle": (0, (3, 1.5)), "linewidth": 1.2}


def draw(results: Results, subtitle: str) -> Figure:
    """Two panels; the legend stands below them and covers no data."""
    experiment, options = results.experiment, results.experiment.figure
    x: str = options["x"]
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    left, right = figure.subplots(1, 2)
    title(figure, experiment, subtitle)

    handles: list[Line2D] = []
    cited: list[str] = []
    paper_xs: list[float] = []
    right.axhline(0, color="#999999", linewidth=0.7, zorder=1)
    drawn = [(p, line) for p in options["series"] for line in lines(results, options.get("by", []))]
    told = looks([which for _, (which, _) in drawn])
    for look, (protocol, (which, points)) in zip(told, drawn, strict=True):
        name = " ".join([protocol, *map(str, which.values())])
        for label, at in papers(right, results, x, protocol, which, name, look):
            paper_xs += at
            cited += [] if label in cited else [label]
        over = [point for point in points if x in dict(point)]
        if over:
            ours(left, curve(over, x, results.sample, protocol), name, look)
            ours(right, curve(over, x, results.change, protocol), name, look)
        else:
            for point in points:
                level(left, results.sample(point, protocol), name, look)
        marker = {"marker": look["marker"], "markersize": 4, "linestyle": look["linestyle"]}
        said = said_of(which)
        if not said or len(options["series"]) > 1:
            said.append(experiment.protocols[protocol].label)
        handles.append(
            Line2D(
                [], [], color=look["color"], label=", ".join(said), **(marker if over else LEVEL)
            )
        )

    column = experiment.protocols[options["series"][0]]
    left.set_ylabel(axis_label(column))
    right.set_ylabel(change_label(column))
    left.set_title(f"Ours: {column.label}" if options.get("by") else "Ours", loc="left")
    right.set_title(f"Change from own {baseline_name(experiment)}", loc="left")
    ours_xs = [float(dict(point)[x]) for point in results.drawn if x in dict(point)]
    dress(left, options["xlabel"], ours_xs, log2=bool(options.get("log2")))
    dress(right, options["xlabel"], ours_xs + paper_xs, log2=bool(options.get("log2")))
    legend(figure, handles, cited)
    return figure


def lines(results: Results, by: list[str]) -> list[tuple[dict[str, Any], list[Point]]]:
    """The points to draw by what tells the lines apart, in the grid's order."""
    found: dict[str, tuple[dict[str, Any], list[Point]]] = {}
    for point in results.drawn:
        which = {axis: value for axis, value in point if axis in by}
        found.setdefault(repr(which), (which, []))[1].append(point)
    return list(found.values())


def single(results: Results) -> list[tuple[dict[str, Any], Point]]:
    """As `lines`, where each is of one cell. Raises ValueError where `by` leaves several."""
    found = lines(results, results.experiment.figure.get("by", []))
    for which, points in found:
        if len(points) > 1:
            raise ValueError(f"figure.by: {len(points)} cells are one line, {which}")
    return [(which, points[0]) for which, points in found]


def said_of(which: dict[str, Any]) -> list[str]:
    """What a line is, in words: a bare word would not say which further axis it is of."""
    words = [f"{axis_name(axis)} {value}" for axis, value in which.items()]
    first = [value for value in which.values() if isinstance(value, str)][:1]
    return [*first, *words[len(first) :]] if first == list(which.values())[:1] else words


def papers(
    axes: Axes,
    results: Results,
    x: str,
    protocol: str,
    which: dict[str, Any],
    name: str,
    look: dict[str, Any],
) -> list[tuple[str, list[float]]]:
    """Draw the changes that the sources report for a line; (source, places on the axis) of each.

    As in the tables, a source speaks of the line that stands exactly where it says, if one does.
    """
    drawn = []
    others = [other for other, _ in lines(results, list(which))]
    which = {**results.experiment.figure.get("only", {}), **which}  # where all lines stand
    for source in results.experiment.published:
        numbers, at = source.values.get(protocol, {}), dict(source.at)
        bases = {
            value: paper_baseline(results.experiment, source, protocol, {source.x: value})
            for value in numbers
        }
        if source.x == x:
            points = [(value, number - bases[value]) for value, number in sorted(numbers.items())]
        elif x in at and which.get(source.x) in numbers:  # told over what the lines differ in
            value = which[source.x]
            points = [(at.pop(x), numbers[value] - bases[value])]
        else:
            continue
        points = [(place, change) for place, change in points if not math.isnan(change)]
        named = {axis: one for axis, one in which.items() if axis in {source.x, *at}}
        if not points or not at.items() <= which.items() or (named != which and named in others):
            continue
        axes.plot(
            [at for at, _ in points], [change for _, change in points], color=look["color"],
            marker=look["marker"], markersize=3, markerfacecolor="white", zorder=2,
            label=f"paper {name}", **PAPER,
        )  # fmt: skip
        drawn.append((source.label, [float(at) for at, _ in points]))
    return drawn


def legend(figure: Figure, handles: list[Line2D], cited: list[str]) -> None:
    """Below the panels: the lines, what ours show, and the sources behind them."""
    dark = "#333333"
    shown = [Line2D([], [], color=dark, label="ours: mean and 95 % interval over seeds")]
    shown += [Line2D([], [], color=dark, label=fill(label, 52), **PAPER) for label in cited]
    figure.legend(handles=handles + shown, loc="outside lower left", ncols=2, handlelength=2.6)


def curve(points: list[Point], x: str, statistic: Statistic, protocol: str) -> Curve:
    samples = [(float(dict(point)[x]), statistic(point, protocol)) for point in points]
    return sorted((pair for pair in samples if pair[1].n), key=lambda pair: pair[0])


def ours(axes: Axes, curve: Curve, name: str, look: dict[str, Any]) -> None:
    """Solid and in front; the interval is drawn where there is one (two seeds or more)."""
    xs, means = [at for at, _ in curve], [sample.mean for _, sample in curve]
    halves = [0.0 if math.isnan(sample.half()) else sample.half() for _, sample in curve]
    low = [mean - half for mean, half in zip(means, halves, strict=True)]
    high = [mean + half for mean, half in zip(means, halves, strict=True)]
    axes.fill_between(xs, low, high, color=look["color"], alpha=0.18, linewidth=0, zorder=3)
    axes.errorbar(
        xs, means, yerr=halves, markersize=3.5, capsize=2, elinewidth=0.9,
        label=f"ours {name}", **look,
    )  # fmt: skip


LEVEL: dict[str, Any] = {"linestyle": (0, (1, 1))}


def level(axes: Axes, sample: Sample, name: str, look: dict[str, Any]) -> None:
    """A level line with its interval: one number for the whole axis."""
    if not sample.n:
        return
    axes.axhline(sample.mean, color=look["color"], label=f"ours {name}", **LEVEL)
    if not math.isnan(half := sample.half()):
        axes.axhspan(sample.mean - half, sample.mean + half, color=look["color"], alpha=0.12, lw=0)


def dress(axes: Axes, xlabel: str, xs: list[float], *, log2: bool) -> None:
    axes.set_xlabel(xlabel)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.6)
    axes.set_axisbelow(True)
    if log2:
        axes.set_xscale("log", base=2)
        ticks = nice_powers(xs)
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
