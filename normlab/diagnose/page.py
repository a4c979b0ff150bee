"""A diagnosis as a page that needs nothing else, and as tables."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from html import escape
from pathlib import Path

from normlab.diagnose.diagnosis import Diagnosis
from normlab.diagnose.figures import drawn
from normlab.diagnose.findings import MEANINGS, Finding
from normlab.diagnose.layers import Layer
from normlab.diagnose.terminal import COLUMNS, cells, number, scores, told
from normlab.report.page import STYLE, inline_svg
from normlab.runs import write_atomically

__all__ = ["write"]

OWN = """
.finding { border-left: .25rem solid var(--line); padding: .1rem 0 .1rem .9rem; margin: 1.5rem 0; }
.finding.problem { border-color: var(--bad); }
.finding h3 { margin: .2rem 0; }
.finding p { margin: .4rem 0; }
.problem .severity { color: var(--bad); }
.healthy { color: var(--good); }
.ill { color: var(--bad); }
.said { font-size: 1.2rem; font-weight: 600; }
.figures { display: flex; flex-wrap: wrap; gap: 1rem; }
.figures figure { flex: 1 1 20rem; margin: 0; max-width: 34rem; }
"""


def write(found: Diagnosis, folder: Path, *, title: str) -> str:
    """Write index.html, layers.csv and findings.csv into `folder`; a line that says so."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "layers.csv", _layers(found))
    write_atomically(folder / "findings.csv", _findings(found))
    write_atomically(folder / "index.html", _page(found, title))
    return f"{folder / 'index.html'}, layers.csv and findings.csv are written"


def _csv(header: Iterable[str], rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue()


def _layers(found: Diagnosis) -> str:
    names = [field.name for field in fields(Layer)]
    return _csv(names, ([asdict(row)[name] for name in names] for row in found.layers))


def _findings(found: Diagnosis) -> str:
    rows = [
        [
            one.name, one.severity, " ".join(one.layers), one.sentence, one.cure,
            "; ".join(f"{key}={_value(value)}" for key, value in one.evidence.items()),
        ]
        for one in found.findings
    ]  # fmt: skip
    return _csv(["name", "severity", "layers", "sentence", "cure", "evidence"], rows)


def _value(value: float | str) -> str:
    return value if isinstance(value, str) else number(value, 6)


def _page(found: Diagnosis, title: str) -> str:
    heading = escape(f"Diagnosis of {title}")
    look = "healthy" if found.healthy else "ill"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{heading}</title><style>{STYLE}{OWN}</style></head><body>",
        f'<h1>{heading}</h1><p class="said {look}">{escape(found.verdict)}</p>',
    ]
    table = scores(found)
    if len(table) > 1:
        parts += _table("Loss and error by the statistics that normalize", table[0], table[1:])
    parts += [line for finding in found.findings for line in _finding(finding)]
    facts = told(found)
    if facts:
        parts += ["<h2>What the statistics tell besides</h2><ul>"]
        parts += [*(f"<li>{escape(fact)}</li>" for fact in facts), "</ul>"]
    figures = drawn(found)
    if figures:
        parts.append('<div class="figures">')
        for i, (caption, svg) in enumerate(figures.items()):
            parts.append(f"<figure>{inline_svg(svg, f'curve{i}-', caption)}</figure>")
        parts.append("</div>")
    if found.layers:
        parts.append("<h2>Layers</h2>")
        caption = (
            "Stored against precise statistics, the furthest first. Spreads: in units of the "
            "scatter of a batch's mean; std: in standard deviations; ratio: stored / precise "
            "variance, over the channels"
        )
        parts += _table(caption, COLUMNS, cells(found))
    parts.append(
        '<p class="soft">Made by <code>normlab diagnose</code>. The tables are beside this page, '
        "as layers.csv and findings.csv.</p></body></html>"
    )
    return "\n".join(parts) + "\n"


def _finding(finding: Finding) -> list[str]:
    parts = [
        f'<section class="finding {finding.severity}">',
        f'<h3><span class="severity">{finding.severity}</span>: {escape(finding.name)}</h3>',
        f'<p class="soft">{escape(MEANINGS[finding.name])}</p><p>{escape(finding.sentence)}</p>',
    ]
    if finding.cure:
        parts.append(f"<p>Cure: {_with_code(finding.cure)}</p>")
    if finding.layers or finding.evidence:
        parts.append("<details><summary>Evidence and layers</summary>")
        if finding.evidence:
            rows = [[key, _value(value)] for key, value in finding.evidence.items()]
            parts += _table("", ["quantity", "value"], rows)
        if finding.layers:
            names = ", ".join(
                f"<code>{escape(name or '(itself)')}</code>" for name in finding.layers
            )
            parts.append(f"<p>{names}</p>")
        parts.append("</details>")
    return [*parts, "</section>"]


def _with_code(words: str) -> str:
    """Escaped, with what stands between backticks as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(words))


def _table(caption: str, header: Iterable[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A table that scrolls by itself on a narrow screen."""
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    return [
        '<div class="wide"><table>',
        f"<caption>{escape(caption)}</caption>" if caption else "",
        f"<thead><tr>{head}</tr></thead><tbody>",
        *(f"<tr>{row}</tr>" for row in body),
        "</tbody></table></div>",
    ]
