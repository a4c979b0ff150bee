"""What the README shows of cheap commands is what they print."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pages
import pytest

from normlab.report import summary

README = Path(__file__).resolve().parent.parent / "README.md"


def shown(*commands: str) -> list[tuple[str, str]]:
    """(arguments, output) of the README's `normlab` commands that begin so."""
    console = [block for kind, block in pages.blocks(README.read_text()) if kind == "console"]
    typed = [each for block in console for each in pages.commands(block)]
    found = [(line.removeprefix("normlab "), output) for line, output in typed]
    return [(line, output) for line, output in found if line.startswith(commands)]


def normlab(arguments: str, where: Path) -> "subprocess.CompletedProcess[str]":
    """Run it as on a machine without a GPU and with nothing set: a run's id tells them apart."""
    command = [sys.executable, "-m", "normlab", *arguments.split()]
    plain = {key: value for key, value in os.environ.items() if key != "NORMLAB_DATA"}
    return subprocess.run(
        command, cwd=where, capture_output=True, text=True, env=plain | {"CUDA_VISIBLE_DEVICES": ""}
    )


@pytest.mark.parametrize(("arguments", "output"), shown("plan", "show"))
def test_the_readme_shows_what_is_printed(arguments: str, output: str, tmp_path: Path) -> None:
    done = normlab(arguments, tmp_path)
    assert (done.stdout or done.stderr).strip() == output


def test_the_readme_shows_a_run_as_it_is(tmp_path: Path) -> None:
    """Id, keys and layout: the numbers are this machine's."""
    ran = shown("train norm=ghost nbs=32", "eval tiny-ghost")
    assert len(ran) == 2
    for arguments, output in ran:
        done = normlab(arguments, tmp_path)
        assert without_numbers(done.stdout.strip()) == without_numbers(output)


def without_numbers(text: str) -> str:
    return re.sub(r"\d+\.\d\d %", "0.00 %", text)


def test_the_readme_shows_some() -> None:
    assert len(shown("plan", "show")) >= 3


def block() -> str:
    """What the report has written into the README."""
    _, _, rest = README.read_text().partition("<!-- normlab report: verdicts -->\n")
    inside, end, _ = rest.partition("<!-- normlab report: end -->")
    assert end
    return inside


def record() -> list[dict[str, str]]:
    with (README.parent / "results" / "verdicts.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_readme_has_the_reports_table() -> None:
    """Whoever has written a report: `normlab report` makes it again."""
    assert block() == summary.readme(record(), "results") + "\n"


def test_the_readmes_numbers_are_those_of_the_record() -> None:
    """Counted and spelled here once more, by another way."""
    verdicts: dict[str, set[str]] = {}
    for row in record():
        verdicts.setdefault(f"{row['experiment']}.{row['claim']}", set()).add(row["verdict"])
    resolved = sum(not of <= {"not resolved", "not run"} for of in verdicts.values())
    assert block().startswith(f"{len(verdicts)} claims; ")
    assert f" {resolved} of {len(verdicts)} (" in block().splitlines()[0]
    nbs = [
        row for row in record()
        if (row["experiment"], row["scale"], row["label"]) == ("nbs", "desk", "primary")
    ]  # fmt: skip
    assert len(nbs) == 7
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block().splitlines()]
    for row in nbs:
        effect, low, high = (float(row[key]) for key in ("effect", "low", "high"))
        ours = f"{effect:+.2f} [{low:.2f}, {high:.2f}]".replace("-", "−")
        claim = f"`nbs`: `{row['claim']}`"
        paper = f"{float(row['published']):+.2f}".replace("-", "−") if row["published"] else "–"
        assert [claim, "desk", ours, paper, row["paper"], row["verdict"]] in lines
