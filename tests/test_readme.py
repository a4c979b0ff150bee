"""What the README shows of cheap commands is what they print."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def shown() -> list[tuple[str, str]]:
    """(arguments, output) of every `normlab plan` and `normlab show` in the README."""
    blocks = re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL)
    commands = [part for block in blocks for part in re.split(r"^\$ ", block, flags=re.MULTILINE)]
    found = [command.partition("\n") for command in commands]
    return [
        (line.removeprefix("normlab "), output.strip())
        for line, _, output in found
        if line.startswith(("normlab plan", "normlab show"))
    ]


@pytest.mark.parametrize(("arguments", "output"), shown())
def test_the_readme_shows_what_is_printed(arguments: str, output: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "normlab", *arguments.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout or done.stderr).strip() == output


def test_the_readme_shows_some() -> None:
    assert len(shown()) >= 3
