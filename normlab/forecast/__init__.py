"""`normlab sweep <name> --dry-run`: what a sweep would run, and what that takes; nothing is run.

The cells come from the experiment and the overrides as a sweep's do. A few of those that are left
to do are probed: some real training steps and evaluation batches each, in a scratch directory.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from normlab import config, engines, experiment
from normlab.forecast.cells import Cell, listed
from normlab.forecast.probing import Cost, probe, warm_up

Kind = tuple[str, ...]

PROBES = 4
"""Cells to probe at most; the others are taken to cost what the most similar of them does."""


def main(name: str, overrides: Sequence[str]) -> int:
    """Print the cells, what each and all of them take; returns the exit code.

    Raises ValueError or OSError where the sweep would refuse every cell.
    """
    loaded = experiment.load(name)
    cells = listed(name, overrides)
    kinds: dict[Kind, Cell] = {}
    for cell in cells:
        if cell.left:
            kinds.setdefault(cell.kind, cell)
    jobs = _side_by_side(overrides)
    cores = os.cpu_count() or 1
    if kinds:
        warm_up(next(iter(kinds.values())).config)
    costs = {
        kind: probe(kinds[kind].config, threads=max(1, cores // jobs) if jobs > 1 else None)
        for kind in spread(kinds, PROBES)
    }
    rows = [(cell, *_cost(cell, kinds, costs)) for cell in cells]
    print(f"{loaded.name}: {loaded.title}")
    print(_table(rows))
    print(*_closing(rows, kinds, costs, min(jobs, cores)), sep="\n")
    return 0


def _side_by_side(overrides: Sequence[str]) -> int:
    """How many cells the chosen engine runs at once on this machine."""
    engine, cores = engines.chosen(overrides), os.cpu_count() or 1
    if engine == "basic":
        return 1
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    jobs = given.get("hydra.launcher.n_jobs", "-1")
    if not jobs.lstrip("-").isdigit() or int(jobs) == 0:
        raise config.ConfigError(f"hydra.launcher.n_jobs takes a number of jobs, got {jobs}")
    return int(jobs) if int(jobs) > 0 else max(1, cores + 1 + int(jobs))


def spread(kinds: dict[Kind, Cell], most: int) -> list[Kind]:
    """At most so many of the kinds, each as unlike as can be to those before it."""
    left = list(kinds)
    chosen = left[:1]
    while left and len(chosen) < min(most, len(kinds)):
        chosen.append(
            max(
                left,
                key=lambda kind: min(
                    distance(kinds[kind].config, kinds[other].config) for other in chosen
                ),
            )
        )
    return chosen


def _cost(
    cell: Cell, kinds: dict[Kind, Cell], costs: dict[Kind, Cost | None]
) -> tuple[Cost | None, Kind | None]:
    """What is left of a cell costs, and the kind that was probed for it."""
    if not cell.left:
        return None, None
    kind = min(costs, key=lambda other: distance(cell.config, kinds[other].config))
    cost = costs[kind]
    if cost is None:
        return None, kind
    return replace(cost, seconds=cost.seconds * cell.left + cell.composing), kind


def distance(one: dict[str, Any], other: dict[str, Any]) -> tuple[int, float]:
    """How unlike two runs are in what they take: in how many keys, and by which factor in the NBS.

    Learning rates and the like take no time.
    """
    differ = {key for key, _ in _flat(one).items() ^ _flat(other).items()} - {
        "nbs",
        "micro_batch",
        "lr",
        "decay",
        "seed",
    }
    sizes = [value for value in (one["nbs"], other["nbs"]) if value]
    factor = abs(math.log2(sizes[0] / sizes[1])) if len(sizes) == 2 else float(len(sizes))
    return len(differ), factor


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """Dotted key -> value, as text."""
    if not isinstance(value, dict):
        return {key: str(value)}
    found: dict[str, str] = {}
    for inner, below in value.items():
        found |= _flat(below, f"{key}.{inner}" if key else inner)
    return found


# -- in words -------------------------------------------------------------------------------------

Row = tuple[Cell, Cost | None, Kind | None]


def _table(rows: Sequence[Row]) -> str:
    lines = [["id", "settings", "state", "time", "memory", "disk"]]
    for cell, cost, kind in rows:
        about = "" if kind == cell.kind else "~"
        costs = ["", "", ""] if not cell.left else ["?", "?", "?"]
        if cost:
            costs = [about + duration(cost.seconds), size(cost.memory), size(cost.disk)]
        lines.append([cell.id, " ".join(cell.settings), cell.state, *costs])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _closing(
    rows: Sequence[Row],
    kinds: dict[Kind, Cell],
    costs: dict[Kind, Cost | None],
    jobs: int,
) -> list[str]:
    """The totals of what is left to do, and what the numbers come from."""
    states = [cell.state for cell, _, _ in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    said = [f"{len(rows)} cells: {counts}"]
    said += sorted({f"refused: {cell.refusal}" for cell, _, _ in rows if cell.refusal})
    known = [cost for _, cost, _ in rows if cost]
    if known:
        seconds = sum(cost.seconds for cost in known)
        memory = sum(sorted((cost.memory for cost in known), reverse=True)[:jobs])
        said.append(
            f"to do: {len(known)} cells, {duration(seconds)}; {jobs} side by side: "
            f"{duration(seconds / jobs)}, {size(memory)} of memory, "
            f"{size(sum(cost.disk for cost in known))} of disk"
        )
        probed = [" ".join(kind) or "the cell" for kind, cost in costs.items() if cost]
        said.append(f"probed on this machine, as busy as it is: {'; '.join(probed)}")
        if len(costs) < len(kinds):
            said.append("~: as the most similar of these")
    if unknown := sum(bool(cell.left and not cost) for cell, cost, _ in rows):
        said.append(f"?: {unknown} cells of several ranks or of tasks, which are not probed")
    return said


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    if minutes < 100:
        return f"{minutes:.0f} min"
    return f"{minutes / 60:.1f} h"


def size(count: int) -> str:
    """Bytes as a person says them."""
    for unit, one in (("GB", 1e9), ("MB", 1e6)):
        if count >= one:
            return f"{count / one:.1f} {unit}"
    return f"{count / 1e3:.0f} kB"
