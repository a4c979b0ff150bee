"""All claims in short: how many were tested and resolved, and the README's table of them.

Everything here is counted from the lines of ``verdicts.csv``, so that it can be counted again from
what is committed. Agreement with the papers is not the score: the share of resolved claims is.
"""

import csv
import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from normlab.report import tables
from normlab.report.verdicts import NOT_RUN, RESOLVED, VERDICTS

Line = dict[str, str]
"""A line of ``verdicts.csv``: one claim at one scale."""

BEGIN, END = "<!-- normlab report: verdicts -->", "<!-- normlab report: end -->"
"""Between these lines of a README beside the results, a report writes the verdicts."""

SCALES = ("demo", "desk", "gpu", "paper", "pretrained")
"""From the smallest to the largest; a claim is quoted at the largest one that tested it."""


@dataclass(frozen=True)
class Count:
    """Claims by what became of them."""

    claims: int
    verdicts: dict[str, int]
    """By verdict; over several scales a claim may count under more than one."""
    tested: int
    resolved: int

    @property
    def said(self) -> str:
        """For example "12 of 40 (30 %)"."""
        share = f" ({100 * self.resolved / self.claims:.0f} %)" if self.claims else ""
        return f"{self.resolved} of {self.claims}{share}"


def read(verdicts: str) -> list[Line]:
    """The lines of ``verdicts.csv`` from its text."""
    return list(csv.DictReader(io.StringIO(verdicts)))


def count(lines: Iterable[Line]) -> Count:
    """Of the claims among these lines: tested and resolved at one of their scales at least."""
    found: dict[tuple[str, str], set[str]] = {}
    for line in lines:
        found.setdefault((line["experiment"], line["claim"]), set()).add(line["verdict"])
    return Count(
        claims=len(found),
        verdicts={one: sum(one in of for of in found.values()) for one in VERDICTS},
        tested=sum(bool(of - {NOT_RUN}) for of in found.values()),
        resolved=sum(bool(of & set(RESOLVED)) for of in found.values()),
    )


def scales(lines: Iterable[Line]) -> list[str]:
    """The scales that tested a claim, from the smallest on; unknown ones last."""
    found = {line["scale"] for line in lines if line["verdict"] != NOT_RUN}
    return sorted(found, key=lambda scale: ([*SCALES, scale].index(scale), scale))


def sentence(lines: list[Line]) -> str:
    """How many claims there are, and how many were tested and resolved, in one sentence."""
    all_of_them = count(lines)
    return (
        f"{all_of_them.claims} claims; {all_of_them.tested} tested at some scale, "
        f"{all_of_them.said} resolved there (reproduced, contradicted or negligible)."
    )


COUNTED = ["claims", "tested", *VERDICTS[:-1], "resolved"]
"""The header behind the first column of ``counted``."""


def counted(lines: list[Line]) -> list[list[str]]:
    """A row for each scale that tested a claim."""
    rows = []
    for scale in scales(lines):
        here = count(line for line in lines if line["scale"] == scale)
        by_verdict = [str(here.verdicts[verdict]) for verdict in VERDICTS[:-1]]
        rows.append([scale, str(here.claims), str(here.tested), *by_verdict, here.said])
    return rows


def quoted(lines: Iterable[Line]) -> list[Line]:
    """Each tested claim once, at the largest scale that tested it, whatever came out there."""
    found: dict[tuple[str, str], dict[str, Line]] = {}
    for line in lines:
        if line["verdict"] != NOT_RUN:
            by_scale = found.setdefault((line["experiment"], line["claim"]), {})
            by_scale[line["scale"]] = line
    return [by_scale[scales(by_scale.values())[-1]] for by_scale in found.values()]


def effect(line: Line) -> str:
    """Our effect with its interval and unit."""
    unit = line["unit"]
    low, high = (tables.number(float(line[key] or "nan"), unit=unit) for key in ("low", "high"))
    mean = tables.number(float(line["effect"] or "nan"), sign=True, unit=unit)
    interval = f" [{low}, {high}]" if line["low"] else ""
    return tables.with_unit(f"{mean}{interval}", unit)


def published(line: Line) -> str:
    """The paper's effect in our sign, with its unit."""
    unit = line["unit"]
    value = tables.number(float(line["published"] or "nan"), sign=True, unit=unit)
    return tables.with_unit(value, unit)


def readme(lines: list[Line], results: str) -> str:
    """The README's block: counts by scale and experiment, and the primary claims.

    results: the folder of the results as the README links to it.
    """
    by_experiment = []
    for name in dict.fromkeys(line["experiment"] for line in lines):
        of = [line for line in lines if line["experiment"] == name]
        if scales(of):
            all_of_them = count(of)
            by_verdict = [str(all_of_them.verdicts[verdict]) for verdict in VERDICTS[:3]]
            row = [f"[{name}]({results}/{name})", ", ".join(scales(of)), str(all_of_them.claims)]
            by_experiment.append([*row, str(all_of_them.tested), *by_verdict, all_of_them.said])
    claims = [
        [
            f"`{line['experiment']}`: `{line['claim']}`", line["scale"], effect(line),
            published(line), line["paper"], line["verdict"],
        ]
        for line in quoted(line for line in lines if line["label"] == "primary")
    ]  # fmt: skip
    head = ["experiment", "scales", "claims", "tested", *VERDICTS[:3], "resolved"]
    return "\n".join([
        sentence(lines),
        "",
        *tables.grid_lines(["scale", *COUNTED], counted(lines)),
        "",
        "By experiment; a verdict counts where one of its scales gave it:",
        "",
        *tables.grid_lines(head, by_experiment),
        "",
        f"<details><summary>The {len(claims)} primary claims with enough seeds, each at its "
        "largest scale (points unless a unit is given)</summary>",
        "",
        *tables.grid_lines(
            ["claim", "scale", "ours", tables.PAPERS_EFFECT, tables.PAPERS_WORDS, "verdict"], claims
        ),
        "",
        "</details>",
    ])  # fmt: skip


def written_into(page: str, block: str) -> str | None:
    """A README with the block between its marks; None where it has none."""
    before, begin, rest = page.partition(f"{BEGIN}\n")
    _, end, after = rest.partition(f"{END}\n")
    return f"{before}{begin}{block}\n{end}{after}" if begin and end else None


def update(readme_path: Path, lines: list[Line], results: str) -> bool:
    """Whether the README has marks: then the block between them is made again."""
    if not readme_path.is_file():
        return False
    page = readme_path.read_text(encoding="utf-8")
    made = written_into(page, readme(lines, results))
    if made is not None and made != page:
        readme_path.write_text(made, encoding="utf-8")
    return made is not None
