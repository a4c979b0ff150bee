"""``results/index.html``: every experiment, claim and number on one page, needing nothing else."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

from normlab.experiment import Experiment
from normlab.report import provenance, summary, tables
from normlab.report.gather import Again
from normlab.report.grid import Grid, Results
from normlab.report.tables import number, with_unit
from normlab.report.verdicts import HOLDS, NOT_RUN, Outcome, Verdict


@dataclass(frozen=True)
class ScaleReport:
    """One experiment at one scale as it will be shown."""

    grid: Grid
    results: Results
    marks: list[str]
    figure: str
    """The figure as SVG, or "" when there is no run."""
    verdicts: list[Verdict] = field(default_factory=list)
    facts: list[Outcome] = field(default_factory=list)


@dataclass(frozen=True)
class ExperimentReport:
    experiment: Experiment
    scales: dict[str, ScaleReport]
    again: Again | None
    orphans: int
    """Committed runs that are no cell of any grid today."""


STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1c1c1c; --soft: #5a5a5a; --line: #d9d9d9; --paper: #fff; --card: #f3f3f0;
  --good: #00785a; --bad: #b84a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ink: #ececec; --soft: #a8a8a8; --line: #444; --paper: #161616; --card: #262626;
    --good: #4ccba6; --bad: #ff9a57;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 1rem; max-width: 84rem;
  color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif;
}
h1 { font-size: 1.5rem; }
h2 { margin-top: 2.5rem; border-top: 1px solid var(--line); padding-top: 1rem; }
h3 { margin-top: 2rem; }
a { color: inherit; }
.soft, caption { color: var(--soft); }
.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: .4rem; }
th, td {
  padding: .3rem .6rem; border-bottom: 1px solid var(--line);
  text-align: right; vertical-align: top;
}
td { white-space: nowrap; }
td:first-child, th:first-child, td.text, th.text { text-align: left; }
td.text { white-space: normal; min-width: 14rem; }
td.short { min-width: 9rem; }
p, li { max-width: 56rem; }
figure { margin: 1rem 0; max-width: 62rem; }
figure svg { width: 100%; height: auto; background: #fff; border-radius: .4rem; }
code {
  background: var(--card); padding: .1rem .3rem; border-radius: .2rem;
  overflow-wrap: anywhere;
}
.mark { border-left: .25rem solid var(--bad); padding-left: .6rem; }
.verdict { font-weight: 600; }
.reproduced { color: var(--good); }
.contradicted { color: var(--bad); }
details { margin: .5rem 0; }
summary { cursor: pointer; }
"""


def page(reports: Sequence[ExperimentReport], lines: list[summary.Line]) -> str:
    """The whole page; `lines`: of ``verdicts.csv``. Every value not written here is escaped."""
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>normlab results</title><style>{STYLE}</style></head><body>",
        "<h1>normlab results</h1>",
        *_summary(reports, lines),
        '<p class="soft">Made by <code>normlab report</code>. Errors in %, differences in '
        "percentage points where no unit is given, intervals over seeds. A claim is declared "
        "before its runs; docs/claims.md says how it is judged. All runs stand in "
        "<code>&lt;experiment&gt;/runs.csv</code>, all verdicts in <code>verdicts.csv</code>.</p>",
    ]
    for report in reports:
        parts += _experiment(report)
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _summary(reports: Sequence[ExperimentReport], lines: list[summary.Line]) -> list[str]:
    """How many claims were tested and resolved, and the verdict on every one."""
    parts = [f"<p>{escape(summary.sentence(lines))}{escape(_facts_in_short(reports))}</p>"]
    if not summary.scales(lines):
        return [*parts, "<p>Nothing has been run yet.</p>"]
    rows = [row for report in reports for row in _claims_of(report)]
    words = tables.PAPERS_WORDS
    # What a phone shows comes first.
    head = ["claim", "scale", "verdict", "ours", tables.PAPERS_EFFECT, words, "label"]
    parts += _table("Every claim; of a shape, the contrast that decides", head, rows)
    counted = map(_row, summary.counted(lines))
    return parts + _table("How many, by scale", ["scale", *summary.COUNTED], counted)


def _facts_in_short(reports: Sequence[ExperimentReport]) -> str:
    """For example " Exact facts, which are no claims: 3 of 4 hold."; "" where none was checked."""
    found = [one for report in reports for scale in report.scales.values() for one in scale.facts]
    checked = [one for one in found if one.outcome != NOT_RUN]
    if not checked:
        return ""
    held = sum(one.outcome == HOLDS for one in checked)
    return f" Exact facts, which are no claims: {held} of {len(checked)} hold."


def _claims_of(report: ExperimentReport) -> Iterable[str]:
    """A row for each claim and scale that tested it; one row for a claim that none did."""
    name = report.experiment.name
    for claim in report.experiment.claims.values():
        found = [
            verdict
            for one in report.scales.values()
            for verdict in one.verdicts
            if verdict.claim.name == claim.name
        ]
        tested = [one for one in found if one.verdict != NOT_RUN] or found[:1]
        for i, one in enumerate(tested):
            span = f' rowspan="{len(tested)}"' if len(tested) > 1 else ""
            link = f'<a href="#{escape(name)}">{escape(name)}</a>: {escape(claim.sentence)}'
            run = one.verdict != NOT_RUN
            anchor = f"#{escape(name)}-{escape(one.scale)}"
            cells = [
                f'<td class="text"{span}>{link}</td>' if i == 0 else "",
                f'<td><a href="{anchor}">{escape(one.scale)}</a></td>' if run else "<td></td>",
                f"<td>{_said(one)}</td>",
                _cell(_effect(one)),
                _cell(_published(one)),
                f'<td class="text short"{span}>{escape(claim.paper)}</td>' if i == 0 else "",
                _cell(one.label),
            ]
            yield f"<tr>{''.join(cells)}</tr>"


def _effect(one: Verdict) -> str:
    """Effect, interval and unit."""
    effect = number(one.effect, sign=True, unit=one.claim.unit)
    bounds = tables.interval(one.low, one.high, one.level, one.claim.unit)
    return with_unit(effect if bounds == tables.MISSING else f"{effect} {bounds}", one.claim.unit)


def _published(one: Verdict) -> str:
    """The paper's effect with its unit."""
    unit = one.claim.unit
    return with_unit(number(one.published, sign=True, unit=unit), unit)


def _said(one: Verdict) -> str:
    """The verdict, and where a contradicted claim is followed up, as HTML."""
    style = escape(one.verdict.replace(" ", "-"))
    said = f'<span class="verdict {style}">{escape(one.verdict)}</span>'
    return said + (f"<br>follow-up: {escape(one.followup)}" if one.followup else "")


def _experiment(report: ExperimentReport) -> list[str]:
    experiment = report.experiment
    parts = [
        f'<h2 id="{escape(experiment.name)}">{escape(experiment.title)}</h2>',
        f"<p>{escape(experiment.source)}</p>",
    ]
    if experiment.differs:
        parts.append(f"<p>Differs from the paper: {escape(experiment.differs)}</p>")
    if report.again:
        parts.append(f'<p class="mark">{escape(str(report.again))}.</p>')
    if report.orphans:
        parts.append(
            f'<p class="mark">{report.orphans} committed runs are no cell of today\'s grid: '
            "kept in runs.csv, judged nowhere.</p>"
        )
    for scale, one in report.scales.items():
        parts += _scale(experiment, scale, one)
    return parts


def _scale(experiment: Experiment, scale: str, one: ScaleReport) -> list[str]:
    command = f"<code>{escape(experiment.command(scale))}</code>"
    parts = [f'<h3 id="{escape(experiment.name)}-{escape(scale)}">Scale {escape(scale)}</h3>']
    results = one.results
    if one.grid.problem:
        return [*parts, f'<p class="mark">Not reported: {escape(one.grid.problem)}.</p>']
    if not results.rows:
        return [*parts, f"<p>Not run. {command}</p>"]
    parts += ["<ul>", *(f"<li>{escape(fact)}</li>" for fact in provenance.facts(results))]
    parts += [*(f'<li class="mark">{escape(mark)}</li>' for mark in one.marks), "</ul>"]
    if one.figure:
        caption = f"{experiment.title}: {provenance.subtitle(results)}"
        svg = inline_svg(one.figure, f"{experiment.name}-{scale}-", caption)
        parts += ["<figure>", svg, "</figure>"]
    parts += _verdicts(one.verdicts) + _facts(one.facts)
    for table in tables.texts(results):
        parts += _table(table.caption, table.header, map(_row, table.rows))
    quoted = "; ".join(tables.sources(experiment))
    if quoted:
        parts.append(f'<p class="soft">Paper: {escape(quoted)}.</p>')
    gone = provenance.missing(results)
    if gone:
        parts.append(f"<p>Missing cells, all filled by {command}, or one by one:</p><ul>")
        parts += [f"<li>{escape(cell)}: <code>{escape(fill)}</code></li>" for cell, fill in gone]
        parts.append("</ul>")
    return parts


def _verdicts(verdicts: Iterable[Verdict]) -> list[str]:
    rows = []
    for one in verdicts:
        unit = one.claim.unit
        exploratory = ["exploratory"] if not one.claim.primary else []
        cells = [
            _cell(one.claim.sentence, "text"),
            f"<td>{_said(one)}</td>",
            _cell(one.claim.kind),
            _cell(number(one.effect, sign=True, unit=unit)),
            _cell(tables.interval(one.low, one.high, one.level, unit)),
            _cell(with_unit(f"{one.claim.margin:g}", unit)),
            _cell(str(one.n)),
            _cell(tables.p_value(one.p_holm)),
            _cell(_published(one)),
            _cell(one.claim.paper, "text"),
            _cell("; ".join([*exploratory, *one.notes]), "text"),
        ]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    head = ["claim", "verdict", "kind", "effect", "interval", "margin", "n", "p (Holm)"]
    head += [tables.PAPERS_EFFECT, tables.PAPERS_WORDS, "note"]
    parts = _table("Verdicts; of a shape, the contrast that decides", head, rows)
    shapes = [one for one in verdicts if len(one.contrasts) > 1]
    if not shapes:
        return parts
    parts.append("<details><summary>Every contrast of the shapes</summary>")
    for one in shapes:
        lines = [
            [
                each.label,
                str(each.sample.n),
                number(each.sample.mean, sign=True, unit=one.claim.unit),
                tables.interval(*each.sample.interval(), 95, one.claim.unit),
                number(each.published, sign=True, unit=one.claim.unit),
                each.verdict,
            ]
            for each in one.contrasts
        ]
        beyond = f"beyond {with_unit(f'{one.claim.margin:g}', one.claim.unit)}?"
        head = ["contrast", "n", "effect", "interval", tables.PAPERS_EFFECT, beyond]
        parts += _table(one.claim.sentence, head, map(_row, lines))
    return [*parts, "</details>"]


def _facts(outcomes: Iterable[Outcome]) -> list[str]:
    rows = [
        [
            one.fact.sentence, one.outcome, str(one.n),
            with_unit(number(one.worst, unit=""), one.fact.unit),
            with_unit(f"{one.fact.tolerance:g}", one.fact.unit), one.fact.paper, one.note,
        ]
        for one in outcomes
    ]  # fmt: skip
    head = ["fact", "", "n", "largest deviation", "tolerance", "paper", "note"]
    return _table("Exact facts, which are no claims", head, map(_row, rows)) if rows else []


def _cell(text: str, style: str = "") -> str:
    return f'<td class="{style}">{escape(text)}</td>' if style else f"<td>{escape(text)}</td>"


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(map(_cell, cells))}</tr>"


def _table(caption: str, header: Iterable[str], rows: Iterable[str]) -> list[str]:
    """A table that scrolls by itself on a narrow screen; `rows` are HTML already."""
    prose = ("claim", "note", tables.PAPERS_WORDS)
    head = "".join(
        f"<th{' class=text' if name in prose else ''}>{escape(name)}</th>" for name in header
    )
    return [
        '<div class="wide"><table>',
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>",
        *rows,
        "</tbody></table></div>",
    ]


def inline_svg(svg: str, prefix: str, title: str) -> str:
    """An SVG file as an element of the page: no prolog, its identifiers made unique by `prefix`.

    matplotlib numbers glyphs and clip paths alike in every figure: without a prefix the second
    figure of a page would borrow from the first.
    """
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="([^"]+)"', rf'id="{prefix}\1"', body)
    body = re.sub(r'href="#([^"]+)"', rf'href="#{prefix}\1"', body)
    body = re.sub(r"url\(#([^)]+)\)", rf"url(#{prefix}\1)", body)
    label = f'<svg role="img" aria-label="{escape(title)}"'
    return body.replace("<svg", label, 1)
