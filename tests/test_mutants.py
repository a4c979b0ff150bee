"""One-line mistakes in the layers and estimators, each of which a named test must notice.

`mutants.yaml` lists them. `make test` checks that each still names a line that exists once; the
slow cases make each mistake in a copy of the package and run its test, which has to fail, as it
does not in a copy without a mistake.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import normlab

PACKAGE = Path(normlab.__file__).parent
TESTS = Path(__file__).parent
MUTANTS = yaml.safe_load((TESTS / "mutants.yaml").read_text(encoding="utf-8"))
FAILED = 1  # pytest's exit code for tests that ran and failed: not 2 to 5, which are no verdict


def identity(mutant: dict[str, str]) -> str:
    return f"{mutant['file']}: {mutant['mistake']}"


def test_there_are_enough_and_none_twice():
    assert len(MUTANTS) >= 40
    assert len({(m["file"], m["line"], m["becomes"]) for m in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=identity)
def test_names_one_line(mutant):
    source = (PACKAGE / mutant["file"]).read_text(encoding="utf-8")
    assert source.count(mutant["line"]) == 1
    assert "\n" not in mutant["line"]
    path, *_, function = mutant["test"].split("::")
    assert f"def {function}(" in (TESTS / path).read_text(encoding="utf-8")


def run(package: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """These tests in a process of their own, with the package that lies in `package`.

    -P: the checkout, where the tests are, would come before it.
    """
    return subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-xq", "-p", "no:cacheprovider", "-m", "", *tests],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def copied(folder: Path) -> Path:
    """A copy of the package in `folder`."""
    shutil.copytree(PACKAGE, folder / "normlab", ignore=shutil.ignore_patterns("__pycache__"))
    for kind in ("conf", "experiments"):
        if not (PACKAGE / kind).exists():  # in a checkout they lie beside the package
            shutil.copytree(PACKAGE.parent / kind, folder / kind)
    return folder / "normlab"


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS, ids=identity)
def test_is_noticed(mutant, tmp_path):
    path = copied(tmp_path) / mutant["file"]
    source = path.read_text(encoding="utf-8")
    path.write_text(source.replace(mutant["line"], mutant["becomes"]), encoding="utf-8")
    done = run(tmp_path, f"tests/{mutant['test']}")
    assert done.returncode == FAILED, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("room", sorted({m["test"].split("::")[0] for m in MUTANTS}))
def test_nothing_is_noticed_without_a_mistake(room, tmp_path):
    """It is the mistake that the tests notice, not the copy."""
    copied(tmp_path)
    tests = {f"tests/{m['test']}" for m in MUTANTS if m["test"].split("::")[0] == room}
    done = run(tmp_path, *sorted(tests))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
