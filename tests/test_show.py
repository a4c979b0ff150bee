"""The table of runs; the other tables are in test_cli."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_runs import finished

from normlab import show


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
