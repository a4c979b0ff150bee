"""Whether the peers that are rewritten here cost what the originals cost.

`originals.csv` has the originals' ratios to torch's batch norm, measured apart from this package:
one core of an AMD EPYC (Zen 5), torch 2.13, process CPU time, medians of at least 15 rounds.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from normlab.bench.layers import LayerRow

__all__ = ["section"]

CLOSE = 0.1
"""What a ratio may differ by and count as the same: about the noise of two machines."""

Key = tuple[str, ...]


def _recorded() -> dict[Key, float]:
    """By peer, layer, variant, shape, format and dtype."""
    with Path(__file__).with_suffix(".csv").open(encoding="utf-8", newline="") as file:
        _, *lines = csv.reader(file)
    return {tuple(cell): float(ratio) for *cell, ratio in lines}


def _compared(rows: Sequence[LayerRow]) -> Iterator[tuple[Key, float]]:
    """Peer, format and dtype of each cell that both have, and ours over the original's ratio."""
    recorded = _recorded()
    for row in rows:
        for peer, ratio in row.peers.items():
            cell = (peer, row.layer, row.variant, row.shape, row.format, row.dtype)
            if cell in recorded:
                yield (peer, row.format, row.dtype), ratio / recorded[cell]


def section(rows: Sequence[LayerRow]) -> list[str]:
    """Lines of Markdown: a table with a line per peer, format and dtype; [] where there is none."""
    found: dict[Key, list[float]] = {}
    for key, change in _compared(rows):
        found.setdefault(key, []).append(change)
    if not found:
        return []
    lines = [
        "",
        "## Rewritten peers over their originals",
        "",
        "The ratio of a rewritten peer to BatchNorm2d above, over the original's in",
        "`normlab/bench/originals.csv` (another machine, torch 2.13). 1: it costs what the",
        f"original costs. Within: the cells that differ by at most {CLOSE:.0%} of that.",
        "",
        "| peer | format | dtype | cells | median | lowest | highest | within |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for key, changes in sorted(found.items()):
        near = sum(abs(change - 1) <= CLOSE for change in changes)
        numbers = " | ".join(f"{v:.2f}" for v in (np.median(changes), min(changes), max(changes)))
        lines.append(f"| {' | '.join(key)} | {len(changes)} | {numbers} | {near} |")
    return lines
