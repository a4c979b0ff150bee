"""normlab as a library: tools see the names that are imported only when they are asked for."""

import ast
import subprocess
import sys
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
from installing import Installed

import normlab
from normlab import lazy

ROOT = Path(normlab.__file__).parent
PACKAGES = {
    "normlab.norms": ["normlab.norms", "normlab.norms.conv"],
    "normlab.surgery": ["normlab.surgery"],
}


def public(package: str) -> dict[str, str]:
    """Each name of the package's public modules, as files say it, and its module."""
    found = {}
    for folder in PACKAGES[package]:
        for path in sorted((ROOT.parent / folder.replace(".", "/")).glob("*.py")):
            shared = folder.endswith(".conv") and path.stem == "base"
            if path.stem.startswith("_") or shared:
                continue
            module = f"{folder}.{path.stem}"
            found |= dict.fromkeys(import_module(module).__all__, module)
    return found


def promised(package: str) -> dict[str, str]:
    """Each name that the package imports for type checkers alone, and from where."""
    tree = ast.parse(Path(import_module(package).__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            if node.module != "torch":
                assert alias.asname == alias.name, (
                    "what is not `as` itself, checkers take as private"
                )
                found[alias.name] = node.module
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_type_checkers_are_told_what_the_modules_export(package: str) -> None:
    assert promised(package) == public(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_and_star_have_what_the_modules_export(package: str) -> None:
    names = public(package)
    assert names.keys() <= set(dir(import_module(package)))
    space: dict[str, object] = {}
    exec(f"from {package} import *", space)
    for name, module in names.items():
        assert space[name] is getattr(import_module(module), name)


def test_the_top_has_its_two_names() -> None:
    space: dict[str, object] = {}
    exec("from normlab import *", space)
    assert space["convert"] is normlab.convert
    assert {"convert", "revert", "__version__"} <= set(dir(normlab))


def test_an_unknown_name_is_refused_in_pythons_words() -> None:
    with pytest.raises(AttributeError, match=r"^module 'normlab.surgery' has no attribute 'fus'$"):
        lazy.find(
            "normlab.surgery", lazy.modules("normlab.surgery", normlab.surgery.__file__), "fus"
        )


@pytest.mark.parametrize("package", ["normlab", *PACKAGES])
def test_importing_a_package_loads_no_torch(package: str) -> None:
    code = f"import sys, {package}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_wheel_says_that_it_is_typed(installed: Installed) -> None:
    assert "normlab/py.typed" in zipfile.ZipFile(installed.wheel).namelist()


@pytest.mark.slow
def test_a_type_checker_sees_types(tmp_path: Path) -> None:
    (tmp_path / "user.py").write_text(
        "from normlab import convert\n"
        "from normlab.norms import GhostBatchNorm, find\n"
        "reveal_type(GhostBatchNorm(3, nbs=2).decay)\n"
        "reveal_type(convert)\n"
        "GhostBatchNorm(3, nbs='2')\n"
    )
    words = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "user.py"]
    told = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False).stdout
    assert 'Revealed type is "float"' in told or 'Revealed type is "builtins.float"' in told
    assert "def (model: " in told
    assert 'Argument "nbs" to "GhostBatchNorm" has incompatible type "str"' in told
