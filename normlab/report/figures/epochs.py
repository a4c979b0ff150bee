"""Numbers over the epochs of training: a panel for each protocol, a line for each arm.

All panels have one axis of numbers, and each line the band of its 95 % interval over seeds.

Options in the experiment's file: series (protocols), by (axes that tell the lines apart), and
x: epoch. The runs must have been evaluated along the way (`eval_last`).
"""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from normlab.report.figures import axis_label, curves, looks, title
from normlab.report.grid import Results
from normlab.report.statistics import Sample


def draw(results: Results, subtitle: str) -> Figure:
    """One panel per protocol.

    Raises ValueError where `by` leaves several cells to a line.
    """
    experiment, options = results.experiment, results.experiment.figure
    figure = Figure(figsize=(7.2, 3.9), layout="constrained")
    panels = figure.subplots(1, len(options["series"]), sharey=True, squeeze=False)[0]
    title(figure, experiment, subtitle)
    arms = curves.single(results)
    for panel, protocol in zip(panels, options["series"], strict=True):
        for look, (which, point) in zip(looks([which for which, _ in arms]), arms, strict=True):
            over = results.along(point, protocol)
            epochs = sorted(over)
            samples = [Sample.of(over[epoch].values()) for epoch in epochs]
            panel.plot(
                epochs, [sample.mean for sample in samples], markersize=2.5, linewidth=1.1, **look,
                label=f"ours {protocol} {' '.join(map(str, which.values()))}",
            )  # fmt: skip
            bounds = [sample.interval() for sample in samples]
            panel.fill_between(
                epochs, [low for low, _ in bounds], [high for _, high in bounds],
                color=look["color"], alpha=0.18, linewidth=0,
            )  # fmt: skip
        panel.set_title(experiment.protocols[protocol].label, loc="left")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        curves.dress(panel, options["xlabel"], [], log2=False)
    column = experiment.protocols[options["series"][0]]
    panels[0].set_ylabel(f"{axis_label(column)}, mean and 95 % interval over seeds")
    handles = [
        Line2D(
            [], [], color=line.get_color(), marker=line.get_marker(), markersize=3.5,
            linestyle=line.get_linestyle(), label=", ".join(curves.said_of(which)),
        )
        for line, (which, _) in zip(panels[0].get_lines(), arms, strict=True)
    ]  # fmt: skip
    figure.legend(handles=handles, loc="outside lower left", ncols=4, handlelength=2.6)
    return figure
