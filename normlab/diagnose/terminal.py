"""A diagnosis as text: the verdict, what the statistics cost, findings with cures, layers."""

import math
import re
from collections.abc import Mapping, Sequence
from textwrap import fill

from normlab.diagnose.diagnosis import Diagnosis
from normlab.diagnose.findings import Finding

__all__ = ["COLUMNS", "aligned", "cells", "number", "scores", "text", "told"]

WIDTH = 100

COLUMNS = (
    "layer", "mean off (spreads)", "mean off (std)", "var ratio", "lowest", "highest",
    "dead", "updates",
)  # fmt: skip
"""Of the table of layers, on the terminal as on the page."""


def number(value: float, digits: int = 3) -> str:
    """In few digits; nothing for NaN."""
    if value != value:
        return ""
    return f"{value:.{digits}g}" if abs(value) < 1e5 else f"{value:.0e}"


def cells(found: Diagnosis) -> list[list[str]]:
    """A row for each layer, the furthest from precise statistics first."""
    rows = []
    for row in found.layers:
        values = (row.spread, row.deviations, row.ratio, row.low, row.high)
        rows.append([row.name, *map(number, values), str(row.dead or ""), str(row.updates or "")])
    return rows


def scores(found: Diagnosis) -> list[list[str]]:
    """Data, samples, and loss and error with each of the statistics; with a header."""
    there = {statistics for _, statistics in found.scores}
    kinds = [kind for kind in ("stored", "precise", "batch", "adapted") if kind in there]
    table = [["loss, error", "samples", *kinds]]
    for data in dict.fromkeys(data for data, _ in found.scores):
        one = {kind: found.scores[data, kind] for kind in kinds if (data, kind) in found.scores}
        samples = max(score["samples"] for score in one.values())
        table.append([data, f"{samples:.0f}", *(_score(one.get(kind)) for kind in kinds)])
    return table


def _score(score: Mapping[str, float] | None) -> str:
    if score is None or math.isnan(score["loss"]):
        return ""
    error = f", {100 * score['error']:.1f} %" if score["error"] == score["error"] else ""
    return number(score["loss"]) + error


def told(found: Diagnosis) -> list[str]:
    """What the statistics tell besides, a sentence each."""
    facts, said = found.facts, []
    noise, usual = (
        facts.get("scatter of the stored means"),
        facts.get("scatter of an average of the model's momentum"),
    )
    if isinstance(noise, float) and isinstance(usual, float):
        words = (
            f"The stored means are off by {max(noise, 0):.2g} of the variance of one batch's mean "
            f"at an NBS of {facts['NBS']}; an average with the model's momentum scatters by "
            f"{usual:.2g}"
        )
        nbs = facts.get("NBS by the noise, at least")
        if isinstance(nbs, float) and nbs >= 2:  # else weights that moved are most of it
            words += f", so its batches had {nbs:.0f} samples or more"
        said.append(words + ".")
    if "time constant in updates" in facts and "updates" in facts:
        said.append(
            f"Its time constant is {facts['time constant in updates']:.3g} updates; the layers "
            f"count {facts['updates']}, after which the initial values weigh "
            f"{facts['weight of the initial values']:.1g}."
        )
    for name, curve in found.curves.items():
        what = {"samples": "samples", "batch": "samples in a batch"}[name]
        if curve.needed is not None:
            said.append(
                f"An estimate of this model's statistics is as good with {curve.needed} {what} as "
                f"with {curve.xs[-1]} (tried: {', '.join(map(str, curve.xs))})."
            )
    return said


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in table
    ]


def _finding(finding: Finding) -> list[str]:
    lines = [f"{finding.severity}: {finding.name}"]
    lines.append(_wrapped(finding.sentence))
    if finding.layers:
        more = f" and {len(finding.layers) - 3} more" if len(finding.layers) > 3 else ""
        lines.append(_wrapped(f"layers: {', '.join(map(_name, finding.layers[:3]))}{more}"))
    if finding.cure:
        lines += _cure(finding.cure)
    return lines


def _cure(cure: str) -> list[str]:
    """Commands on lines of their own, so that they can be copied."""
    lines = []
    for words in re.split(r"(`normlab [^`]*`)", f"cure: {cure}"):
        if words.startswith("`normlab "):
            lines.append(f"    {words.strip('`')}")
        elif words.strip(" ;"):
            lines.append(_wrapped(words.strip(" ;")))
    return lines


def _name(layer: str) -> str:
    return layer or "the model itself"


def _wrapped(words: str) -> str:
    return fill(
        words, WIDTH, initial_indent="  ", subsequent_indent="  ", break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip


def text(found: Diagnosis, *, rows: int) -> str:
    """All of it, at most WIDTH wide but for names, with the first `rows` layers."""
    lines = [found.verdict, ""]
    if found.scores:
        lines += [*aligned(scores(found)), ""]
    for finding in found.findings:
        lines += [*_finding(finding), ""]
    lines += [fill(said, WIDTH) for said in told(found)]
    table = [_shortened(row) for row in cells(found)[:rows]]
    if table:
        lines += ["", *aligned([list(COLUMNS), *table])]
    if len(found.layers) > rows:
        lines.append(f"and {len(found.layers) - rows} layers that are nearer")
    return "\n".join(lines)


def _shortened(row: list[str]) -> list[str]:
    name = _name(row[0])
    return [name if len(name) <= 34 else f"...{name[-31:]}", *row[1:]]
