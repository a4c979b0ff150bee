"""Several axes swept one at a time: a panel for each, changes to the baseline on it.

The papers' changes stand behind ours. Options in the experiment's file: x (axes), xlabel (one for
each), log2, series (protocols).
"""

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from normlab.report.figures import change_label, curves, looks, title
from normlab.report.grid import Results
from normlab.report.tables import axis_name


def draw(results: Results, subtitle: str) -> Figure:
    """One panel per axis, with one scale of changes for all."""
    experiment, options = results.experiment, results.experiment.figure
    figure = Figure(figsize=(7.2, 3.7), layout="constrained")
    panels = figure.subplots(1, len(options["x"]), sharey=True, squeeze=False)[0]
    title(figure, experiment, subtitle)
    told = looks([{}] * len(options["series"]))
    cited: list[str] = []
    for panel, x, xlabel in zip(panels, options["x"], options["xlabel"], strict=True):
        points = [point for point in results.drawn if x in dict(point)]
        xs = [float(dict(point)[x]) for point in points]
        panel.axhline(0, color="#999999", linewidth=0.7, zorder=1)
        for look, protocol in zip(told, options["series"], strict=True):
            for label, at in curves.papers(panel, results, x, protocol, {}, protocol, look):
                xs += at
                cited += [] if label in cited else [label]
            change = curves.curve(points, x, results.change, protocol)
            curves.ours(panel, change, protocol, look)
        base = experiment.baseline.get(x, "the baseline")
        panel.set_title(f"Change from own {axis_name(x)} {base}", loc="left")
        curves.dress(panel, xlabel, xs, log2=bool(options.get("log2")))
    panels[0].set_ylabel(change_label(experiment.protocols[options["series"][0]]))
    handles = [
        Line2D(
            [], [], color=look["color"], marker=look["marker"], markersize=4,
            label=experiment.protocols[protocol].label,
        )
        for protocol, look in zip(options["series"], told, strict=True)
    ]  # fmt: skip
    curves.legend(figure, handles, cited)
    return figure
