"""Tiny data sets of every kind, and a cache of their own."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from normlab import data
from normlab.data.base import Dataset

KINDS = ("synthetic", "digits", "cifar10", "imagefolder")


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(shared_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(shared_cache))


def encoded(pixels: npt.NDArray[np.uint8], kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=kind)
    return buffer.getvalue()


def write_parquet(
    file: Path,
    pixels: npt.NDArray[np.uint8],
    labels: list[int],
    *,
    kind: str = "JPEG",
    image_column: str = "img",
    label_column: str = "label",
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    cells = [{"bytes": encoded(p, kind), "path": f"{i}.jpg"} for i, p in enumerate(pixels)]
    pq.write_table(pa.table({image_column: cells, label_column: labels}), file)


def write_cifar(root: Path, *, train: int = 40, test: int = 4, classes: int = 10) -> None:
    """`train` and `test` images of each class, sorted by class as the real files are."""
    rng = np.random.default_rng(0)
    for name, per_class in (("train", train), ("test", test)):
        pixels = rng.integers(0, 256, (per_class * classes, 32, 32, 3), dtype=np.uint8)
        labels = [c for c in range(classes) for _ in range(per_class)]
        write_parquet(root / "cifar10" / f"{name}.parquet", pixels, labels)


def write_images(folder: Path, *, per_class: int, classes: int = 2, side: int = 20) -> None:
    rng = np.random.default_rng(per_class)
    for c in range(classes):
        (folder / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            shape = (side + i % 5, side + i % 3, 3)
            image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))
            image.save(folder / f"class{c}" / f"{i:03}.png")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root that holds a tiny CIFAR-10 and a tiny image folder."""
    root = tmp_path_factory.mktemp("root")
    write_cifar(root)
    write_images(root / "imagefolder" / "train", per_class=20)
    write_images(root / "imagefolder" / "test", per_class=7)
    return root


@pytest.fixture(params=KINDS)
def dataset(request: pytest.FixtureRequest, load: Callable[..., Dataset]) -> Dataset:
    return load(request.param)


@pytest.fixture
def load(root: Path) -> Callable[..., Dataset]:
    options = {"imagefolder": {"size": 16, "workers": 0}}

    def load(name: str, *, seed: int = 3, **more: object) -> Dataset:
        return data.find(name)(str(root), seed=seed, **options.get(name, {}), **more)

    return load
