"""What was run where: the sentences and marks that stand beside every number."""

import statistics
from collections.abc import Iterable

from normlab.report.given import DRAWS, NETWORKS
from normlab.report.grid import Results
from normlab.report.tables import axis_name
from normlab.report.verdicts import edited

_MEANT = {
    DRAWS: ": each draws the images that measure one trained network, so that intervals are over"
    " draws and not over trainings",
    NETWORKS: ": each draws the images that measure a network, which counts with their mean",
}


def seeds(results: Results) -> str:
    """How many seeds the cells have: "10", or "3-10" where they differ."""
    counts = sorted(
        {len(results.grid.seeds) - len(gone) for gone in results.missing.values()} or {0}
    )
    return str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"


def repetitions(results: Results) -> str:
    """How many numbers a sample has: one a seed or, of several given networks, one each."""
    if results.repeated != NETWORKS:
        return seeds(results)
    return str(max(len(of) for of in results.values.values()))


def data_name(results: Results) -> str:
    """The data set's name with its note, for example "cifar10 (JPEG copy, lossy)"."""
    names = _distinct(row["data"] for row in results.rows)
    notes = _distinct(row["data_note"] for row in results.rows)
    return names + (f" ({notes})" if notes else "")


def subtitle(results: Results) -> str:
    """Scale, model, data and n: the end of a figure's title. A task may have none of the two."""
    models, data = _distinct(row["model"] for row in results.rows), data_name(results)
    on = " on ".join(name for name in (models, data) if name)
    n = f"n = {repetitions(results)} {results.repeated}"
    return ", ".join(filter(None, (f"scale {results.scale}", on, n)))


def facts(results: Results) -> list[str]:
    """One sentence each: data, device, versions, commit, seeds, time."""
    rows, here = results.rows, results.environment
    if here is None or not rows:
        return []
    seconds = sorted(float(row["seconds"]) for row in rows if row["seconds"])
    threads = _distinct(row["threads"] for row in rows)
    model, data = _distinct(row["model"] for row in rows), data_name(results)
    about = [f"model {model}"] if model else []
    if data:
        about.append(f"data {data}, digest {here.data_digest[:12] or 'unknown'}")
    named = ", ".join(about)
    said = [named[0].upper() + named[1:]] if named else []
    said += [
        f"{len(rows)} runs, {seeds(results)} seeds a cell "
        f"(seeds {_ranges(int(row['seed']) for row in rows)})"
        + _MEANT.get(results.repeated, ""),
        f"Run on {here.device}" + (f", threads: {threads}" if threads else "")
        + f", torch {here.torch}, "
        + f"{_distinct(row['precision'] for row in rows)}, "
        + f"commit {_distinct(row['commit'] for row in rows) or 'unknown'}",
    ]  # fmt: skip
    if seconds:
        said.append(f"{statistics.median(seconds):.3g} s a run (median)")
    return said


def marks(results: Results, source_today: str) -> list[str]:
    """What a reader has to know before believing the numbers; empty when there is nothing."""
    rows = results.rows
    dirty = sum(row["dirty"] == "true" for row in rows)
    older = sum(row["source"] != source_today for row in rows)
    lacking = sum(map(len, results.lacking.values()))
    of_the_runs = {
        "run with uncommitted changes": dirty,
        "made by a source that differs from today's": older,
        "diverged, counted with chance error": results.diverged,
        "lacking an evaluation that the experiment asks for": lacking,
        "older than the claims as they stand (every claim is exploratory)": edited(results),
    }
    beside = {
        "failed, missing here": results.failed,
        "left out because another run fills their cell and seed": results.surplus,
    }
    said = [f"{what}: {count} of {len(rows)} runs" for what, count in of_the_runs.items() if count]
    said += [f"{what}: {count} more runs" for what, count in beside.items() if count]
    return said + [
        f"not pooled with these: {count} runs, {there}" for there, count in results.others.items()
    ]


def missing(results: Results) -> list[tuple[str, str]]:
    """The grid's cells that lack a finished run or evaluations of it, and what fills each.

    For example "NBS 2: seeds 103-109" and "normlab sweep nbs scale=desk nbs=2 seed=103,...".
    """
    cells = []
    for what, seeds_of in (("", results.missing), (", evaluations", results.lacking)):
        for point, gone in seeds_of.items():
            where = ", ".join(f"{axis_name(axis)} {value}" for axis, value in point) or "all"
            if gone:
                command = results.experiment.command(results.scale, point, gone)
                cells.append((f"{where}: seeds {_ranges(gone)}{what}", command))
    return cells


def _distinct(values: Iterable[str]) -> str:
    return ", ".join(sorted({value for value in values if value}))


def _ranges(numbers: Iterable[int]) -> str:
    """1, 2, 3, 7 -> "1-3, 7"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
