"""The table of runs; the other tables are in test_cli."""

import inspect
import os
import re
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import yaml
from test_runs import finished

from normlab import cli, config, norms, show
from normlab.norms import GhostBatchNorm


def test_a_broken_run_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run = finished(tmp_path)
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.yaml").write_text("{}")
    assert show.main("runs", root=str(tmp_path)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[1:]] == [[run.id, "done", "demo", "1", "1.5"]]
    assert str(tmp_path / "broken") in caplog.text


@pytest.mark.parametrize("words", ["show norms", "plan", "report nbs"])
def test_a_reader_who_leaves_early_is_no_error(words: str, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "normlab", *words.split()]
    buffered = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=buffered, cwd=tmp_path, **pipes) as shown:
        assert shown.stdout is not None
        assert shown.stderr is not None
        shown.stdout.close()
        said = shown.stderr.read()
    assert (shown.returncode, said) == (0, b"")


def said(capsys: pytest.CaptureFixture[str], name: str | None = None, **how: bool) -> str:
    assert show.norm(name, **how) == 0
    return capsys.readouterr().out


def test_a_card_is_the_docstring_of_the_layer(capsys: pytest.CaptureFixture[str]) -> None:
    card = said(capsys, "ghost").splitlines()
    assert card[:2] == ["from normlab.norms import GhostBatchNorm", "norm=ghost"]
    assert card[2].startswith("norm.grouping=contiguous norm.population=mean")
    assert "\n".join(card[card.index("") + 1 :]) == inspect.getdoc(GhostBatchNorm)
    assert "nbs: samples per chunk, at least 2" in "\n".join(card)


SAID = {part: rf"(^|[.)]\s+){part}:\s" for part in ("Limits", "Peers", "Source")}
PARTS = {
    "norm": {
        "formula": r"\by(_c)? = ",
        "variance": r"\b(un)?biased\b|\b[Nn]o\s+variance\b",
        "population": r"(^|[.)]\s+)Population:\s|\b[Nn]o\s+population\b",
        **SAID,
        "errors": r"(^|[.)]\s+)Errors:\s|\bRaises\s",
    },
    # What normalizes filters keeps no statistics; its errors are Conv2d's.
    "conv": {"formula": r" / (\|.\||sqrt\()", **SAID},
}
"""What a card has, by its headings, each at the beginning of a sentence."""

LAYERS = [(group, name) for group in PARTS for name in config.options(group) if name != "plain"]


@pytest.mark.parametrize(("group", "name"), LAYERS)
def test_every_card_has_all_its_parts(
    group: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    card = said(capsys, name)
    assert f"\n{group}={name}\n" in card
    parts = PARTS[group].items()
    missing = [part for part, pattern in parts if not re.search(pattern, card, re.MULTILINE)]
    assert missing == [], f"{name}: {', '.join(missing)}"


def test_the_page_of_all_cards_is_what_the_command_prints(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """If this fails, a docstring or an option has changed: `make cards`."""
    page = Path(__file__).resolve().parent.parent / "docs" / "norms.md"
    assert said(capsys, every=True) == page.read_text()


@pytest.mark.parametrize(
    "words", ["show norm gohst", "show norm", "show norms ghost", "show --all"]
)
def test_a_card_that_there_is_not_is_answered_with_those_there_are(
    words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words.split()) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "ghost" in message or "show norm does" in message


def test_an_initialization_is_no_layer(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["show", "norm", "fixup"]) == 2
    message = capsys.readouterr().err
    assert len(message.splitlines()) == 1
    assert "init=fixup beside norm=none" in message
    (place,) = (word for word in message.split() if word.endswith(".py"))
    assert (Path(show.__file__).parent.parent / place).is_file()


def test_the_table_of_norms_says_what_each_is(capsys: pytest.CaptureFixture[str]) -> None:
    """In the first sentence of its docstring, word for word."""
    assert show.main("norms", root="none") == 0
    parts = re.split(r"^(\S+)\s", capsys.readouterr().out, flags=re.MULTILINE)[1:]
    shown = {name: " ".join(row.split()) for name, row in zip(*[iter(parts)] * 2, strict=True)}
    assert set(shown) == set(config.options("norm"))
    for name, path in config.options("norm").items():
        layer = norms.find(yaml.safe_load(path.read_text()).get("module", name))
        doc = " ".join((inspect.getdoc(layer) or "").split())
        said, _, keys = shown[name].partition(" batch=")
        assert keys, name
        assert said.endswith("."), name
        assert doc.startswith(f"{said} "), name


@pytest.mark.parametrize(
    ("file", "place", "said"),
    [
        ("deep/rms.py", "mine.deep.rms:Rms", "Scales only, by 1.5 at most."),
        ("__init__.py", "mine:Rms", "Scales only, by 1.5 at most."),
        ("__init__.py", "mine:Elsewhere", ""),
        ("deep/rms.py", "mine.gone:Rms", ""),
    ],
)
def test_what_a_packages_norm_is_comes_from_its_file_without_importing_it(
    file: str, place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mine" / file
    path.parent.mkdir(parents=True)
    (tmp_path / "mine" / "__init__.py").touch()
    card = '"""Scales only,\n    by 1.5 at most. More."""'
    path.write_text(f"raise ImportError\n\nclass Base:\n    pass\n\nclass Rms:\n    {card}\n")
    monkeypatch.syspath_prepend(tmp_path)
    point = EntryPoint("rms", place, "normlab.norms")
    monkeypatch.setattr(show.plugins, "entry_points", lambda _: {"rms": point})
    assert show._first_sentence("rms") == said


def test_tables_need_no_torch(tmp_path: Path) -> None:
    code = "import sys; from normlab import cli; cli.main(['show', 'norms']);"
    code += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
