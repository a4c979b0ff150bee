"""What the ranks' topic leaves: a line per row, a CSV file, a page with a table."""

from collections.abc import Sequence
from pathlib import Path

from normlab import runs
from normlab.bench import write
from normlab.bench.measure import Spread
from normlab.bench.rank_training import TrainingRow
from normlab.bench.ranks import RankRow


def line(row: RankRow) -> str:
    """A row as one line for the terminal."""
    return (
        f"sync, {row.what} {row.shape} on each of {row.ranks} ranks, {row.format} {row.dtype}: "
        f"{_spread(row.ratio)}x detectron2's, limit {row.bar:.2f} "
        f"{'met' if row.met else 'MISSED'}; {row.over_native.median:.2f}x BatchNorm2d"
    )


def training_line(row: TrainingRow) -> str:
    """A row of training as one line for the terminal."""
    said = "as few as can be" if row.met else f"MORE THAN {row.expected}"
    return (
        f"training, {row.network}, {row.norm} on {row.ranks} ranks: {row.rate.median:.0f} img/s, "
        f"{_spread(row.ratio)}x one rank with {row.ranks} threads; "
        f"{row.exchanges} exchanges a step, {said}"
    )


def results(rows: Sequence[RankRow], trained: Sequence[TrainingRow], out: Path) -> list[Path]:
    """Write `ranks.csv`, `ranks-training.csv` and `ranks.md`; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    files = {
        out / "ranks.csv": write.as_csv(rows),
        out / "ranks-training.csv": write.as_csv(trained),
        out / "ranks.md": _page(rows, trained),
    }
    for path, text in files.items():
        runs.write_atomically(path, text)
    return list(files)


def _page(rows: Sequence[RankRow], trained: Sequence[TrainingRow]) -> str:
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
    return "\n".join([*lines, "", *_training(trained), ""])


def _training(rows: Sequence[TrainingRow]) -> list[str]:
    """The section on training: what two cores do as two ranks, and as one."""
    first = rows[0]
    lines = [
        "## Training",
        "",
        f"{first.network} on batches of {first.batch} images: {first.ranks} ranks with a thread"
        f" each, over that of one rank with {first.ranks}",
        "threads and batch norm; above 1 the ranks are faster. By the clock, in img/s. Exchanges of"
        " a step are counted:",
        "one for the gradients, and one per synchronized layer and direction.",
        "",
        "| norm | ranks, img/s | one rank, img/s | ranks over one | synchronized layers |"
        " exchanges | rounds |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        exchanges = f"{row.exchanges}" if row.met else f"**{row.exchanges}**"
        lines.append(
            f"| {row.norm} | {row.rate.median:.0f} | {row.alone.median:.0f} | {_spread(row.ratio)}"
            f" | {row.synchronized} | {exchanges} | {row.rounds} |"
        )
    return lines


def _spread(spread: Spread) -> str:
    return f"{spread.median:.2f} [{spread.low:.2f}, {spread.high:.2f}]"
