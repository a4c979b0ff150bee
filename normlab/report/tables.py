"""The table of one experiment at one scale, ours beside the paper's, as CSV, Markdown and LaTeX."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from normlab.experiment import COLUMN, PERCENT, Experiment
from normlab.report.gather import csv_text
from normlab.report.grid import Point, Results
from normlab.report.papers import Paper, published
from normlab.report.statistics import Sample
from normlab.report.verdicts import Outcome, Verdict

MISSING = "–"

VALIDATION = (
    "what papers call validation is compared with our test split; our own validation split is kept "
    "for choices"
)

POINTS = "points"
"""The unit of differences between percents, which needs no mention in a table of verdicts."""

TABLE_COLUMNS = [
    "protocol", "unit", "n", "value", "half_width", "change", "change_half_width",
    "paper_value", "paper_change", "paper_source",
]  # fmt: skip
VERDICT_COLUMNS = [
    "experiment", "claim", "kind", "scale", "n", "effect", "low", "high", "level", "delta", "unit",
    "p_holm", "published", "paper", "verdict", "label", "followup", "note",
]  # fmt: skip
FACT_COLUMNS = [
    "experiment",
    "fact",
    "scale",
    "n",
    "worst",
    "tolerance",
    "unit",
    "paper",
    "outcome",
]


@dataclass(frozen=True)
class Entry:
    """Ours and the papers' at one point of the grid under one protocol."""

    point: Point
    protocol: str
    unit: str
    value: Sample
    change: Sample
    papers: tuple[Paper, ...]


def entries(results: Results) -> list[list[Entry]]:
    """Rows of the table (grid points), each with an entry per column (protocol)."""
    columns = results.experiment.table["columns"]
    return [
        [
            Entry(
                point,
                protocol,
                results.experiment.protocols[protocol].unit,
                results.sample(point, protocol),
                results.change(point, protocol),
                tuple(published(results, point, protocol)),
            )
            for protocol in columns
        ]
        for point in results.shown
    ]


def table_csv(results: Results) -> str:
    """One line per point, protocol and source: means and 95 % half-widths, in `unit`.

    Differences of percents are in points, others in the same unit.
    """
    axes = places(results)
    lines: list[dict[str, Any]] = []
    for entry in (entry for row in entries(results) for entry in row):
        ours = {
            **dict(entry.point),
            "protocol": entry.protocol,
            "unit": entry.unit,
            "n": entry.value.n,
            "value": rounded(entry.value.mean, entry.unit),
            "half_width": rounded(entry.value.half(), entry.unit),
            "change": rounded(entry.change.mean, entry.unit),
            "change_half_width": rounded(entry.change.half(), entry.unit),
        }
        for paper in entry.papers or (None,):
            theirs = paper and {
                "paper_value": paper.value,
                "paper_change": rounded(paper.change, entry.unit),
                "paper_source": paper.source,
            }
            lines.append(ours | (theirs or {}))
    return csv_text(lines, axes + TABLE_COLUMNS)


def places(results: Results) -> list[str]:
    """What tells the grid's points apart, in order; not every point has all of them."""
    return list(dict.fromkeys(axis for point in results.shown for axis, _ in point))


def number(value: float, *, sign: bool = False, unit: str = PERCENT, digits: int = 2) -> str:
    """A number as people read it, with a real minus sign; the missing mark for nan.

    Percents and points have `digits` decimals, other units three significant digits.
    """
    if math.isnan(value):
        return MISSING
    plus = "+" if sign else ""
    if unit in (PERCENT, POINTS):
        value = round(value, digits) + 0.0  # no "-0.00"
        return f"{value:{plus}.{digits}f}".replace("-", "−")
    return f"{value + 0.0:{plus}.3g}".replace("-", "−")


def estimate(sample: Sample, *, sign: bool = False, unit: str = PERCENT) -> str:
    """Mean ± half-width of the 95 % interval; the mean alone for one seed."""
    mean = number(sample.mean, sign=sign, unit=unit)
    return mean if sample.n < 2 else f"{mean} ± {number(sample.half(), unit=unit)}"


def interval(low: float, high: float, level: int, unit: str = PERCENT) -> str:
    """An interval with its confidence, for example "[0.12, 0.80] 95 %"."""
    if math.isnan(low):
        return MISSING
    return f"[{number(low, unit=unit)}, {number(high, unit=unit)}] {level} %"


PAPERS_EFFECT = "paper's effect"
"""Heads the sources' numbers that stand beside ours, as the same contrast of what they printed."""

PAPERS_WORDS = "the source says (its own words and sign)"


def with_unit(value: str, unit: str) -> str:
    """A number with its unit: points, which most are, go without saying."""
    return value if unit == POINTS or value == MISSING else f"{value} {unit}"


def p_value(p: float) -> str:
    """Two digits, "< 0.001" below that, the missing mark for nan."""
    if math.isnan(p):
        return MISSING
    return "< 0.001" if p < 0.001 else f"{p:.2g}"


@dataclass(frozen=True)
class Text:
    """A table ready to be set: a caption, a header and cells."""

    caption: str
    header: list[str]
    rows: list[list[str]]


def texts(results: Results) -> list[Text]:
    """Two tables for the eye: the numbers, and each side's differences to its own baseline."""
    experiment, rows = results.experiment, entries(results)
    axes = places(results)
    cited = {
        protocol: [s for s in experiment.published if protocol in s.values]
        for protocol in experiment.table["columns"]
    }
    header = [*map(axis_name, axes), "n"]
    for protocol, sources in cited.items():
        column = experiment.protocols[protocol]
        named = column.label if column.unit == PERCENT else f"{column.label} ({column.unit})"
        header += [named, *(["paper"] if sources else [])]
    errors, changes = [], []
    for row in rows:
        counts = sorted({entry.value.n for entry in row})
        at = dict(row[0].point)
        head = [str(at.get(axis, "")) for axis in axes]
        head.append("-".join(map(str, counts[:: max(1, len(counts) - 1)])))
        one, two = list(head), list(head)
        for entry in row:
            one.append(estimate(entry.value, unit=entry.unit))
            here = results.baseline(entry.point) == entry.point
            here &= experiment.base(entry.protocol) == entry.protocol
            change = estimate(entry.change, sign=True, unit=entry.unit)
            two.append("0" if here and entry.value.n else change)
            if cited[entry.protocol]:
                one.append(" / ".join(f"{p.value:g}" for p in entry.papers) or MISSING)
                theirs = [
                    "0"
                    if here and paper.change == 0
                    else number(paper.change, sign=True, unit=entry.unit, digits=1)
                    for paper in entry.papers
                ]
                two.append(" / ".join(theirs) or MISSING)
        errors.append(one)
        changes.append(two)
    units = {experiment.protocols[protocol].unit for protocol in experiment.table["columns"]}
    plain = units == {PERCENT}
    numbers, differences = ("Error in %, m", "percentage points") if plain else (
        "In % unless a column says otherwise, m", "points (%) or the column's unit"
    )  # fmt: skip
    over = results.repeated
    shown = [Text(f"{numbers}ean ± half-width of the 95 % interval over {over}", header, errors)]
    if experiment.baseline:
        caption = f"Difference to the same side's own {baseline_name(experiment)} in {differences}"
        shown.append(Text(f"{caption}, paired over {over}", header, changes))
    return shown


def axis_name(axis: str) -> str:
    return "NBS" if axis == "nbs" else axis.replace("_", " ")


def baseline_name(experiment: Experiment) -> str:
    """The baseline as a reader says it, for example "NBS 32"."""
    named = experiment.baseline.get(COLUMN, [])
    columns = [named] if isinstance(named, str) else named
    said = [experiment.protocols[key].label for key in columns[:1]]
    axes = {axis: value for axis, value in experiment.baseline.items() if axis != COLUMN}
    return ", ".join([*said, *(f"{axis_name(axis)} {value}" for axis, value in axes.items())])


def sources(experiment: Experiment) -> list[str]:
    """Which source the "paper" columns quote, by protocol label, and of which split."""
    said = list(dict.fromkeys(  # one source may stand in the file in parts
        f"{source.label}: {', '.join(experiment.protocols[p].label for p in source.values)}"
        for source in experiment.published
    ))  # fmt: skip
    quoted = {protocol for source in experiment.published for protocol in source.values}
    if any(experiment.protocols[protocol].split == "test" for protocol in quoted):
        said.append(VALIDATION)
    return said


def markdown(results: Results, facts: Sequence[str]) -> str:
    """The table page of one scale. `facts`: what was run where, one sentence each."""
    experiment, differs = results.experiment, results.experiment.differs_at(results.scale)
    lines = [
        f"<!-- normlab report {experiment.name} -->",
        f"# {experiment.title}, scale {results.scale}",
        "",
        *(f"- {fact}" for fact in facts),
        *(f"- Paper: {source}" for source in sources(experiment)),
        *([f"- Differs from the paper: {differs}"] if differs else []),
    ]
    for table in texts(results):
        lines += ["", f"{table.caption}:", "", *grid_lines(table.header, table.rows)]
    return "\n".join(lines) + "\n"


def grid_lines(header: list[str], rows: list[list[str]]) -> list[str]:
    """A Markdown table; everything but the first column is aligned right."""
    safe = [[cell.replace("|", "\\|") for cell in row] for row in [header, *rows]]
    widths = [max(3, *(len(row[i]) for row in safe)) for i in range(len(header))]
    rule = ["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    body = [
        [
            cell.ljust(w) if i == 0 else cell.rjust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        for row in safe
    ]
    return [f"| {' | '.join(row)} |" for row in [body[0], rule, *body[1:]]]


_LATEX = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "±": r"$\pm$", "−": "$-$", "–": "--",
}  # fmt: skip


def latex_escape(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)


def latex(results: Results, facts: Sequence[str]) -> str:
    """The same two tables as `table` environments for the booktabs package."""
    experiment = results.experiment
    lines = [f"% normlab report {experiment.name}", *(f"% {fact}" for fact in facts)]
    for table in texts(results):
        caption = f"{experiment.title}, scale {results.scale}. {table.caption}."
        differs = experiment.differs_at(results.scale)
        caption += f" Differs from the paper: {differs}." * bool(differs)
        lines += [
            "",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex_escape(caption)}}}",
            rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
            r"\toprule",
            " & ".join(map(latex_escape, table.header)) + r" \\",
            r"\midrule",
            *(" & ".join(map(latex_escape, row)) + r" \\" for row in table.rows),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    return "\n".join(lines) + "\n"


def verdicts_csv(verdicts: Iterable[tuple[str, Verdict]]) -> str:
    """Every verdict of every experiment: (experiment name, verdict) -> one line each.

    `low` and `high` bound the interval of confidence `level` %; `effect`, `delta` and both bounds
    in `unit`; `p_holm` only for primary claims that have runs; `followup` only where contradicted.
    `published`: the paper's effect, in the sign of `effect`; `paper`: what the source says, in its
    own words and sign.
    """
    return csv_text(
        (
            {
                "experiment": name,
                "claim": one.claim.name,
                "kind": one.claim.kind,
                "scale": one.scale,
                "n": one.n,
                "effect": rounded(one.effect, one.claim.unit),
                "low": rounded(one.low, one.claim.unit),
                "high": rounded(one.high, one.claim.unit),
                "level": one.level,
                "delta": one.claim.margin,
                "unit": one.claim.unit,
                "p_holm": float(f"{one.p_holm:.4g}"),
                "published": rounded(one.published, one.claim.unit),
                "paper": one.claim.paper,
                "verdict": one.verdict,
                "label": one.label,
                "followup": one.followup,
                "note": "; ".join(one.notes),
            }
            for name, one in verdicts
        ),
        VERDICT_COLUMNS,
    )


def facts_csv(outcomes: Iterable[tuple[str, Outcome]]) -> str:
    """Every fact of every experiment: (experiment name, outcome) -> one line each."""
    return csv_text(
        (
            {
                "experiment": name,
                "fact": one.fact.name,
                "scale": one.scale,
                "n": one.n,
                "worst": float(f"{one.worst:.3g}"),
                "tolerance": one.fact.tolerance,
                "unit": one.fact.unit,
                "paper": one.fact.paper,
                "outcome": one.outcome,
            }
            for name, one in outcomes
        ),
        FACT_COLUMNS,
    )


def rounded(value: float, unit: str = PERCENT) -> float:
    """Rounded for the CSV: the last bits of scipy's quantiles differ between its versions.

    Percents and points to four decimals, other units to six significant digits.
    """
    if math.isnan(value):
        return value
    return round(value, 4) + 0.0 if unit in (PERCENT, POINTS) else float(f"{value:.6g}")
