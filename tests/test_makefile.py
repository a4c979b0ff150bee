"""What the Makefile would run: `make -n`, nothing is executed."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def commands(*words: str) -> list[str]:
    """The normlab commands behind a target."""
    if not (make := shutil.which("make")):
        pytest.skip("make is not installed")
    alone = {"PATH": os.environ["PATH"]}  # nothing of a make that runs this test
    done = subprocess.run([make, "-n", *words], cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line.removeprefix(".venv/bin/") for line in done.stdout.splitlines()]
    return [" ".join(line.split()) for line in lines if line.startswith("normlab ")]


def test_what_is_committed_is_skipped_unless_asked_for_anew() -> None:
    joblib = "hydra/launcher=joblib hydra.launcher.n_jobs=2"
    assert commands("sweep-nbs", "SCALE=desk") == [f"normlab sweep nbs scale=desk {joblib}"]
    assert commands("sweep-nbs", "SCALE=desk", "FRESH=1") == [
        f"normlab sweep nbs scale=desk skip_done=local {joblib}"
    ]


def test_the_record_is_replaced_only_when_asked_for_anew() -> None:
    assert commands("report") == ["normlab report"]
    assert commands("report", "FRESH=1") == ["normlab report --refresh"]


def test_the_demo_reports_the_newcomers_own_runs() -> None:
    *_, sweep, own, compared = commands("demo")
    assert "skip_done=local" in sweep
    assert own == "normlab report nbs --results runs/demo-report"
    assert compared.startswith("normlab report nbs --results runs/demo-compared |")


def test_every_experiment_is_among_all() -> None:
    names = sorted(path.stem for path in (ROOT / "experiments").glob("*.yaml"))
    joblib = "hydra/launcher=joblib hydra.launcher.n_jobs=2"
    assert commands("sweep-all", "SCALE=desk") == [
        f"normlab sweep {name} scale=desk {joblib}" for name in names
    ]
    assert commands("demo-all") == ["normlab report --results runs/demo-report"]  # after a loop
    make = shutil.which("make") or ""
    said = subprocess.run([make, "-n", "demo-all"], cwd=ROOT, capture_output=True, text=True).stdout
    assert f"for name in {' '.join(names)}; do" in said
