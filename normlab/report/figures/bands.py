"""Percentiles over the epochs of training: a panel for each arm, on one scale.

Options in the experiment's file: series (columns of one unit, from the lowest percentile to the
highest), by (axes that tell the panels apart), and x: epoch. The space between the first column
and the last is shaded, that between the second and the last but one darker. `lines` names further
columns, each a line of its own across the bands. Means over seeds.
"""

from typing import Any

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from normlab.report.figures import axis_label, curves, looks, title
from normlab.report.grid import Point, Results
from normlab.report.statistics import Sample

COLUMNS = 4
"""Panels side by side."""


def draw(results: Results, subtitle: str) -> Figure:
    """Panels that share both axes, so that arms can be compared by eye.

    Raises ValueError where `by` leaves several cells to a panel.
    """
    experiment, options = results.experiment, results.experiment.figure
    arms = curves.single(results)
    across = min(COLUMNS, max(1, len(arms)))
    down = -(-len(arms) // across)
    figure = Figure(figsize=(7.2, 1.0 + 2.5 * down), layout="constrained")
    panels = figure.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    title(figure, experiment, subtitle)
    for panel in panels.flat[len(arms) :]:
        panel.set_visible(False)
    for panel, look, (which, point) in zip(
        panels.flat, looks([which for which, _ in arms]), arms, strict=False
    ):
        bands(panel, results, point, look["color"])
        panel.set_title(", ".join(curves.said_of(which)), loc="left")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        curves.dress(panel, options["xlabel"], [], log2=False)
    for panel in panels[:, 0]:
        panel.set_ylabel(axis_label(experiment.protocols[options["series"][0]]))
    labels = [experiment.protocols[protocol].label for protocol in options["series"]]
    pairs = list(zip(labels, labels[::-1], strict=True))[: len(labels) // 2]
    handles: list[Artist] = [
        Patch(color="#555555", alpha=SHADE * (i + 1), label=f"{low} to {high}")
        for i, (low, high) in enumerate(pairs)
    ]
    handles += [
        Line2D([], [], **look, label=experiment.protocols[name].label)
        for name, look in zip(options.get("lines", []), LINES, strict=False)
    ]
    columns = 1 if options.get("lines") else 3  # their labels are long
    figure.legend(
        handles=handles, loc="outside lower left", ncols=columns, title="means over seeds"
    )
    return figure


SHADE = 0.22
"""How much darker each inner band is."""

LINES: list[Any] = [
    {"color": "#000000", "linewidth": 1.8, "linestyle": "-"},
    {"color": "#555555", "linewidth": 1.8, "linestyle": (0, (4, 2))},
]
"""How the lines of their own look, in their order."""


def bands(axes: Axes, results: Results, point: Point, colour: str) -> None:
    """The bands of one arm, with a line at every percentile, and the lines of their own."""

    def means_of(protocol: str) -> dict[int, float]:
        along = results.along(point, protocol)
        return {epoch: Sample.of(of.values()).mean for epoch, of in along.items()}

    options = results.experiment.figure
    means = [means_of(protocol) for protocol in options["series"]]
    epochs = sorted(set.intersection(*map(set, means)))
    lines = [[mean[epoch] for epoch in epochs] for mean in means]
    for low, high in list(zip(lines, lines[::-1], strict=True))[: len(lines) // 2]:
        axes.fill_between(epochs, low, high, color=colour, alpha=SHADE, linewidth=0)
    for line in lines:
        axes.plot(epochs, line, color=colour, linewidth=1.0, marker=".", markersize=3)
    for protocol, look in zip(options.get("lines", []), LINES, strict=False):
        own = means_of(protocol)
        axes.plot(sorted(own), [own[epoch] for epoch in sorted(own)], zorder=3, **look)
