"""The page of the layers' speed says how far its rewritten peers are from the originals."""

import csv
from pathlib import Path

from normlab.bench import layer_write, originals
from normlab.bench.layers import LayerRow
from normlab.bench.measure import Spread

COMPOSER, OTHER = "composer GhostBatchNorm", "cifar10-fast GhostBatchNorm"
ONE = Spread(1.0, 1.0, 1.0)


def made(variant: str, peers: dict[str, float]) -> LayerRow:
    cell = ("ghost", variant, "128x16x32x32", "NCHW", "float32")
    return LayerRow(*cell, "CPU", 3, ONE, ONE, ONE, peer=COMPOSER, to_peer=ONE, peers=peers)


def recorded(peer: str, variant: str) -> float:
    with Path(originals.__file__).with_suffix(".csv").open() as file:
        (found,) = (
            float(line["over_native"])
            for line in csv.DictReader(file)
            if (line["peer"], line["variant"], line["shape"], line["format"], line["dtype"])
            == (peer, variant, "128x16x32x32", "NCHW", "float32")
        )
    return found


def test_rewritten_peers_are_compared_with_the_originals(tmp_path: Path) -> None:
    """By the figures of the file alone: what has none, as another variant, is left out."""
    changes = {"nbs=2": 0.8, "nbs=8": 1.05, "nbs=32": 1.3}
    rows = [
        made(variant, {COMPOSER: recorded(COMPOSER, variant) * change, "new": 1.0})
        for variant, change in changes.items()
    ]
    rows.append(made("nbs=3", {COMPOSER: 9.0, OTHER: 9.0}))
    _, page, _ = layer_write.results(rows, tmp_path)
    text = page.read_text()
    assert f"| {COMPOSER} | NCHW | float32 | 3 | 1.05 | 0.80 | 1.30 | 1 |" in text
    assert text.count("GhostBatchNorm | NCHW") == 1
    assert originals.section([made("nbs=3", {COMPOSER: 9.0})]) == []


def test_the_committed_page_has_the_comparison_of_the_committed_table() -> None:
    results = Path(__file__).parent.parent / "results" / "bench"
    with (results / "layers.csv").open() as file:
        rows = [
            LayerRow(
                *(line[key] for key in ("layer", "variant", "shape", "format", "dtype", "clock")),
                int(line["rounds"]), ONE, ONE, ONE, line["peer"], None,
                {name: float(ratio) for name, _, ratio in
                 (peer.rpartition(" ") for peer in line["peers"].split("; ") if peer)},
            )
            for line in csv.DictReader(file)
        ]  # fmt: skip
    assert "\n".join(originals.section(rows)) in (results / "layers.md").read_text()
