"""Tables: ours beside the paper's, each against its own baseline, safe in every format."""

import csv
import io
import math

import pytest

from normlab.experiment import Published
from normlab.report import tables
from normlab.report.statistics import Sample


def lines(results) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(tables.table_csv(results))))


def test_the_paper_stands_beside_with_its_own_difference(make_runs, results_of):
    (line,) = [
        line
        for line in lines(results_of(make_runs("desk")))
        if (line["nbs"], line["protocol"]) == ("2", "test_precise")
    ]
    assert (line["n"], line["paper_value"], line["paper_change"]) == ("10", "32.5", "9.1")
    assert line["paper_source"] == "A paper, Fig 1 (ImageNet)"
    assert float(line["value"]) == pytest.approx(46.0, abs=1)
    assert float(line["change"]) == pytest.approx(46.0 - 41.4, abs=0.5)


def test_no_paper_is_an_empty_cell(make_runs, results_of):
    line = next(
        line for line in lines(results_of(make_runs("desk"))) if line["protocol"] == "test_batch"
    )
    assert (line["paper_value"], line["paper_source"]) == ("", "")


def test_a_second_source_gets_a_line_of_its_own(small, make_runs, results_of):
    second = Published("Another", "nbs", {"test_precise": {2: 30.0, 32: 25.0}})
    small.published.append(second)
    results = results_of(make_runs("desk"))
    found = [
        (line["paper_value"], line["paper_change"])
        for line in lines(results)
        if (line["nbs"], line["protocol"]) == ("2", "test_precise")
    ]
    assert found == [("32.5", "9.1"), ("30.0", "5.0")]
    assert "| 32.5 / 30 |" in tables.markdown(results, [])


def test_missing_numbers_are_shown_as_missing(make_run, results_of):
    results = results_of(make_run("desk", 2, 100, {"test_precise": 40.0}))
    row = next(row for row in tables.texts(results)[0].rows if row[0] == "2")
    assert row == ["2", "0-1", "–", "16.5", "–", "40.00", "32.5"]


@pytest.mark.parametrize(
    ("value", "sign", "expected"),
    [
        (1.005, False, "1.00"),
        (-0.001, True, "+0.00"),
        (-3.456, True, "−3.46"),
        (math.nan, True, "–"),
    ],
)
def test_numbers_for_the_eye(value, sign, expected):
    assert tables.number(value, sign=sign) == expected


def test_one_seed_has_no_interval():
    assert tables.estimate(Sample.of([40.0])) == "40.00"
    assert tables.estimate(Sample.of([40.0, 40.0])) == "40.00 ± 0.00"


@pytest.mark.parametrize(
    ("p", "expected"), [(0.0, "< 0.001"), (0.0234, "0.023"), (1.0, "1"), (math.nan, "–")]
)
def test_p_values(p, expected):
    assert tables.p_value(p) == expected


def test_latex_is_escaped(make_runs, results_of):
    text = tables.latex(results_of(make_runs("desk")), ["100 % of_it"])
    caption = r"\caption{A small \textless{}experiment\textgreater{} \& its table, scale desk. "
    assert caption + r"Error in \%," in text
    assert r" $\pm$ " in text
    assert text.count(r"\begin{tabular}{lrrrrrr}") == 2
    rows = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.count(" & ") for line in rows} == {6}


def test_latex_escapes_each_special_character():
    assert tables.latex_escape(r"a\b_{c}^~#$") == (
        r"a\textbackslash{}b\_\{c\}\textasciicircum{}\textasciitilde{}\#\$"
    )


def test_a_bar_in_a_label_does_not_break_the_table():
    assert tables.grid_lines(["a|b", "c"], [["1", "2"]])[0] == r"| a\|b |   c |"
