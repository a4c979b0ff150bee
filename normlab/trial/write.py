"""What a trial leaves: `trial.csv`, a line per diagnosis, and `trial.md`, its tables."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

from normlab import runs
from normlab.bench.write import machine
from normlab.trial.faults import FAULTS
from normlab.trial.judge import Verdict, alarms, recall, recognized

__all__ = ["as_csv", "page", "read", "results", "summary"]


def summary(verdicts: Sequence[Verdict]) -> str:
    """The result in three lines."""
    return "\n".join(
        [
            f"faults called by a right name: {recall(verdicts)}",
            f"faults in which anything was found: {recognized(verdicts)}",
            f"healthy networks with a problem: {alarms(verdicts)}",
        ]
    )


def results(verdicts: Sequence[Verdict], out: Path, name: str) -> list[Path]:
    """Write `<name>.csv` and `<name>.md` into a folder; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    table, text = out / f"{name}.csv", out / f"{name}.md"
    runs.write_atomically(table, as_csv(verdicts))
    runs.write_atomically(text, page(verdicts))
    return [table, text]


def _here() -> dict[str, str | int | bool]:
    versions = {name: version(name) for name in ("torchvision", "timm")}
    return machine() | versions | {"device": "cpu"}


def as_csv(verdicts: Sequence[Verdict]) -> str:
    """A line per diagnosis, each with the machine and the versions that it was made with."""
    here = _here()
    records = []
    for verdict in verdicts:
        values = {
            key: " ".join(value) if isinstance(value, tuple) else value
            for key, value in asdict(verdict).items()
        }
        values |= {"seconds": f"{verdict.seconds:.1f}", "named": verdict.named}
        records.append(values | here)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def read(path: Path) -> list[Verdict]:
    """The verdicts of a committed `trial.csv`."""
    found = []
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            expected, problems, notices = (
                tuple(row[key].split()) for key in ("expected", "problems", "notices")
            )
            found.append(
                Verdict(
                    network=row["network"],
                    fault=row["fault"],
                    pains=row["pains"],
                    seed=int(row["seed"]),
                    data=row["data"],
                    digest=row["digest"],
                    expected=expected,
                    problems=problems,
                    notices=notices,
                    seconds=float(row["seconds"]),
                )
            )
    return found


def page(verdicts: Sequence[Verdict]) -> str:
    """The tables of a trial, to be read."""
    here = _here()
    seeds = sorted({verdict.seed for verdict in verdicts})
    sets = sorted({f"{verdict.data} {verdict.digest}" for verdict in verdicts})
    lines = [
        "# The trial of `normlab diagnose`",
        "",
        *(f"- {line}" for line in summary(verdicts).splitlines()),
        "",
        "How faults are put in and what counts: `docs/diagnose-trial.md`. Made by "
        "`normlab diagnose --trial`.",
        f"Seeds {seeds[0]} to {seeds[-1]}; data {', '.join(sets)}; {here['processor']}, "
        f"torch {here['torch']}, torchvision {here['torchvision']}, timm {here['timm']}, commit "
        f"{here['commit']}{' (changed)' if here['dirty'] else ''}.",
        "",
        "## Faults",
        "",
        "*yes*: a problem by a right name; *notice*: by a right name in a notice; else, in bold, "
        "what was said instead.",
        "",
        *_faults([verdict for verdict in verdicts if verdict.fault]),
        "",
        "## Healthy networks",
        "",
        *_healthy([verdict for verdict in verdicts if not verdict.fault]),
        "",
    ]
    return "\n".join(lines)


def _faults(verdicts: Sequence[Verdict]) -> list[str]:
    networks = list(dict.fromkeys(verdict.network for verdict in verdicts))
    short = [network.partition(":")[2] for network in networks]
    lines = [
        f"| fault | users' pain | right names | {' | '.join(short)} | problems said besides |",
        "|---|---|---|" + "---|" * len(networks) + "---|",
    ]
    for fault in FAULTS:
        of = {v.network: v for v in verdicts if v.fault == fault.name}
        if not of:
            continue
        cells = [_cell(of[network]) if network in of else "" for network in networks]
        also = Counter(name for verdict in of.values() for name in verdict.besides)
        besides = ", ".join(f"{name} {n}" for name, n in also.most_common())
        names = ", ".join(f"`{name}`" for name in fault.expected)
        lines.append(
            f"| {fault.name} | {fault.pains} | {names} | {' | '.join(cells)} | {besides} |"
        )
    reasons = [f"- {fault.name}: {fault.apart}." for fault in FAULTS if fault.apart]
    return [*lines, "", "Why some have two right names:", "", *reasons]


def _cell(verdict: Verdict) -> str:
    if not {*verdict.expected}.isdisjoint(verdict.problems):
        return "yes"
    if verdict.named:
        return "notice"
    return f"**{', '.join(verdict.problems) or 'nothing'}**"


def _healthy(verdicts: Sequence[Verdict]) -> list[str]:
    lines = ["| network | problems | notices |", "|---|---|---|"]
    for v in verdicts:
        problems = f"**{', '.join(v.problems)}**" if v.problems else "none"
        lines.append(f"| {v.network} | {problems} | {', '.join(v.notices)} |")
    return lines
