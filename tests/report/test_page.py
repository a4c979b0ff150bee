"""The page of a report: whole, with nothing from elsewhere, and every value escaped."""

from html.parser import HTMLParser
from pathlib import Path

import pytest

from normlab import report
from normlab.report import gather
from normlab.runs import COLUMNS


class Page(HTMLParser):
    """Tags in balance, identifiers once, nothing loaded from elsewhere."""

    VOID = frozenset({"meta", "br", "img", "link", "path", "use", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("src", "href", "xlink:href"):
                self.links.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page(recorded: Path):
    report.main([], runs="none", results=str(recorded), refresh=False)
    html = (recorded / "index.html").read_text()
    page = Page()
    page.feed(html)
    assert page.open == []
    assert len(page.ids) == len(set(page.ids)) > 10
    assert all(link.startswith("#") for link in page.links)
    assert {link[1:] for link in page.links} <= set(page.ids)
    for css in ("url(http", "@import", "<script", "http-equiv"):
        assert css not in html
    for said in (
        "A small <experiment> & its table",
        "normlab sweep small scale=demo",
        "NBS 128: seeds 107-109: normlab sweep small scale=demo nbs=128 seed=107,108,109",
        "NBS 8: seeds 104: normlab sweep small scale=demo nbs=8 seed=104",
        "what papers call validation is compared with our test split",
        "diverged, counted with chance error: 1 of 40 runs",
        "commit 0123456789ab",
        "cifar10 (JPEG copy, lossy)",
        "not pooled with these: 2 runs, torch 2.15.0 on cpu",
        "made by a source that differs from today's",
        "A paper, Fig 1 (ImageNet)",
        "+train_batch(nbs=2) -train_batch(nbs=8)",
        "Not run.",
    ):
        assert said in page.text, said


@pytest.mark.usefixtures("no_figures", "small")
def test_every_value_on_the_page_is_escaped(make_run, tmp_path: Path):
    evil = "<script>alert('&')</script>"
    rows = make_run(
        "desk",
        2,
        100,
        {"test_precise": 40.0},
        commit=evil,
        data_note=evil,
        model=evil,
        precision=evil,
    )
    folder = tmp_path / "results" / "small"
    folder.mkdir(parents=True)
    (folder / "runs.csv").write_text(gather.csv_text(rows, COLUMNS))
    report.main([], runs="none", results=str(tmp_path / "results"), refresh=False)
    html = (tmp_path / "results" / "index.html").read_text()
    assert "<script" not in html
    assert "&lt;script&gt;" in html
