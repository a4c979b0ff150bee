"""What a benchmark leaves: one line per row, a CSV file that says on what machine, a figure."""

import csv
import io
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import torch
from matplotlib.figure import Figure

from normlab import runs
from normlab.bench.measure import Row, Spread
from normlab.bench.rank_training import TrainingRow
from normlab.bench.ranks import RankRow


def line(row: Row) -> str:
    """A row as one line for the terminal."""
    r = row.ratio
    return (
        f"{row.name}: {row.ours.median:,.0f} {row.unit}; "
        f"{row.peer}: {row.theirs.median:,.0f} {row.unit}; "
        f"{r.median:.2f}x [{r.low:.2f}, {r.high:.2f}], target {row.bar:.2f}x "
        f"{'met' if row.met else 'MISSED'}"
    )


def machine() -> dict[str, str | int | bool]:
    """What the numbers depend on; no names of hosts or users."""
    commit, dirty = runs.commit()
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "dirty": dirty,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            text.split(":", 1)[1].strip() for text in lines if text.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.machine()


def results(rows: Sequence[Row], out: Path) -> list[Path]:
    """Write ``bench.csv`` and ``bench.svg``; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    table, figure = out / "bench.csv", out / "bench.svg"
    runs.write_atomically(table, as_csv(rows))
    runs.write_atomically(figure, _figure(rows))
    return [table, figure]


def as_csv(rows: Sequence[Row | RankRow | TrainingRow]) -> str:
    """A line per row, each with the machine it was measured on."""
    here = machine()
    records = []
    for row in rows:
        record: dict[str, object] = {}
        for key, value in asdict(row).items():
            if isinstance(getattr(row, key), Spread):
                record |= {f"{key}_{part}": f"{number:.4g}" for part, number in value.items()}
            else:
                record[key] = value
        records.append(record | {"met": row.met} | here)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _figure(rows: Sequence[Row]) -> bytes:
    """Ratios with their quartiles, each with its target as a mark."""
    figure = Figure(figsize=(8, 0.6 * len(rows) + 1), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(reversed(rows)):
        r = row.ratio
        axes.barh(y, r.median - 1, left=1, color="C0" if row.met else "C3", height=0.5)
        axes.plot([r.low, r.high], [y, y], color="black")
        axes.plot([row.bar] * 2, [y - 0.35, y + 0.35], color="0.3", linestyle="--")
    axes.set_yticks(range(len(rows)), [f"{row.name}\nvs {row.peer}" for row in reversed(rows)])
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.set_xlabel("times as fast: median, quartiles; dashed: target")
    image = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "normlab"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()
