"""`normlab diagnose`: exit codes, what is printed and what is written; the docs' tables."""

import csv
import re
from pathlib import Path

import pytest
import torch

from diagnose.networks import Trained, norms
from normlab.cli import main
from normlab.diagnose import MEANINGS
from normlab.trial.write import read, summary

ROOT = Path(__file__).parents[2]
MINE = Path(__file__).with_name("theirs.py")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def diagnose(state: dict[str, torch.Tensor], *options: str) -> int:
    torch.save(state, "model.pt")
    given = ["--model", f"{MINE}:make_model", "--data", f"{MINE}:make_batches"]
    return main(["diagnose", *given, "--checkpoint", "model.pt", *options])


def test_nothing_wrong(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert diagnose(trained.net.state_dict()) == 0
    assert capsys.readouterr().out.startswith("healthy")
    assert [path.name for path in Path().iterdir()] == ["model.pt"]


def test_a_problem_with_its_cure_and_the_files(
    trained: Trained, capsys: pytest.CaptureFixture[str]
) -> None:
    model = trained.copy()
    for norm in norms(model).values():
        norm.reset_running_stats()
    assert diagnose(model.state_dict(), "--out", "page", "--rows", "2") == 1
    said = capsys.readouterr().out
    assert said.startswith("1 problem: never_updated")
    assert "normlab recalibrate --checkpoint model.pt --model" in said
    with Path("page/findings.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["name"], row["severity"]) for row in found] == [("never_updated", "problem")]
    with Path("page/layers.csv").open(newline="") as file:
        assert {row["name"] for row in csv.DictReader(file)} == set(norms(model))
    page = Path("page/index.html").read_text()
    assert "1 problem: never_updated" in page
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    asked = re.findall(r"""(?:src|href)=["'](?!#)[^"']*|url\((?!#)|@import""", page)
    assert asked == []  # from no network and no file beside it


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--nbs", "1"], "nbs is 2 to 32"),
        (["--rows", "0"], "--rows is 1 at least"),
        (["--out", "model.pt"], "is a file"),
    ],
)
def test_refused(
    trained: Trained, capsys: pytest.CaptureFixture[str], options: list[str], says: str
) -> None:
    assert diagnose(trained.net.state_dict(), *options) == 2
    assert says in capsys.readouterr().err


def test_the_docs_know_every_finding() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs/diagnose.md").read_text(), re.M)
    assert dict(rows) == dict(MEANINGS)


def test_the_docs_summary_is_the_table_s() -> None:
    verdicts = read(ROOT / "results/diagnose/trial.csv")
    assert len(verdicts) == 130
    text = (ROOT / "docs/diagnose-trial.md").read_text()
    for line in summary(verdicts).splitlines():
        assert f"- {line}" in text
