"""A small experiment with made-up runs: every number known, nothing trained, nothing composed."""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from compositions import composed

from normlab import experiment as experiments
from normlab import runs as run_directories
from normlab.experiment import Experiment
from normlab.report import composed as remembering
from normlab.report import figures, gather, grid
from normlab.report.gather import Row
from normlab.report.grid import Results
from normlab.runs import COLUMNS

HERE = Path(__file__).parent
RECORD = HERE / "fixture" / "runs.csv"
SOURCE_TODAY = "5ea50de1"


def cell_key(overrides: list[str]) -> str:
    """A stand-in for the real identity: the overrides but the seed."""
    plain = sorted(o for o in overrides if not o.startswith("seed="))
    return hashlib.sha256(repr(plain).encode()).hexdigest()[:8]


@pytest.fixture(autouse=True)
def nothing_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: Any) -> None:
    """No test finds the composed cells of another, or of who runs them."""
    kept = tmp_path_factory.mktemp("cells")
    monkeypatch.setattr(remembering, "directory", lambda: kept)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[Experiment]:
    """The only experiment there is, with cells that need no composition."""
    monkeypatch.setattr(experiments, "files", lambda: {"small": HERE / "fixture" / "small.yaml"})
    monkeypatch.setattr(Experiment, "claims_digest", lambda *_: "c1a15ed0")
    monkeypatch.setattr(run_directories, "source_digest", lambda: SOURCE_TODAY)
    monkeypatch.setattr(grid.config, "compose", lambda overrides: {"overrides": overrides})
    monkeypatch.setattr(grid, "asked_epochs", lambda _: frozenset())
    monkeypatch.setattr(grid.config, "cell_key", lambda config: cell_key(config["overrides"]))
    experiments.load.cache_clear()
    yield experiments.load("small")
    experiments.load.cache_clear()


@pytest.fixture
def composed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cells of real experiments, composed by the first test that asks for them."""
    monkeypatch.setattr(grid.config, "compose", lambda overrides: composed(*overrides))


MakeRun = Callable[..., list[Row]]


@pytest.fixture
def make_run(small: Experiment) -> MakeRun:
    """One run's rows: `make_run("desk", 2, 100, {"test_precise": 40.0}, status="failed")`.

    errors: protocol -> error in % of the last epoch, or a list over epochs.
    """

    def make(scale: str, nbs: int, seed: int, errors: dict[str, Any], **changed: str) -> list[Row]:
        cell = cell_key([f"scale={scale}", "norm=ghost", f"nbs={nbs}"])
        run = dict.fromkeys(COLUMNS, "") | {
            "id": f"tiny-ghost-nbs{nbs}-s{seed}-{cell}",
            "cell": cell,
            "scale": scale,
            "experiment": "small",
            "model": "tiny",
            "norm": "ghost",
            "nbs": str(nbs),
            "data": "cifar10",
            "seed": str(seed),
            "epochs": "3",
            "precision": "fp32",
            "device": "cpu",
            "threads": "1",
            "torch": "2.11.0",
            "commit": "0123456789ab",
            "dirty": "false",
            "source": SOURCE_TODAY,
            "data_digest": "d1935700",
            "data_note": "JPEG copy, lossy",
            "chance": "90.0",
            "claims": f"another:0123abcd small:{small.claims_digest(scale)}",
            "started": f"2026-01-01T00:00:{seed % 60:02d}",
            "seconds": "12.5",
            "status": "done",
        }
        rows = []
        for protocol, values in errors.items():
            (spec,) = small.protocols[protocol].specs
            over_epochs = values if isinstance(values, list) else [values]
            for epoch, error in enumerate(over_epochs, start=4 - len(over_epochs)):
                rows.append(
                    run | {"protocol": spec, "epoch": str(epoch), "error": repr(error)} | changed
                )
        return rows or [run | changed]

    return make


TRUE = {
    "train_batch": {2: 38.0, 8: 26.0, 32: 18.0, 128: 15.0},
    "test_batch": {2: 46.0, 8: 44.0, 32: 42.0, 128: 42.0},
    "test_precise": {2: 46.0, 8: 41.0, 32: 41.4, 128: 41.5},
}


@pytest.fixture
def make_runs(make_run: MakeRun) -> Callable[..., list[Row]]:
    """A whole scale around known means; a seed moves all its runs alike, as pairing has it."""

    def make(scale: str, *, sd: float = 0.3, random: int = 0, **changed: str) -> list[Row]:
        generator = np.random.default_rng(random)
        of_seed = generator.normal(0, 0.8, 10)
        rows: list[Row] = []
        for nbs in (2, 8, 32, 128):
            for i, seed in enumerate(range(100, 110)):
                noise = generator.normal(0, sd, len(TRUE))
                errors = {
                    protocol: round(float(means[nbs] + of_seed[i] + noise[k]), 2)
                    for k, (protocol, means) in enumerate(TRUE.items())
                }
                rows += make_run(scale, nbs, seed, errors, **changed)
        return rows

    return make


@pytest.fixture
def results_of(small: Experiment) -> Callable[..., Results]:
    """Rows -> results of one scale."""

    def make(rows: list[Row], scale: str = "desk") -> Results:
        return grid.results(small, scale, grid.compose(small, scale), rows)

    return make


@pytest.fixture
def no_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rendering takes most of a report's time; not every test looks at a figure."""
    monkeypatch.setattr(figures, "render", lambda *_: b"<svg></svg>")


@pytest.fixture
def fixture_rows(make_run: MakeRun, make_runs: Callable[..., list[Row]]) -> list[Row]:
    """desk: complete but for a diverged run and two on another torch. demo: one failed, three seeds
    missing, older source, edited claims."""
    desk = make_runs("desk")
    desk = [
        row | ({"status": "diverged"} if (row["nbs"], row["seed"]) == ("2", "105") else {})
        for row in desk
    ]
    desk += make_run("desk", 2, 100, {"test_precise": 44.0}, torch="2.15.0")
    desk += make_run("desk", 2, 101, {"test_precise": 44.0}, torch="2.15.0")
    demo = make_runs(
        "demo", random=1, data="digits", data_note="", dirty="true", source="01d50cce",
        claims="small:01dc1a1m",
    )  # fmt: skip
    demo = [row for row in demo if not (row["nbs"] == "128" and int(row["seed"]) > 106)]
    failed = {"status": "failed", "protocol": "", "epoch": "", "error": ""}
    demo = [
        row | (failed if (row["nbs"], row["seed"]) == ("8", "104") else {})
        for row in demo
        if (row["nbs"], row["seed"]) != ("8", "104") or row["protocol"] == "train:batch"
    ]
    return demo + desk


@pytest.fixture
def recorded(fixture_rows: list[Row], tmp_path: Path) -> Path:
    """A results folder with the checked-in runs, as in a fresh clone."""
    if os.environ.get("REFRESH_GOLDEN"):
        RECORD.write_text(gather.csv_text(fixture_rows, COLUMNS))
    folder = tmp_path / "results" / "small"
    folder.mkdir(parents=True)
    shutil.copy(RECORD, folder / "runs.csv")
    return tmp_path / "results"
