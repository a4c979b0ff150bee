"""What the ranks' topic leaves: a line per row, a CSV file, a page with a table."""

from collections.abc import Sequence
from pathlib import Path

from normlab import runs
from normlab.bench import write
from normlab.bench.measure import Spread
from normlab.bench.ranks import RankRow


def line(row: RankRow) -> str:
    """A row as one line for the terminal."""
    return (
        f"sync, {row.what} {row.shape} on each of {row.ranks} ranks, {row.format} {row.dtype}: "
        f"{_spread(row.ratio)}x detectron2's, limit {row.bar:.2f} "
        f"{'met' if row.met else 'MISSED'}; {row.over_native.median:.2f}x BatchNorm2d"
    )


def results(rows: Sequence[RankRow], out: Path) -> list[Path]:
    """Write `ranks.csv` and `ranks.md`; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    table, page = out / "ranks.csv", out / "ranks.md"
    runs.write_atomically(table, write.as_csv(rows))
    runs.write_atomically(page, _page(rows))
    return [table, page]


def _page(rows: Sequence[RankRow]) -> str:
    where, first = write.machine(), rows[0]
    lines = [
        "# Synchronized batch norm between ranks",
        "",
        f"Forward and backward on {first.ranks} ranks over gloo; the shape is one rank's. CPU time",
        "over that of detectron2's NaiveSyncBatchNorm, with quartiles; below 1 ours is faster.",
        "**Bold**: over the limit. Collectives are those of a step, ours and detectron2's. How it",
        "is measured: `docs/benchmarks.md`.",
        "",
        f"{where['processor']}, {where['cores']} cores, torch {where['torch']}, commit "
        f"{where['commit']}{' (changed)' if where['dirty'] else ''}; {first.clock}. "
        f"Limits met: {sum(row.met for row in rows)} of {len(rows)}.",
        "",
        "| | format | batch norm, ms | ours over it | detectron2's over it | ours over"
        " detectron2's | limit | elapsed, ours over detectron2's | collectives | rounds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        ratio = _spread(row.ratio) if row.met else f"**{_spread(row.ratio)}**"
        cells = [
            f"{row.what} {row.shape}",
            f"{row.format} {row.dtype}",
            f"{row.native.median:.3g}",
            f"{row.over_native.median:.2f}",
            f"{row.peer_over_native.median:.2f}",
            ratio,
            f"{row.bar:.2f}",
            _spread(row.elapsed),
            f"{row.collectives}, {row.peer_collectives}",
            f"{row.rounds}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"
