"""What the layers' topic leaves: a CSV file, a page of tables, a figure."""

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure

from normlab import runs
from normlab.bench import originals
from normlab.bench.layers import LEVEL, LayerRow
from normlab.bench.measure import Spread
from normlab.bench.write import machine

COLUMNS = tuple((f, d) for f in ("NCHW", "channels_last") for d in ("float32", "bfloat16"))
SHORT = {"NCHW": "NCHW", "channels_last": "CL", "float32": "fp32", "bfloat16": "bf16"}


def summary(rows: Sequence[LayerRow]) -> str:
    """What was missed, one line each, after a line that counts."""
    barred = [row for row in rows if row.bar is not None]
    paired = [row for row in rows if row.peer]
    lines = [
        f"{len(rows)} rows; limits met: {sum(row.met is True for row in barred)} of {len(barred)}; "
        f"no slower than the fastest peer by more than {LEVEL - 1:.0%}: "
        f"{sum(row.level is True for row in paired)} of {len(paired)}"
    ]
    for row in rows:
        r = row.ratio
        for peer, said in row.refused.items():
            lines.append(f"{peer} left out of {row.shape} {row.format} {row.dtype}: {said}")
        where = f"{_name(row)}, {row.shape} {row.format} {row.dtype}"
        if row.met is False:
            lines.append(
                f"{where}: {r.median:.2f}x BatchNorm2d [{r.low:.2f}, {r.high:.2f}], "
                f"limit {row.bar:.2f} MISSED"
            )
        if row.level is False and row.to_peer:
            p = row.to_peer
            lines.append(f"{where}: {p.median:.2f}x {row.peer} [{p.low:.2f}, {p.high:.2f}] SLOWER")
    return "\n".join(lines)


def results(rows: Sequence[LayerRow], out: Path) -> list[Path]:
    """Write `layers.csv`, `layers.md` and `layers.svg`; the files written."""
    out.mkdir(parents=True, exist_ok=True)
    table, page, figure = (out / f"layers.{kind}" for kind in ("csv", "md", "svg"))
    runs.write_atomically(table, _csv(rows))
    runs.write_atomically(page, _page(rows))
    runs.write_atomically(figure, _figure(rows))
    return [table, page, figure]


def _name(row: LayerRow) -> str:
    return f"{row.layer} {row.variant}".strip()


def _csv(rows: Sequence[LayerRow]) -> str:
    here = machine()
    records = []
    for row in rows:
        record: dict[str, object] = {}
        for key, value in asdict(row).items():
            if isinstance(getattr(row, key), Spread) or key == "to_peer":
                parts = value or {"median": math.nan, "low": math.nan, "high": math.nan}
                record |= {
                    f"{key}_{part}": "" if math.isnan(number) else f"{number:.4g}"
                    for part, number in parts.items()
                }
            elif key == "refused":
                record[key] = "; ".join(f"{name}: {said}" for name, said in value.items())
            elif key == "peers":
                record[key] = "; ".join(f"{name} {ratio:.4g}" for name, ratio in value.items())
            else:
                record[key] = f"{value:.4g}" if key == "saved" else value
        records.append(record | {"met": row.met, "level": row.level} | here)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _page(rows: Sequence[LayerRow]) -> str:
    """A table for each shape: layers down, format and dtype across."""
    where = machine()
    lines = [
        "# The layers' speed",
        "",
        "Forward and backward over torch's BatchNorm2d in training; in brackets over the fastest",
        f"peer. Below 1 ours is faster. **Bold**: a limit missed, or more than {LEVEL - 1:.0%}",
        "slower than that peer. `saved`: bytes kept for the backward pass over the input's, in",
        "the order of the four columns (BatchNorm2d: 1). How it is measured: `docs/benchmarks.md`.",
        "",
        f"{where['processor']}, {where['cores']} cores, torch {where['torch']}, commit "
        f"{where['commit']}{' (changed)' if where['dirty'] else ''}; {rows[0].clock}.",
    ]
    for shape in dict.fromkeys(row.shape for row in rows):
        here = [row for row in rows if row.shape == shape]
        lines += ["", f"## {shape}", "", _native(here), ""]
        heads = [f"{f} {d}" for f, d in COLUMNS]
        lines.append("| layer | " + " | ".join(heads) + " | limit | saved | fastest peer |")
        lines.append("|---|" + "---:|" * len(heads) + "---:|---|---|")
        for name in dict.fromkeys(_name(row) for row in here):
            of = {(row.format, row.dtype): row for row in here if _name(row) == name}
            cells = [_cell(of.get(column)) for column in COLUMNS]
            peers = ", ".join(dict.fromkeys(row.peer for row in of.values() if row.peer)) or "none"
            kept = " ".join(f"{of[c].saved:.1f}" for c in COLUMNS if c in of)
            lines.append(f"| {name} | {' | '.join(cells)} | {_limit(of)} | {kept} | {peers} |")
    lines += originals.section(rows)
    return "\n".join([*lines, "", "## Missed", "", *_bullets(summary(rows)), ""])


def _native(rows: Sequence[LayerRow]) -> str:
    medians = []
    for f, d in COLUMNS:
        taken = [row.native.median for row in rows if (row.format, row.dtype) == (f, d)]
        medians += [f"{f} {d} {np.median(taken):.3g}"] if taken else []
    return f"BatchNorm2d, ms: {', '.join(medians)}."


def _cell(row: LayerRow | None) -> str:
    if row is None:
        return ""
    text = f"{row.ratio.median:.2f}" + (f" ({row.to_peer.median:.2f})" if row.to_peer else "")
    return f"**{text}**" if row.met is False or row.level is False else text


def _limit(of: dict[tuple[str, str], LayerRow]) -> str:
    limits = {row.format: row.bar for row in of.values() if row.bar is not None}
    values = set(limits.values())
    if len(limits) == len({row.format for row in of.values()}) and len(values) == 1:
        return f"{values.pop():.2f}"
    return ", ".join(f"{limit:.2f} in {name}" for name, limit in limits.items())


def _bullets(text: str) -> list[str]:
    return [f"- {line}" for line in text.splitlines()]


def _figure(rows: Sequence[LayerRow]) -> bytes:
    """Ratios as colours, to BatchNorm2d and to the fastest peer; shapes that go together above."""
    blocks: dict[tuple[str, ...], list[LayerRow]] = {}
    shapes_of: dict[str, tuple[str, ...]] = {}
    for row in rows:
        shapes_of[row.layer] = (*shapes_of.get(row.layer, ()), row.shape)
    for row in rows:
        blocks.setdefault(tuple(dict.fromkeys(shapes_of[row.layer])), []).append(row)
    heights = [len({_name(row) for row in block}) + 1.5 for block in blocks.values()]
    width = 3.2 + 2 * 0.36 * max(len(shapes) for shapes in blocks) * len(COLUMNS)
    figure = Figure(figsize=(width, 0.23 * sum(heights) + 2), layout="constrained")
    grid = figure.subplots(len(blocks), 2, squeeze=False, height_ratios=heights)
    for line, (shapes, block) in zip(grid, blocks.items(), strict=True):
        _panel(line[0], block, shapes, "over BatchNorm2d; framed: a limit missed", to_peer=False)
        framed = f"framed: more than {LEVEL - 1:.0%} slower"
        _panel(line[1], block, shapes, f"over the fastest peer; {framed}", to_peer=True)
        line[1].set_yticklabels([])
    image = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "normlab"}):
        figure.savefig(image, format="svg", metadata={"Date": None})
    return image.getvalue()


def _panel(
    axes: Axes, rows: Sequence[LayerRow], shapes: tuple[str, ...], title: str, *, to_peer: bool
) -> None:
    """Red: ours is the slower."""
    names = list(dict.fromkeys(_name(row) for row in rows))
    columns = [(shape, *column) for shape in shapes for column in COLUMNS]
    values = np.full((len(names), len(columns)), np.nan)
    for row in rows:
        y, x = names.index(_name(row)), columns.index((row.shape, row.format, row.dtype))
        spread = row.to_peer if to_peer else row.ratio
        if spread is None:
            continue
        values[y, x] = np.log2(max(spread.median, 1e-3))
        text = f"{spread.median:.2f}" if spread.median < 9.95 else f"{spread.median:.0f}"
        dark = abs(values[y, x]) > 2
        axes.text(x, y, text, ha="center", va="center", fontsize=6, color="w" if dark else "k")
        if (row.level if to_peer else row.met) is False:
            frame = mpl.patches.Rectangle((x - 0.5, y - 0.5), 1, 1, fill=False, linewidth=1.2)
            axes.add_patch(frame)
    axes.imshow(values, cmap="RdBu_r", norm=TwoSlopeNorm(0, -3, 3), aspect="auto", alpha=0.75)
    axes.set_facecolor("0.9")
    for edge in range(len(COLUMNS), len(columns), len(COLUMNS)):
        axes.axvline(edge - 0.5, color="black", linewidth=0.8)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    ticks = [f"{SHORT[f]} {SHORT[d]}" for _, f, d in columns]
    axes.set_xticks(range(len(columns)), ticks, fontsize=6, rotation=90)
    middles = axes.secondary_xaxis("top")
    centres = [len(COLUMNS) * (i + 0.5) - 0.5 for i in range(len(shapes))]
    middles.set_xticks(centres, shapes, fontsize=7)
    middles.tick_params(length=0)
    axes.set_title(title, fontsize=9)
