"""Cells that an earlier report composed are not composed again, unless something has changed."""

import json

import pytest

from normlab import plugins, runs
from normlab.report import composed, grid

CELLS = [["norm=bn", "nbs=2"], ["norm=bn", "nbs=32"]]


@pytest.fixture
def asked():
    """What was composed; whoever composes a cell says so here."""
    return []


@pytest.fixture
def ask(asked):
    def compose(overrides):
        asked.append(list(overrides))
        return overrides[-1], frozenset({1, 2})

    return lambda cells=CELLS, name="small-demo": composed.remembered(name, cells, compose)


def test_a_second_report_composes_nothing(ask, asked):
    first = ask()
    assert first == [("nbs=2", frozenset({1, 2})), ("nbs=32", frozenset({1, 2}))]
    assert asked == CELLS
    assert ask() == first
    assert asked == CELLS


def test_only_new_cells_are_composed_and_old_ones_forgotten(ask, asked):
    ask()
    ask([CELLS[1], ["norm=gn"]])
    assert asked == [*CELLS, ["norm=gn"]]
    ask([CELLS[0]])
    assert asked[-1] == CELLS[0]


def test_experiments_and_scales_do_not_share(ask, asked):
    ask()
    ask(name="small-desk")
    assert asked == [*CELLS, *CELLS]


@pytest.mark.parametrize("changed", ["source", "conf"])
def test_what_they_depend_on_changes(ask, asked, changed, monkeypatch, tmp_path):
    if changed == "conf":
        (tmp_path / "a.yaml").write_text("a: 1\n")
        monkeypatch.setattr(plugins, "conf_dirs", lambda: [tmp_path])
    ask()
    if changed == "conf":
        (tmp_path / "a.yaml").write_text("a: 2\n")
    else:
        monkeypatch.setattr(runs, "source_digest", lambda: "another")
    ask()
    assert asked == [*CELLS, *CELLS]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"digest": 1}', "null"])
def test_another_file_in_its_place_is_composed_over(ask, asked, content):
    (composed.directory() / "small-demo.json").write_text(content)
    ask()
    assert asked == CELLS
    assert set(json.loads((composed.directory() / "small-demo.json").read_text())) == {
        "digest",
        "cells",
    }


def test_where_nothing_can_be_kept_a_report_is_made_all_the_same(ask, asked, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(composed, "directory", lambda: tmp_path / "file" / "cells")
    assert ask() == ask()
    assert asked == [*CELLS, *CELLS]


def test_an_error_is_the_callers_and_nothing_is_kept():
    def refuse(_):
        raise ValueError("no such norm")

    with pytest.raises(ValueError, match="no such norm"):
        composed.remembered("small-demo", CELLS, refuse)
    assert not list(composed.directory().iterdir())


def test_a_grid_is_the_same_composed_and_remembered(small, monkeypatch):
    first = grid.compose(small, "desk")
    monkeypatch.setattr(grid.config, "compose", lambda _: pytest.fail("composed again"))
    assert grid.compose(small, "desk") == first
    assert first.points
