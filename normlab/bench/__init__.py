"""`normlab bench`: speed against the stock ways of doing the same, on this machine.

Each topic is a file with one small function per row; ``measure`` holds how anything is timed.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from normlab import allocator
from normlab.bench.measure import Row

OUT = Path("results") / "bench"

TOPICS = {
    "runs": "start, data, training and statistics of a run",
    "layers": "forward and backward of every layer",
    "ranks": "synchronized batch norm between two processes",
}


def main(argv: Sequence[str]) -> int:
    """Measure, print what was measured, write `results/bench`; the exit code."""
    parser = argparse.ArgumentParser(prog="normlab bench", description=__doc__)
    parser.add_argument("topic", nargs="?", choices=list(TOPICS), help="default: all of them")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and cells")
    arguments = parser.parse_args(argv)
    written: list[Path] = []
    if arguments.topic in (None, "runs"):
        written += _runs(quick=arguments.quick)
    if arguments.topic in (None, "layers"):
        written += _layers(quick=arguments.quick)
    if arguments.topic in (None, "ranks"):
        written += _ranks(quick=arguments.quick)
    for path in written:
        print(f"wrote {path}")
    return 0


def _runs(*, quick: bool) -> list[Path]:
    from normlab.bench import write

    rows = []
    for row in measured(quick=quick):
        print(write.line(row), flush=True)
        rows.append(row)
    return write.results(rows, OUT)


def _layers(*, quick: bool) -> list[Path]:
    from normlab.bench import layer_write, layers

    rows = layers.rows(quick=quick)
    print(layer_write.summary(rows), flush=True)
    return layer_write.results(rows, OUT)


def _ranks(*, quick: bool) -> list[Path]:
    from normlab.bench import rank_training, rank_write, ranks

    done, trained = [], []
    with closing(ranks.rows(quick=quick)) as rows:  # its processes end here, whatever happens
        for row in rows:
            print(rank_write.line(row), flush=True)
            done.append(row)
    with closing(rank_training.rows(quick=quick)) as training_rows:
        for found in training_rows:
            print(rank_write.training_line(found), flush=True)
            trained.append(found)
    return rank_write.results(done, trained, OUT)


def measured(*, quick: bool) -> Iterator[Row]:
    """The rows of `runs`, cheapest first; one whose peer is not installed is said and left out."""
    from normlab.bench import loading, starting, training

    few = 5 if quick else 15
    topics: list[Callable[[], list[Row]]] = [
        lambda: [starting.help_row(rounds=few)],
        lambda: [starting.second_run_row(rounds=few)],
        lambda: [loading.row(rounds=few, batches=16)],
        lambda: training.rows(rounds=few, steps=4 if quick else 8),
        lambda: precise_rows(rounds=2 if quick else 5, images=1_000 if quick else 10_000),
    ]
    for topic in topics:
        try:
            yield from topic()
        except ImportError as missing:
            print(f"left out: {missing} (pip install 'normlab[bench]')", flush=True)


def precise_rows(*, rounds: int, images: int) -> list[Row]:
    """A row for each memory layout; this process keeps freed memory, as every run does."""
    from normlab.bench import precise

    allocator.keep_freed_memory()
    return [
        precise.row(rounds=rounds, images=images, channels_last=channels_last)
        for channels_last in (False, True)
    ]
