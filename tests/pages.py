"""Pages of documentation, run from top to bottom."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from normlab import cli

ROOT = Path(__file__).resolve().parent.parent


def blocks(text: str) -> Iterator[tuple[str, str]]:
    """(language, content) of the fenced blocks of a page."""
    return iter(re.findall(r"^```(\w+)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE))


def commands(block: str) -> list[tuple[str, str]]:
    """(command line, output) of what is typed in a block of the console."""
    _, *typed = re.split(r"^\$ ", block, flags=re.MULTILINE)
    joined = (one.replace("\\\n", " ").partition("\n") for one in typed)
    return [(line, output.strip()) for line, _, output in joined]


def shown_as(printed: str) -> "re.Pattern[str]":
    """What fits a shown output: numbers with a point, and how columns are set, are this machine's;
    three points stand for anything."""
    pattern = re.escape(printed)
    pattern = re.sub(r"(?:\\\ |\\\n)*\\\.\\\.\\\.(?:\\\ |\\\n)*", r"[\\s\\S]*", pattern)
    pattern = re.sub(r"(?<![\w.])\d+\\\.\d+(?![\w.])", r"\\d+\\.\\d+", pattern)
    return re.compile(re.sub(r"(?:\\\ )+", r" +", pattern))


def run(page: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    """Execute a page in the working directory: Python blocks in one namespace, which is returned,
    those that begin with a file's name into that file; and the commands of normlab, whose output
    has to be as shown. Blocks in other languages are for elsewhere."""
    names: dict[str, object] = {}
    for language, content in blocks(page.read_text()):
        named = re.match(r"# (\w+\.py)\n", content)
        if language == "python" and named:
            Path(named[1]).write_text(content)
        elif language == "python":
            exec(compile(content, f"{page.name}: {content[:30]!r}", "exec"), names)
        elif language == "console":
            for line, output in commands(content):
                program, *arguments = shlex.split(line)
                assert program == "normlab", f"{page.name}: {line} is no command to run"
                capsys.readouterr()
                cli.main(arguments)
                told = capsys.readouterr()
                printed = (told.out or told.err).strip()
                assert shown_as(output).fullmatch(printed), f"{page.name}: {line}\n{printed}"
    return names
