"""Errors over the epochs of training: a panel for each protocol, a line for each arm.

Options in the experiment's file: series (protocols), by (axes that tell the lines apart), and
x: epoch. The runs must have been evaluated along the way (`eval_last`).
"""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from normlab.report.figures import COLOURS, MARKERS, curves
from normlab.report.grid import Results
from normlab.report.statistics import Sample


def draw(results: Results, subtitle: str) -> Figure:
    """One panel per protocol, with axes of its own: training and test errors differ by much.

    Raises ValueError where `by` leaves several cells to a line.
    """
    experiment, options = results.experiment, results.experiment.figure
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    panels = figure.subplots(1, len(options["series"]), squeeze=False)[0]
    figure.suptitle(f"{experiment.title}: {subtitle}", fontsize=8.5, x=0.01, ha="left")
    arms = curves.lines(results, options["by"])
    if several := [(which, points) for which, points in arms if len(points) > 1]:
        which, points = several[0]
        raise ValueError(f"figure.by: {len(points)} cells are one line, {which}")
    for panel, protocol in zip(panels, options["series"], strict=True):
        for i, (which, points) in enumerate(arms):
            over = results.by_epoch.get((points[0], protocol), {})
            epochs = sorted(over)
            samples = [Sample.of(over[epoch].values()) for epoch in epochs]
            panel.plot(
                epochs, [sample.mean for sample in samples], color=COLOURS[i % len(COLOURS)],
                marker=MARKERS[i % len(MARKERS)], markersize=2.5, linewidth=1.1,
                linestyle="-" if i < len(COLOURS) else (0, (3, 1.2)),
                label=f"ours {protocol} {' '.join(map(str, which.values()))}",
            )  # fmt: skip
        panel.set_title(experiment.protocols[protocol].label, loc="left")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        curves.dress(panel, options["xlabel"], [], log2=False)
    panels[0].set_ylabel("error (%), mean over seeds")
    handles = [
        Line2D(
            [], [], color=line.get_color(), marker=line.get_marker(), markersize=3.5,
            linestyle=line.get_linestyle(), label=", ".join(curves.said_of(which)),
        )
        for line, (which, _) in zip(panels[0].get_lines(), arms, strict=True)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower left", ncols=4, handlelength=2.6)
    return figure
