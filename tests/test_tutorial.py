"""The tutorial and the page on installation, run from top to bottom."""

import itertools
import re

import pytest
import torch
from pages import ROOT, run, shown_as

PAGES = [*sorted((ROOT / "docs" / "tutorial").glob("*.md")), ROOT / "docs" / "installation.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
@pytest.mark.usefixtures("elsewhere")
def test_a_page_runs(page, capsys, monkeypatch, tmp_path):
    """As on a machine without a GPU, and with nothing set."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("NORMLAB_DATA", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    names = run(page, capsys)
    if page.stem.startswith("2"):  # the diagnosis that the text speaks of
        assert names["found"].verdict == "1 problem: momentum_too_small"
        stored, precise = (names["found"].scores["test", of] for of in ("stored", "precise"))
        assert stored["error"] > 0.3 > 0.15 > precise["error"]


def test_the_page_on_the_library_runs_and_its_numbers_are_what_it_says(capsys):
    torch.manual_seed(0)
    names = run(ROOT / "docs" / "library.md", capsys)
    layers = [type(layer).__name__ for layer in names["model"]]
    assert layers.count("BatchNorm") == 3  # of normlab: the last example's
    assert names["better"] < names["ghost"] - 1  # points
    assert names["report"].after.error < names["report"].before.error - 5
    (problem,) = (one for one in names["found"].findings if one.severity == "problem")
    assert (problem.name, problem.layers) == ("never_updated", ["1", "4", "7"])
    assert names["adapted"] < names["source"] - 10


@pytest.mark.parametrize(
    ("shown", "printed", "fits"),
    [
        ("val:ema 3.00 % error", "val:ema  4.67 % error", True),
        ("val:ema 3.00 % error", "val:emb 3.00 % error", False),
        ("micro_batch  32", "micro_batch  33", False),
        ("run tiny-s0-178dc906", "run tiny-s0-178dc907", False),
        ("...\na 1\n...\nb", "x\ny\na 1\nz\nb", True),
        ("...\na 1\n...\nb", "x\ny\na 2\nz\nb", False),
        ("", "something", False),
    ],
)
def test_what_is_shown_is_held_to_what_is_printed(shown, printed, fits):
    assert bool(shown_as(shown).fullmatch(printed)) == fits


def test_the_pages_lead_from_one_to_the_next():
    tutorial = [page for page in PAGES if page.parent.name == "tutorial"]
    for page, following in itertools.pairwise(tutorial):
        (link,) = re.findall(r"^Next: \[[^]]+\]\(([^)]+)\)", page.read_text(), re.MULTILINE)
        assert page.parent / link == following
    assert [page.name[0] for page in tutorial] == ["1", "2", "3", "4"]
