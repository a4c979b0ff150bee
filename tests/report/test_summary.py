"""What is counted over all claims, and where it is written; less than a second."""

import csv
from pathlib import Path

import pytest

from normlab import report
from normlab.report import summary


def line(
    claim: str, scale: str, verdict: str, experiment: str = "nbs", **more: str
) -> summary.Line:
    told = {"effect": "1.5", "low": "1.0", "high": "2.0", "unit": "points", "label": "primary"}
    names = {"experiment": experiment, "claim": claim, "scale": scale, "verdict": verdict}
    return {**told, "published": "-1.0", "paper": "+1 points", **names, **more}


LINES = [
    line("falls", "demo", "not resolved"),
    line("falls", "desk", "reproduced"),
    line("flat", "demo", "contradicted"),
    line("flat", "desk", "not resolved"),
    line("never", "demo", "not run"),
    line("never", "desk", "not run"),
    line("falls", "demo", "negligible", experiment="other", label="exploratory"),
]


def test_a_claim_counts_once_and_is_resolved_where_any_scale_resolves_it():
    found = summary.count(LINES)
    assert (found.claims, found.tested, found.resolved) == (4, 3, 3)
    assert found.said == "3 of 4 (75 %)"
    assert summary.count([]).said == "0 of 0"


def test_by_scale_each_claim_counts_once_there():
    assert summary.counted(LINES) == [
        ["demo", "4", "3", "0", "1", "1", "1", "2 of 4 (50 %)"],
        ["desk", "3", "2", "1", "0", "0", "1", "1 of 3 (33 %)"],
    ]
    assert summary.COUNTED[2:6] == ["reproduced", "contradicted", "negligible", "not resolved"]


def test_scales_are_in_their_order_and_unknown_ones_last():
    lines = [line("a", scale, "reproduced") for scale in ("mine", "paper", "demo", "gpu")]
    assert summary.scales(lines) == ["demo", "gpu", "paper", "mine"]


def test_a_claim_is_quoted_at_its_largest_scale_and_not_at_its_best():
    assert [(one["claim"], one["scale"], one["verdict"]) for one in summary.quoted(LINES)] == [
        ("falls", "desk", "reproduced"),
        ("flat", "desk", "not resolved"),
        ("falls", "demo", "negligible"),
    ]


@pytest.mark.parametrize(
    ("unit", "said"),
    [("points", "+1.50 [1.00, 2.00]"), ("nats", "+1.5 [1, 2] nats")],
)
def test_effects_have_units(unit, said):
    assert summary.effect(line("a", "demo", "reproduced", unit=unit)) == said


def test_the_readmes_block():
    block = summary.readme(LINES, "results")
    assert block.startswith("4 claims; 3 tested at some scale, 3 of 4 (75 %) resolved there")
    assert "[other](results/other)" in block
    rows = [row for row in block.splitlines() if row.startswith("| `")]
    assert [[cell.strip() for cell in row.split("|")[1:3]] for row in rows] == [
        ["`nbs`: `falls`", "desk"],
        ["`nbs`: `flat`", "desk"],
    ]  # the primary ones that were tested
    cells = [cell.strip() for cell in rows[0].split("|")[3:6]]
    assert cells == ["+1.50 [1.00, 2.00]", "−1.00", "+1 points"]  # a sign in words may be another
    assert "| paper's effect | the source says (its own words and sign) |" in block


def test_only_what_stands_between_the_marks_is_written(tmp_path: Path):
    page = f"before\n{summary.BEGIN}\nold\n{summary.END}\nafter\n"
    assert summary.written_into(page, "new") == page.replace("old", "new")
    for other in ("no marks\n", f"{summary.BEGIN}\nno end\n"):
        assert summary.written_into(other, "new") is None
        (tmp_path / "README.md").write_text(other)
        assert not summary.update(tmp_path / "README.md", LINES, "results")
        assert (tmp_path / "README.md").read_text() == other
    assert not summary.update(tmp_path / "none.md", LINES, "results")


@pytest.mark.usefixtures("no_figures")
def test_a_report_writes_the_readme_beside_its_results(recorded: Path, capsys):
    readme = recorded.parent / "README.md"
    readme.write_text(f"# Mine\n{summary.BEGIN}\n{summary.END}\nThe end.\n")
    report.main([], runs="none", results=str(recorded), refresh=False)
    assert f"wrote {readme}" in capsys.readouterr().out
    with (recorded / "verdicts.csv").open(newline="") as file:
        block = summary.readme(list(csv.DictReader(file)), "results")
    written = readme.read_text()
    assert written == f"# Mine\n{summary.BEGIN}\n{block}\n{summary.END}\nThe end.\n"
    report.main([], runs="none", results=str(recorded), refresh=False)
    assert readme.read_text() == written


@pytest.mark.usefixtures("no_figures")
def test_the_page_begins_with_the_verdicts(recorded: Path):
    report.main([], runs="none", results=str(recorded), refresh=False)
    html = (recorded / "index.html").read_text()
    assert html.index("5 claims; 5 tested at some scale") < html.index("Every claim;")
    assert html.index("Every claim;") < html.index("<h2")
    before = html[: html.index("<h2")]
    assert before.count("Training error falls as the NBS grows") == 1  # one row for two scales
    assert before.count('class="verdict') == 10
