"""The batch-at-a-time data path against one image at a time, and against torchvision."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from normlab.data import find
from normlab.data.memory import (
    InMemory,
    Split,
    average_pool,
    check_augment,
    crop_flip,
    moments,
    pack,
    unpack,
)

PIXELS = np.random.default_rng(1).integers(0, 256, (30, 16, 16, 3), dtype=np.uint8)


def in_memory(pixels: np.ndarray = PIXELS, *, augment: str = "none") -> InMemory:
    words = pack(pixels)
    everything = np.arange(len(pixels))
    return InMemory(
        "test",
        {s: Split(words, everything % 10, everything) for s in ("train", "val", "test")},
        num_classes=10,
        moments=moments(words, everything),
        augment=augment,
        digest="0" * 16,
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_words_hold_the_pixels(channels: int) -> None:
    pixels = PIXELS[..., :channels]
    assert np.array_equal(unpack(pack(pixels)), pixels)
    with pytest.raises(ValueError, match="1 or 3"):
        pack(PIXELS[..., :2])


@pytest.mark.parametrize("channels", [1, 3])
def test_crop_and_mirror_equal_torchvision_image_by_image(channels: int) -> None:
    rng = np.random.default_rng(2)
    draws = np.stack([rng.integers(0, 5, 30), rng.integers(0, 5, 30), rng.integers(0, 2, 30)])
    pixels = PIXELS[:, :, 2:, :channels].copy()  # not square: rows and columns must not be mixed up
    words = crop_flip(torch.from_numpy(pack(pixels)), torch.from_numpy(draws.astype(np.int32)), 2)
    ours = unpack(words.numpy())
    for image, (top, left, mirrored), got in zip(pixels, draws.T, ours, strict=True):
        expected = torch.from_numpy(image).permute(2, 0, 1)
        expected = v2.functional.pad(expected, [2, 2, 2, 2])
        expected = v2.functional.crop(expected, top, left, 16, 14)
        if mirrored:
            expected = v2.functional.horizontal_flip(expected)
        assert np.array_equal(got, expected.permute(1, 2, 0).numpy())


def test_normalization_equals_torchvision() -> None:
    mean, std = PIXELS.reshape(-1, 3).mean(0) / 255, PIXELS.reshape(-1, 3).std(0) / 255
    transform = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    )
    x, _ = next(in_memory().eval_batches("val", batch_size=30, order=None))
    torch.testing.assert_close(x, torch.stack([transform(image) for image in PIXELS]))


def test_a_constant_channel_stays_finite() -> None:
    x, _ = next(in_memory(np.full_like(PIXELS, 9)).eval_batches("val", batch_size=3, order=None))
    assert torch.equal(x, torch.zeros_like(x))


def test_moments_are_exact() -> None:
    chosen = np.array([0, 5, 7, 29])
    mean, std = moments(pack(PIXELS), chosen)
    pixels = PIXELS[chosen].reshape(-1, 3).astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean(0), rtol=1e-13)
    np.testing.assert_allclose(std, pixels.std(0), rtol=1e-13)


@pytest.mark.parametrize("size", [8, 4, 1])
def test_average_pooling_rounds_the_exact_mean(size: int) -> None:
    exact = F.avg_pool2d(torch.from_numpy(PIXELS).permute(0, 3, 1, 2).double(), 16 // size)
    expected = (exact + 0.5).floor().permute(0, 2, 3, 1).numpy()
    assert np.array_equal(average_pool(PIXELS, size), expected)


@pytest.mark.parametrize(
    ("augment", "views"), [("none", 1), ("flip", 2), ("crop", 25), ("crop_flip", 50)]
)
def test_each_augmentation_reaches_all_its_views_and_no_other(augment: str, views: int) -> None:
    data = in_memory(np.repeat(PIXELS[:1], 1000, axis=0), augment=augment)
    ((x, _),) = data.train_batches(batch_size=1000, seed=1, epoch=0)
    assert len(torch.unique(x, dim=0)) == views
    ((x, _),) = data.eval_batches("train", batch_size=1000, order=1)
    assert len(torch.unique(x, dim=0)) == 1


def test_augmentation_differs_between_steps_and_epochs() -> None:
    data = in_memory(np.repeat(PIXELS[:1], 64, axis=0), augment="crop_flip")
    batches = [x for e in (0, 1) for x, _ in data.train_batches(batch_size=32, seed=0, epoch=e)]
    assert all(not torch.equal(a, b) for i, a in enumerate(batches) for b in batches[:i])


def test_unknown_augmentation_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"data\.augment=cutout: one of none, crop, flip, crop_flip"
    ):
        check_augment("cutout")
    with pytest.raises(ValueError, match=r"data\.augment=flip: one of none, crop$"):
        find("digits")("", seed=0, augment="flip")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gpu_delivers_what_the_cpu_does(channels_last: bool) -> None:
    data = in_memory(augment="crop_flip")
    on = [
        next(
            data.train_batches(
                batch_size=20, seed=0, epoch=0, device=device, channels_last=channels_last
            )
        )
        for device in ("cpu", "cuda")
    ]
    torch.testing.assert_close(on[1][0].cpu(), on[0][0])
    assert torch.equal(on[1][1].cpu(), on[0][1])
