"""An installed package adds a norm and an experiment; it is the package that the how-tos show."""

import re
from pathlib import Path

import pytest
from installing import ROOT, Installed, install_from_wheel

PAGES = ("how-to-add-a-norm.md", "how-to-add-an-experiment.md")
IMPORTED = "raise ImportError('nobody asked for the norm yet')\n"


def shown_files() -> dict[str, str]:
    """The files that the pages show: a line that names the file, then the file as a code block."""
    text = "\n".join((ROOT / "docs" / page).read_text() for page in PAGES)
    return dict(re.findall(r"^`([\w./]+)`:\n\n```\w+\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    environment = install_from_wheel(tmp_path_factory.mktemp("extended"))
    source = tmp_path_factory.mktemp("source")
    for name, text in shown_files().items():
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    environment.install(str(source))
    return environment


def test_what_a_package_adds_is_shown_without_importing_it(
    extended: Installed, tmp_path: Path
) -> None:
    (package,) = extended.path.glob("lib/python*/site-packages/rmsnorms/__init__.py")
    package.write_text(IMPORTED)
    try:
        for kind, name in (("norms", "rms"), ("experiments", "rms_eps")):
            done = extended.run("normlab", "show", kind, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            assert name in done.stdout.split()
    finally:
        package.write_text("")


def test_a_packages_norm_trains_in_its_experiment(extended: Installed, tmp_path: Path) -> None:
    done = extended.run("normlab", "sweep", "rms_eps", "scale=demo", "seed=0", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    configs = [path.read_text() for path in tmp_path.glob("runs/*-rms-s0-*/config.yaml")]
    assert len(configs) == 2
    assert any("eps: 0.01" in config for config in configs)
    for status in tmp_path.glob("runs/*/status.json"):
        assert '"done"' in status.read_text()
