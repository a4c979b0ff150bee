"""Under CI a test is skipped for want of a GPU, the right to mount or a large tracker, and for
nothing else."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SKIPS = """
import pytest

@pytest.mark.skipif(True, reason="needs a GPU")
def test_gpu(): ...

def test_mount(): pytest.skip("needs a mount: not here")

def test_refused(): pytest.skip("refused: one position")

def test_wandb(): pytest.skip("needs the extra wandb")

def test_tensorboard(): pytest.skip("needs the extra tensorboard")

def test_missing(): pytest.importorskip("nowhere_to_be_found")

@pytest.mark.skipif(True, reason="no compiler")
def test_compiler(): ...

@pytest.mark.xfail
def test_expected(): raise ValueError
"""


@pytest.mark.parametrize(("environment", "failed"), [({"CI": "true"}, 3), ({"CI": ""}, 0), ({}, 0)])
def test_what_may_be_skipped(tmp_path: Path, environment: dict[str, str], failed: int) -> None:
    (tmp_path / "test_some.py").write_text(SKIPS)
    here = {name: value for name, value in os.environ.items() if name != "CI"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "skips", "-p", "no:cacheprovider", "-rA"],
        cwd=tmp_path, env={**here, "PYTHONPATH": str(Path(__file__).parent), **environment},
        capture_output=True, text=True,
    )  # fmt: skip
    said = done.stdout
    assert f"{7 - failed} skipped, 1 xfailed" in said
    assert done.returncode == (1 if failed else 0)
    assert ("skipped under CI, where this may not be missing: no compiler" in said) == (failed > 0)
    for name in ("missing", "tensorboard"):
        assert (f"FAILED test_some.py::test_{name}" in said) == (failed > 0)
