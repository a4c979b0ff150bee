"""Networks that the user gives: a grid whose cells are read off its runs, since no file knows them.

A run records beside its model by which weights it began with (``resnet50@<8 hex>``). Each of these
is a network, and models are rows of a table. What repeats a measurement is then the draws of images
for one network, a seed each, or, of several networks of one model, the networks: over its draws
each of them is averaged.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from normlab.experiment import Experiment
from normlab.report.gather import Row

SEEDS, DRAWS, NETWORKS = "seeds", "draws of one network", "networks"
"""What the numbers of a sample are of."""

_MODEL, _WEIGHTS = "model", "@"


def places(
    experiment: Experiment, scale: str, rows: Iterable[Row]
) -> dict[str, tuple[tuple[str, Any], ...]]:
    """Cell -> where it stands, of the runs at this scale that are as the experiment fixes them and
    have any of its measurements."""
    grid = experiment.scales[scale]
    fixed = {key: str(value) for key, value in {**experiment.set, **grid.set}.items()}
    asked = {spec for one in experiment.columns(scale).values() for spec in one.specs}
    at = {axis: value for arm in grid.arms.values() for axis, value in arm.at.items()}
    found = {}
    for row in rows:
        fits = all(row[key] == value for key, value in fixed.items() if key in row)
        if row["scale"] == scale and _WEIGHTS in row["model"] and fits and row["protocol"] in asked:
            here = at | ({"nbs": int(row["nbs"])} if "nbs" in grid.axes else {})
            found[row["cell"]] = (*here.items(), (_MODEL, row["model"].partition(_WEIGHTS)[0]))
    return found


def network(row: Row) -> int:
    """A number for the weights that a run began with."""
    return int(row["model"].partition(_WEIGHTS)[2], 16)


def repeated(runs: Iterable[Row], at: Mapping[str, object]) -> str:
    """What the runs of a scale repeat, by where their cells stand: DRAWS or NETWORKS."""
    of_place = Counter(place for place, _ in {(at[row["cell"]], network(row)) for row in runs})
    return NETWORKS if any(count > 1 for count in of_place.values()) else DRAWS
