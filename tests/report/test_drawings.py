"""Figures that an earlier report drew are not drawn again, unless what they show has changed."""

from dataclasses import replace

import pytest

from normlab.report import composed, drawings, figures
from normlab.report.drawings import drawn


@pytest.fixture
def results(make_runs, results_of):
    return results_of(make_runs("desk"))


@pytest.fixture
def times(monkeypatch):
    """How often a figure was drawn."""
    calls = []

    def draw(results, subtitle):
        calls.append(subtitle)
        return figures_draw(results, subtitle)

    figures_draw = figures.draw
    monkeypatch.setattr(figures, "draw", draw)
    return calls


def test_the_bytes_are_those_of_drawing_again(results, times):
    first = drawn(results, "n = 3")
    figure = figures.draw(results, "n = 3")
    assert first == {kind: figures.render(figure, kind) for kind in ("png", "svg")}
    assert first["png"].startswith(b"\x89PNG")
    assert drawn(results, "n = 3") == first
    assert len(times) == 2  # one of them by this test


@pytest.mark.parametrize("changed", ["a number", "the subtitle", "the code"])
def test_what_it_shows_changes(results, times, changed, monkeypatch):
    first = drawn(results, "n = 3")
    if changed == "a number":
        (key, by_seed), *_ = results.values.items()
        values = {**results.values, key: {seed: one + 1 for seed, one in by_seed.items()}}
        results = replace(results, values=values)
    if changed == "the code":
        monkeypatch.setattr(drawings, "_drawing", lambda: b"another")
    again = drawn(results, "n = 4" if changed == "the subtitle" else "n = 3")
    assert len(times) == 2
    assert (again == first) == (changed == "the code")


def test_a_home_that_cannot_be_written_to(results, times, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(composed, "directory", lambda: tmp_path / "file" / "report")
    assert drawn(results, "n = 3") == drawn(results, "n = 3")
    assert len(times) == 2


def test_half_a_memory_is_none(results, times):
    first = drawn(results, "n = 3")
    (svg,) = composed.directory().glob("*.svg")
    svg.unlink()
    assert drawn(results, "n = 3") == first
    assert len(times) == 2
