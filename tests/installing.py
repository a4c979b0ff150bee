"""normlab installed from its wheel into an environment outside the checkout, without a network."""

import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Installed:
    """An environment outside the checkout in which normlab was installed from its wheel."""

    path: Path
    wheel: Path

    def run(self, *words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment's ``bin`` in a directory of its own."""
        program, *arguments = words
        clean = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PYTHON", "NORMLAB", "HYDRA"))
        }
        return subprocess.run(
            [str(self.path / "bin" / program), *arguments],
            cwd=cwd,
            env=clean | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )

    def install(self, *arguments: str) -> None:
        """``pip install`` into the environment, without a network."""
        pip(
            f"--python={self.path / 'bin' / 'python'}",
            "install",
            "--no-index",
            "--no-deps",
            "--no-build-isolation",
            "--ignore-installed",
            *arguments,
        )


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def install_from_wheel(scratch: Path) -> Installed:
    """Build the source archive, the wheel from it, and an environment that holds the wheel.

    torch and the other dependencies are those of the running environment, through a ``.pth`` file.
    It is read after the environment's own packages, and ``.pth`` files in that place are not
    followed, an editable normlab's among them: the wheel's normlab is the one that is imported.
    """
    build = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--outdir",
        str(scratch / "dist"),
        str(ROOT),
    ]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (scratch / "dist").glob("normlab-*.whl")
    environment = scratch / "environment"
    venv.create(environment, symlinks=True)
    installed = Installed(environment, wheel)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    installed.install(str(wheel))
    return installed
