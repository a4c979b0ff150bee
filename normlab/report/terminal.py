"""What ``normlab report`` prints: verdicts in short, files, and how to fill what is missing."""

import os
from pathlib import Path

from normlab.report import provenance
from normlab.report.page import ExperimentReport, ScaleReport
from normlab.report.tables import PAPERS_EFFECT, interval, number, p_value, with_unit
from normlab.report.verdicts import HOLDS, NOT_RUN


def experiment(report: ExperimentReport, written: list[Path]) -> str:
    """One experiment over its scales, ready to print."""
    lines = [f"{report.experiment.name}: {report.experiment.title}"]
    if report.again:
        lines.append(f"  note: {report.again}")
    if report.orphans:
        lines.append(f"  note: {report.orphans} committed runs are no cell of today's grid")
    for name, scale in report.scales.items():
        lines += ["", *_scale(report, name, scale)]
    if written:
        names = " ".join(path.name for path in written)
        lines += ["", f"wrote {written[0].parent}{os.sep}: {names}"]
    return "\n".join(lines) + "\n"


def _scale(report: ExperimentReport, name: str, scale: ScaleReport) -> list[str]:
    command, found = report.experiment.command(name), scale.results
    if scale.grid.problem:
        return [f"  scale {name}: not reported, {scale.grid.problem}"]
    if not found.rows:
        return [f"  scale {name}: not run, fill it with: {command}"]
    lines = [f"  {provenance.subtitle(found)}"]
    rows = [["claim", "verdict", "effect", "interval", "margin", "n", "p (Holm)", PAPERS_EFFECT]]
    for one in scale.verdicts:
        rows.append([
            one.claim.name + ("" if one.label == "primary" else " (exploratory)"),
            one.verdict,
            number(one.effect, sign=True, unit=one.claim.unit),
            interval(one.low, one.high, one.level, one.claim.unit),
            with_unit(f"{one.claim.margin:g}", one.claim.unit),
            str(one.n),
            p_value(one.p_holm),
            number(one.published, sign=True, unit=one.claim.unit),
        ])  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("    " + "  ".join(cells).rstrip())
    lines += [
        f"    follow-up of {one.claim.name}: {one.followup}"
        for one in scale.verdicts
        if one.followup
    ]
    if checked := [one for one in scale.facts if one.outcome != NOT_RUN]:
        held = sum(one.outcome == HOLDS for one in checked)
        lines.append(f"    exact facts: {held} of {len(checked)} hold")
    lines += [f"    note: {mark}" for mark in scale.marks]
    if not found.complete:
        total = len(found.points) * len(found.grid.seeds)
        gone = sum(map(len, found.missing.values()))
        lacking = sum(map(len, found.lacking.values()))
        said = [f"{gone} of {total} runs are missing"] if gone else []
        said += [f"{lacking} of {total} lack evaluations"] if lacking else []
        lines.append(f"    {', '.join(said)}, fill them with: {command}")
        lines += [f"      {cell}: {fill}" for cell, fill in provenance.missing(found)]
    return lines
