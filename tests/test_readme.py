"""What the README shows of cheap commands is what they print."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def shown(*commands: str) -> list[tuple[str, str]]:
    """(arguments, output) of the README's `normlab` commands that begin so."""
    blocks = re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL)
    parts = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)]
    found = [part.removeprefix("normlab ").partition("\n") for part in parts]
    return [(line, output.strip()) for line, _, output in found if line.startswith(commands)]


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


def numbers_of_the_desk() -> list[str]:
    """The README's table of verdicts, from the record."""
    record = README.parent / "results" / "verdicts.csv"
    with record.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["scale"] == "desk"]
    return [
        f"| `{row['claim']}` | {row['paper']} | {float(row['effect']):+.2f} "
        f"[{float(row['low']):.2f}, {float(row['high']):.2f}] | {row['verdict']} |"
        for row in rows
        if row["experiment"] == "nbs" and row["label"] == "primary"
    ]


def test_the_readmes_numbers_are_those_of_the_record() -> None:
    expected = numbers_of_the_desk()
    assert len(expected) == 7
    for line in expected:
        assert line in README.read_text().splitlines(), line
