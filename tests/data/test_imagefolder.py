"""Image directories: geometry, splits, and workers that change nothing."""

import hashlib
import multiprocessing
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from normlab import data
from normlab.data.imagefolder import MEAN, STD, Folder, random_box

from .conftest import write_images
from .test_base import assert_same


def load(root: Path, name: str = "imagefolder", **options: int) -> Folder:
    loaded = data.find(name)(str(root), seed=0, **({"size": 16, "workers": 0} | options))
    assert isinstance(loaded, Folder)
    return loaded


def test_the_number_of_workers_changes_nothing(root: Path) -> None:
    before = torch.get_rng_state()
    alone, helped = load(root), load(root, workers=2)
    for start in (0, 2):
        one, other = (
            d.train_batches(batch_size=8, seed=1, epoch=2, start_step=start)
            for d in (alone, helped)
        )
        assert_same(one, other)
    assert torch.equal(torch.get_rng_state(), before)


def test_skipped_batches_are_not_decoded(tmp_path: Path) -> None:
    write_images(tmp_path / "train", per_class=10)
    write_images(tmp_path / "test", per_class=1)
    dataset = load(tmp_path)
    whole = list(dataset.train_batches(batch_size=6, seed=0, epoch=0))
    first = [int(i) for i in _positions(dataset, 6)[0]]
    for i in first:  # whoever reads them now fails
        Path(dataset._samples["train"][i][0]).write_text("gone")
    with pytest.raises(ValueError, match="not an image that can be decoded"):
        list(dataset.train_batches(batch_size=6, seed=0, epoch=0))
    assert_same(dataset.train_batches(batch_size=6, seed=0, epoch=0, start_step=1), whole[1:])


def _positions(dataset: Folder, batch_size: int) -> list[np.ndarray]:
    from normlab.data.streams import Stream, generator

    order = generator(Stream.TRAIN_ORDER, 0, 0).permutation(dataset.size("train"))
    return [order[i : i + batch_size] for i in range(0, len(order), batch_size)]


def test_evaluation_equals_torchvisions_pipeline(root: Path) -> None:
    pipeline = v2.Compose(
        [
            v2.Resize(18),  # 16 * 256 / 224
            v2.CenterCrop(16),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    files = sorted((root / "imagefolder" / "test").glob("*/*.png"))
    expected = torch.stack([pipeline(Image.open(f).convert("RGB")) for f in files])
    got = torch.cat([x for x, _ in load(root).eval_batches("test", batch_size=5, order=None)])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_random_boxes_follow_torchvisions_distribution() -> None:
    rng = np.random.default_rng(0)
    ours = np.array([random_box(60, 80, rng) for _ in range(4000)], dtype=float)
    top, left, height, width = ours.T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (top + height <= 60).all()
    assert (left + width <= 80).all()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.zeros(3, 60, 80)
        draw = v2.RandomResizedCrop(8).make_params
        boxes = [draw([image]) for _ in range(4000)]
    keys = ("top", "left", "height", "width")
    theirs = np.array([[b[k] for k in keys] for b in boxes], dtype=float)
    # 4,000 draws: a difference of means beyond five standard errors is not chance.
    error = np.sqrt((ours.var(0) + theirs.var(0)) / 4000)
    assert (abs(ours.mean(0) - theirs.mean(0)) < 5 * error).all()
    assert (abs(ours.std(0) / theirs.std(0) - 1) < 0.1).all()


def test_ratios_of_random_boxes_are_symmetric() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([random_box(400, 400, rng) for _ in range(8000)], dtype=float)
    logarithms = np.log(boxes[:, 2] / boxes[:, 3])
    assert abs(logarithms.mean()) < 5 * logarithms.std() / np.sqrt(8000)


def test_a_box_that_cannot_fit_is_the_largest_centred_one() -> None:
    rng = np.random.default_rng(0)
    assert {random_box(2, 1000, rng) for _ in range(5)} == {(0, 498, 2, 3)}
    assert {random_box(1000, 2, rng) for _ in range(5)} == {(498, 0, 3, 2)}


def test_a_tenth_is_held_apart_unless_there_are_three_directories(tmp_path: Path) -> None:
    write_images(tmp_path / "train", per_class=20)
    write_images(tmp_path / "val", per_class=3)
    two = load(tmp_path)
    assert [two.size(s) for s in ("train", "val", "test")] == [36, 4, 6]
    assert [label for _, label in two._samples["val"]] == [0, 0, 1, 1]
    write_images(tmp_path / "test", per_class=5)
    three = load(tmp_path)
    assert [three.size(s) for s in ("train", "val", "test")] == [40, 6, 10]
    assert three.digest != two.digest


def test_imagenet_holds_fifty_of_each_class_apart(tmp_path: Path) -> None:
    write_images(tmp_path / "imagenet" / "train", per_class=52, side=4)
    write_images(tmp_path / "imagenet" / "val", per_class=2, side=4)
    dataset = load(tmp_path, "imagenet", size=4)
    assert [dataset.size(s) for s in ("train", "val", "test")] == [4, 100, 4]
    assert dataset.num_classes == 2


def test_the_digest_is_that_of_paths_and_sizes(root: Path) -> None:
    base = root / "imagefolder"
    lines = "".join(
        f"{f.relative_to(base).as_posix()}|{f.stat().st_size}\n"
        for f in sorted(base.glob("*/*/*.png"))
    )
    assert load(root).digest == hashlib.sha256(lines.encode()).hexdigest()[:16]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"imagefolder is not there: .*NORMLAB_DATA") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    write_images(tmp_path / "train", per_class=2)
    write_images(tmp_path / "test", per_class=2, classes=3)
    with pytest.raises(ValueError, match="same classes: class2"):
        load(tmp_path)
    for wrong, message in (({"size": 0}, "data.size=0"), ({"workers": -1}, "data.workers=-1")):
        with pytest.raises(ValueError, match=message):
            load(tmp_path, **wrong)


def test_a_class_or_directory_without_enough_images_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "train", per_class=1)
    write_images(tmp_path / "test", per_class=1)
    with pytest.raises(ValueError, match="'class0' has 1 training images"):
        load(tmp_path)
    (tmp_path / "train" / "class0" / "000.png").unlink()
    with pytest.raises(ValueError, match="train: Found no valid file for the classes class0"):
        load(tmp_path)


def test_a_worker_ends_with_its_parent_and_with_nobody_else(root: Path) -> None:
    """A parent that ends waits for the workers that it has told to end, whatever held them."""
    batches = load(root, workers=1).train_batches(batch_size=8, seed=0, epoch=0)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(["kill", "-TERM", str(worker.pid)], check=True)
    next(batches)
    assert worker.is_alive()
    worker.terminate()
    worker.join(30)
    assert worker.exitcode == 0
