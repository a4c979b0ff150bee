"""Validation images of ImageNet, which of them estimate, and ImageNet-C beside them."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from normlab import data
from normlab.data.imagefolder import MEAN, STD, Folder
from normlab.domains import Domain

from .conftest import write_images

SIDE = 16
CONTRAST, JPEG = Domain("contrast", 3), Domain("jpeg", 3)


def load(root: Path) -> Folder:
    loaded = data.find("imagenet_val")(str(root), seed=0, size=SIDE, workers=0)
    assert isinstance(loaded, Folder)
    return loaded


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path / "imagenet" / "val", per_class=8)
    return tmp_path


def paths(dataset: Folder, split: str) -> set[str]:
    return {path for path, _ in dataset._samples[split]}


def shown(dataset: Folder, domain: Domain) -> torch.Tensor:
    batches = dataset.eval_batches("test", batch_size=4, order=None, domains=[domain])
    return torch.cat([x for x, _ in batches])


def test_without_training_images_halves_are_held_apart(root: Path) -> None:
    dataset = load(root)
    estimate, tested = paths(dataset, "train"), paths(dataset, "test")
    assert (len(estimate), len(tested), estimate & tested) == (8, 8, set())
    assert "one half of the validation images estimates" in dataset.note
    assert paths(load(root), "test") == tested  # for every run


def test_training_images_estimate_and_all_of_val_is_tested(root: Path) -> None:
    before = load(root).digest
    write_images(root / "imagenet" / "train", per_class=5)
    dataset = load(root)
    assert (dataset.size("train"), dataset.size("test"), dataset.note) == (10, 16, "")
    assert all("/train/" in path for path in paths(dataset, "train"))
    assert dataset.digest != before
    with pytest.raises(ValueError, match=r"data=imagenet_val has no val \(it has "):
        dataset.size("val")


def write_stored(root: Path, where: str) -> Path:
    """Other images in the place of corrupted ones, of the size that is shown."""
    folder, rng = root / where / "contrast" / "3", np.random.default_rng(9)
    for path in sorted((root / "imagenet" / "val").glob("*/*")):
        (folder / path.parent.name).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / path.parent.name / path.name)
    return folder


@pytest.mark.parametrize("where", ["imagenet/ImageNet-C", "imagenet-c/digital"])
def test_imagenet_c_is_shown_where_it_has_the_corruption(root: Path, where: str) -> None:
    made = load(root)
    folder = write_stored(root, where)
    dataset = load(root)
    files = [folder.joinpath(*Path(path).parts[-2:]) for path, _ in dataset._samples["test"]]
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, STD))
    expected = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    torch.testing.assert_close(shown(dataset, CONTRAST), expected, rtol=1e-5, atol=1e-5)
    for domain in (JPEG, Domain(), Domain("contrast", 2)):  # which it does not have
        assert torch.equal(shown(dataset, domain), shown(made, domain))
    assert not torch.equal(shown(made, CONTRAST), expected)
    assert dataset.note.endswith("of ImageNet-C: contrast")
    assert dataset.digest != made.digest


def test_what_is_not_there_is_named(root: Path, tmp_path: Path) -> None:
    folder = write_stored(root, "imagenet-c")
    first = sorted((root / "imagenet" / "val").iterdir())[0].name
    shutil.rmtree(folder / first)
    with pytest.raises(ValueError, match=f"lacks the class {first}, which val/ holds"):
        load(root)
    with pytest.raises(ValueError, match=r"looked for val/<class>/ in .*imagenet and "):
        load(tmp_path / "nowhere")
