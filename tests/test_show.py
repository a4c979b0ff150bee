"""The table of runs; the other tables are in test_cli."""

import inspect
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_runs import finished

from normlab import cli, config, show
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


def test_every_norm_has_a_card_of_more_than_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    for name in config.options("norm"):
        card = said(capsys, name)
        assert f"\nnorm={name}\n" in card
        assert len(card.split()) > 40, name


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


def test_tables_need_no_torch(tmp_path: Path) -> None:
    code = "import sys; from normlab import cli; cli.main(['show', 'norms']);"
    code += "print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert done.stdout.splitlines()[-1] == "False"
