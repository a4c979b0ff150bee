"""Corrupted images against definitions in float64, and what all of them have in common (3 s)."""

import colorsys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import fft, ndimage, stats

from normlab.data.corruptions import _KINDS, corrupt, corrupt_each
from normlab.domains import ADVERSARIAL, LEVELS, Domain

DOMAINS = [
    Domain(kind, level) for kind, levels in LEVELS.items() for level in levels
    if kind != ADVERSARIAL
]  # fmt: skip
SIX = np.arange(6)

LUMINANCE = [
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55,
    14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
    18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92,
    49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99,
]  # fmt: skip


def pictures(n=6, channels=3, side=12, seed=0):
    """Smooth ones with some noise, so that a JPEG does not leave nothing of them."""
    rng = np.random.default_rng(seed)
    waves = ndimage.gaussian_filter(rng.uniform(0, 1, (n, channels, side, side)), (0, 0, 1.5, 1.5))
    spread = (waves - waves.min()) / (waves.max() - waves.min())
    return torch.from_numpy(np.rint(255 * spread).astype(np.uint8))


def made(kind, level, images, indices=SIX):
    return corrupt(images, Domain(kind, level), indices)


def test_every_kind_is_made_by_somebody():
    assert set(_KINDS) | {"gaussian_noise", ADVERSARIAL} == set(LEVELS)


@pytest.mark.parametrize("domain", DOMAINS, ids=str)
def test_an_image_depends_on_its_index_and_on_no_other_image(domain):
    images = pictures()
    whole = corrupt(images, domain, SIX)
    assert whole.dtype == torch.uint8
    assert not torch.equal(whole, images)
    order = np.array([4, 2, 5])
    assert torch.equal(corrupt(images[order], domain, order), whole[order])
    assert torch.equal(corrupt(images, domain, SIX), whole)
    floats = corrupt(images.double() / 255, domain, SIX)
    assert floats.dtype == torch.float64
    assert (floats * 255 - whole.double()).abs().max() <= 0.51  # rounded halves, in float32
    assert 0 <= floats.min() <= floats.max() <= 1


@settings(max_examples=40, deadline=None)
@given(
    domain=st.sampled_from(DOMAINS), channels=st.sampled_from([1, 3]),
    height=st.integers(1, 17), width=st.integers(1, 17),
)  # fmt: skip
def test_any_size_and_grey_images_are_taken(domain, channels, height, width):
    images = torch.randint(0, 256, (2, channels, height, width), dtype=torch.uint8)
    before = images.clone()
    assert corrupt(images, domain, SIX[:2]).shape == images.shape
    assert torch.equal(images, before)


def test_as_they_are_images_are_left_alone_and_so_are_adversarial_ones():
    images = pictures()
    assert corrupt(images, Domain(), SIX) is images
    assert corrupt(images, Domain(ADVERSARIAL, 8), SIX) is images
    assert corrupt_each(images, [Domain()] * 6, SIX) is images


@pytest.mark.parametrize(("level", "factor"), list(enumerate((0.75, 0.5, 0.4, 0.3, 0.15), 1)))
def test_contrast_keeps_each_channels_mean_and_shrinks_what_is_about_it(level, factor):
    x = pictures().double() / 255
    y = made("contrast", level, x)
    mean = x.mean((2, 3), keepdim=True)
    assert torch.allclose(y, mean + factor * (x - mean))
    assert torch.allclose(y.std((2, 3)), factor * x.std((2, 3)))


@pytest.mark.parametrize(("level", "sigma"), list(enumerate((0.04, 0.06, 0.08, 0.09, 0.10), 1)))
def test_noise_is_normal_white_and_other_for_every_image_and_seed(level, sigma):
    grey = torch.full((40, 3, 32, 32), 0.5, dtype=torch.float64)
    noise = (made("gaussian_noise", level, grey, np.arange(40)) - 0.5) / sigma
    n = noise.numel()
    assert abs(noise.mean()) < 4 / n**0.5
    assert abs(noise.var() - 1) < 4 * (2 / n) ** 0.5
    assert stats.kstest(noise[:4].flatten().numpy(), "norm").pvalue > 1e-3
    assert abs(np.corrcoef(noise.flatten(1).numpy()) - np.eye(40)).max() < 0.1
    other = corrupt(grey, Domain("gaussian_noise", level), np.arange(40), seed=1)
    assert not torch.equal(other[0], 0.5 + sigma * noise[0])


@pytest.mark.parametrize(("level", "quality"), list(enumerate((80, 65, 58, 50, 40), 1)))
def test_a_grey_jpeg_is_its_rounded_cosine_transform(level, quality):
    """Annex K's table for luminance, scaled as libjpeg does. An integer codec differs by a unit,
    and where a coefficient lies between two multiples, by another multiple."""
    pixels = pictures(n=4, channels=1, side=16)
    table = np.array(LUMINANCE).reshape(8, 8)
    scale = 5000 / quality if quality < 50 else 200 - 2 * quality
    table = np.clip((table * scale + 50) // 100, 1, 255)
    blocks = pixels.double().numpy().reshape(4, 2, 8, 2, 8).swapaxes(2, 3) - 128
    stored = np.rint(fft.dctn(blocks, axes=(3, 4), norm="ortho") / table) * table
    expected = fft.idctn(stored, axes=(3, 4), norm="ortho").swapaxes(2, 3).reshape(4, 1, 16, 16)
    ours = made("jpeg", level, pixels, SIX[:4]).double().numpy()
    assert np.quantile(abs(ours - np.clip(expected + 128, 0, 255)), 0.9) <= 1
    assert np.quantile(abs(ours - pixels.double().numpy()), 0.9) > 2


def test_a_jpeg_of_colours_is_nearer_with_a_higher_quality():
    x = pictures(side=32).double() / 255
    away = [float((made("jpeg", level, x) - x).square().mean()) for level in range(1, 6)]
    assert away == sorted(away)
    assert away[-1] < 0.01


@pytest.mark.parametrize(("level", "added"), list(enumerate((0.05, 0.1, 0.15, 0.2, 0.3), 1)))
def test_brightness_raises_the_value_of_hsv(level, added):
    x = pictures(side=4).double() / 255
    x[0, :, 0, 0] = 0  # black has no hue
    y = made("brightness", level, x)
    pixels = x.permute(0, 2, 3, 1).reshape(-1, 3).tolist()
    expected = []
    for pixel in pixels:
        hue, saturation, value = colorsys.rgb_to_hsv(*pixel)
        expected.append(colorsys.hsv_to_rgb(hue, saturation, min(1, value + added)))
    assert np.allclose(y.permute(0, 2, 3, 1).reshape(-1, 3), expected)


@pytest.mark.parametrize(("level", "sigma"), list(enumerate((0.4, 0.6, 0.7, 0.8, 1), 1)))
def test_blur_is_a_gaussian_filter_with_repeated_edges(level, sigma):
    x = pictures().double() / 255
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, sigma, sigma), mode="nearest", truncate=4)
    assert np.allclose(made("blur", level, x), expected)


def test_tint_multiplies_channels_and_level_5_is_the_strongest():
    x = pictures().double() / 255
    factors = torch.tensor([0.3, 1, 0.6], dtype=torch.float64).view(3, 1, 1)
    assert torch.allclose(made("tint", 5, x), x * factors)
    assert torch.allclose(made("tint", 1, x), x * (0.8 + 0.2 * factors))


@pytest.mark.parametrize(("level", "factor"), list(enumerate((1, 0.8, 0.65, 0.5, 0.35), 1)))
def test_invert_is_the_negative_made_darker(level, factor):
    x = pictures().double() / 255
    assert torch.allclose(made("invert", level, x), factor * (1 - x))


@pytest.mark.parametrize("factor", [2, 3, 4])
def test_a_scale_puts_the_averaged_image_on_its_mean_colour(factor):
    x = pictures().double() / 255
    y = made("scale", factor, x)
    small = 12 // factor
    first = (12 - small) // 2
    blocks = x.reshape(6, 3, small, factor, small, factor).mean((3, 5))
    assert torch.allclose(y[:, :, first : first + small, first : first + small], blocks)
    assert torch.allclose(y.mean((2, 3)), x.mean((2, 3)))
    assert torch.allclose(y[:, :, 0, 0], x.mean((2, 3)))


def test_each_image_can_look_in_its_own_way():
    images = pictures()
    domains = [Domain(), Domain("contrast", 5), Domain("gaussian_noise", 1)] * 2
    before, mixed = images.clone(), corrupt_each(images, domains, SIX)
    for i, domain in enumerate(domains):
        assert torch.equal(mixed[i : i + 1], corrupt(images[i : i + 1], domain, SIX[i : i + 1]))
    assert torch.equal(images, before)


@pytest.mark.parametrize("spec", ["none", *map(str, DOMAINS), "pgd-8"])
def test_a_domain_is_read_and_written(spec):
    assert str(Domain.parse(spec)) == spec


@pytest.mark.parametrize("spec", ["", "contrast", "contrast-6", "contrast-05", "fog-1", "pgd-9"])
def test_an_unknown_domain_is_refused_in_one_line(spec):
    with pytest.raises(ValueError, match=rf"no domain '{spec}' \(domains: none, contrast-1\.\.5"):
        Domain.parse(spec)


@pytest.mark.parametrize("kind", ["contrast", "gaussian_noise", "brightness", "blur", "tint"])
def test_every_level_is_farther_from_the_image_than_the_one_before(kind):
    x = pictures(side=32).double() / 255
    away = [float((made(kind, level, x) - x).square().mean()) for level in range(1, 6)]
    assert away == sorted(away)
