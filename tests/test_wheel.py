"""The wheel is the whole project: outside the checkout it finds its conf and its experiments."""

import zipfile
from pathlib import Path

from installing import ROOT, Installed


def test_the_wheel_holds_conf_and_experiments(installed: Installed) -> None:
    held = set(zipfile.ZipFile(installed.wheel).namelist())
    for kind in ("conf", "experiments"):
        files = {f"normlab/{p.relative_to(ROOT)}" for p in (ROOT / kind).rglob("*.yaml")}
        assert files
        assert files <= held
    assert not any(name.startswith(("tests/", "conf/", "experiments/")) for name in held)


def test_the_installed_package_is_the_wheels(installed: Installed, tmp_path: Path) -> None:
    done = installed.run("python", "-c", "import normlab; print(normlab.__file__)", cwd=tmp_path)
    assert Path(done.stdout.strip()).is_relative_to(installed.path), done.stderr


def test_the_command_shows_and_plans(installed: Installed, tmp_path: Path) -> None:
    norms = installed.run("normlab", "show", "norms", cwd=tmp_path)
    assert norms.returncode == 0, norms.stderr
    assert {"bn", "ghost", "gn", "ln", "in", "none"} <= set(norms.stdout.split())
    plan = installed.run("normlab", "plan", "norm=ghost", "nbs=8", "batch_size=128", cwd=tmp_path)
    assert plan.returncode == 0, plan.stderr
    assert "16" in plan.stdout  # chunks of a batch


def test_the_command_trains_from_any_directory(installed: Installed, tmp_path: Path) -> None:
    done = installed.run("normlab", "train", "norm=ghost", "nbs=32", "epochs=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (status,) = tmp_path.glob("runs/*/status.json")
    assert '"done"' in status.read_text()
