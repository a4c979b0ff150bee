"""Figures, remembered from one report to the next: drawing them is most of a report's time.

What a figure shows is in a digest beside it: the numbers, the experiment's file, and the code that
draws. Where the digest differs, or nothing can be kept, the figure is drawn again.
"""

import hashlib
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path

from normlab import experiment as experiments
from normlab import runs
from normlab.report import composed, figures
from normlab.report.gather import csv_text
from normlab.report.grid import Results
from normlab.runs import COLUMNS

__all__ = ["drawn"]

FORMATS = ("png", "svg")


def drawn(results: Results, subtitle: str) -> dict[str, bytes]:
    """The figure in each of ``FORMATS``; the bytes are those that drawing it again would give."""
    folder = composed.directory()
    stem = f"{results.experiment.name}-{results.scale}"
    digest = _digest(results, subtitle)
    with suppress(OSError):
        if (folder / f"{stem}.digest").read_text(encoding="utf-8") == digest:
            return {kind: (folder / f"{stem}.{kind}").read_bytes() for kind in FORMATS}
    figure = figures.draw(results, subtitle)
    made = {kind: figures.render(figure, kind) for kind in FORMATS}
    with suppress(OSError):  # a home that cannot be written to: the next report is as slow
        folder.mkdir(parents=True, exist_ok=True)
        # The digest goes first and comes back last: a report that is killed leaves none behind.
        (folder / f"{stem}.digest").unlink(missing_ok=True)
        for kind, data in made.items():
            runs.write_atomically(folder / f"{stem}.{kind}", data)
        runs.write_atomically(folder / f"{stem}.digest", digest)
    return made


def _digest(results: Results, subtitle: str) -> str:
    digest = hashlib.sha256(_drawing())
    digest.update(experiments.files()[results.experiment.name].read_bytes())
    shown = (
        subtitle, results.scale, results.grid, results.environment, results.values,
        results.by_epoch, results.missing, results.lacking, results.diverged,
    )  # fmt: skip
    digest.update(repr(shown).encode() + csv_text(results.rows, COLUMNS).encode())
    return digest.hexdigest()


@cache
def _drawing() -> bytes:
    """A digest of all that turns numbers into a picture."""
    digest = hashlib.sha256(version("matplotlib").encode() + runs.source_digest().encode())
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.digest()
