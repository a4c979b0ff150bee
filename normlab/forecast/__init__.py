"""`normlab sweep <name> --dry-run`: what a sweep would run, and what that takes; nothing is run.

The cells come from the experiment and the overrides as a sweep's do. A few of those that are left
to do are probed: some real training steps and evaluation batches each, in a scratch directory.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

from normlab import config, engines, experiment
from normlab.forecast.cells import Cell, listed
from normlab.forecast.probing import Cost, probe, warm_up

PROBES = 4
"""Cells to probe at most; the others are taken to cost what the most similar of them does."""


def main(name: str, overrides: Sequence[str]) -> int:
    """Print the cells, what each and all of them take; returns the exit code.

    Raises ValueError or OSError where the sweep would refuse every cell.
    """
    loaded = experiment.load(name)
    cells = listed(name, overrides)
    kinds: dict[tuple[str, ...], Cell] = {}
    for cell in cells:
        if cell.left:
            kinds.setdefault(cell.kind, cell)
    jobs = _side_by_side(overrides)
    cores = os.cpu_count() or 1
    if kinds:
        warm_up(next(iter(kinds.values())).config)
    costs = {
        kind: probe(kinds[kind].config, threads=max(1, cores // jobs) if jobs > 1 else None)
        for kind in spread(list(kinds), PROBES)
    }
    rows = [(cell, *_cost(cell, costs)) for cell in cells]
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


def spread(kinds: list[tuple[str, ...]], most: int) -> list[tuple[str, ...]]:
    """At most so many of the kinds: the first, the last, and those evenly between."""
    if len(kinds) <= most:
        return kinds
    return [kinds[round(i * (len(kinds) - 1) / (most - 1))] for i in range(most)]


def _cost(
    cell: Cell, costs: dict[tuple[str, ...], Cost | None]
) -> tuple[Cost | None, tuple[str, ...] | None]:
    """What is left of a cell costs, and the kind that was probed for it."""
    if not cell.left or not costs:
        return None, None
    kind = min(costs, key=lambda other: _distance(cell.kind, other))
    cost = costs[kind]
    if cost is None:
        return None, kind
    return replace(cost, seconds=cost.seconds * cell.left + cell.composing), kind


def _distance(kind: tuple[str, ...], other: tuple[str, ...]) -> tuple[int, float]:
    """How unlike two kinds are: in how many settings, and by which factors in numbers."""
    differ = [(a, b) for a, b in zip(kind, other, strict=True) if a != b]
    factor = 0.0
    for a, b in differ:
        (_, _, x), (_, _, y) = a.partition("="), b.partition("=")
        if x.isdigit() and y.isdigit():
            factor += abs(int(x).bit_length() - int(y).bit_length())
    return len(differ), factor


# -- in words -------------------------------------------------------------------------------------

Row = tuple[Cell, Cost | None, tuple[str, ...] | None]


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
    kinds: dict[tuple[str, ...], Cell],
    costs: dict[tuple[str, ...], Cost | None],
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
        said.append(f"?: {unknown} cells of several ranks, which are not probed")
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
