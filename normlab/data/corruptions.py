"""Corrupted images: what `normlab.domains` names, as pure functions of pixels, level and index."""

import io
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from normlab.data.patterns import Indices
from normlab.data.streams import SPLIT_SEED, Stream, generator
from normlab.domains import Domain

TINT = (0.3, 1.0, 0.6)
"""What a tint of level 5 leaves of red, green and blue; a grey image has the first."""

TRUNCATE = 4.0
"""Standard deviations after which a blur's kernel ends."""


def corrupt(images: Tensor, domain: Domain, indices: Indices, *, seed: int = SPLIT_SEED) -> Tensor:
    """`images` as they look in `domain`; a new tensor, except where nothing is to be done.

    images   (B, C, H, W), uint8 or float on a scale of 0 .. 1, one or three channels, any H and W
    indices  (B,): a number for each image, from which, and the seed, its noise is drawn. What
             becomes of an image depends on no other one, and not on the device.
    Returns the same shape, dtype and device: bytes are rounded, floats are not (a JPEG's are those
    of its bytes). Adversarial domains change nothing here: they need a network.
    """
    if not domain.corrupts:
        return images
    whole = images.dtype == torch.uint8
    x = images.float() / 255 if whole else images
    if domain.kind == "gaussian_noise":
        made = x + domain.amount * _noise(x, indices, seed)
    else:
        made = _KINDS[domain.kind](x, domain.amount)
    made = made.clamp(0, 1)
    return made.mul(255).round_().to(torch.uint8) if whole else made


def corrupt_each(images: Tensor, domains: Sequence[Domain], indices: Indices) -> Tensor:
    """`images` (B, C, H, W), each as it looks in its own of the (B,) `domains`."""
    corrupted = [domain for domain in dict.fromkeys(domains) if domain.corrupts]
    made = images.clone() if corrupted else images
    for domain in corrupted:
        where = [i for i, one in enumerate(domains) if one == domain]
        made[where] = corrupt(images[where], domain, indices[where])
    return made


def _noise(x: Tensor, indices: Indices, seed: int) -> Tensor:
    """(B, C, H, W) standard normal numbers, drawn image by image on the CPU."""
    drawn = np.empty(x.shape, dtype=np.float32)
    for image, index in zip(drawn, indices, strict=True):
        generator(Stream.CORRUPTION, seed, int(index)).standard_normal(out=image, dtype=np.float32)
    return torch.from_numpy(drawn).to(x)


def _contrast(x: Tensor, factor: float) -> Tensor:
    mean = x.mean((2, 3), keepdim=True)
    return (x - mean) * factor + mean


def _jpeg(x: Tensor, quality: float) -> Tensor:
    """By Pillow: the standard tables of libjpeg, colours at half the resolution."""
    pixels = x.mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()
    read = np.empty_like(pixels)
    for image, place in zip(pixels, read, strict=True):
        grey = image.shape[-1] == 1
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if grey else image).save(buffer, "JPEG", quality=int(quality))
        with Image.open(buffer) as file:
            place[:] = np.asarray(file).reshape(place.shape)
    return torch.from_numpy(read).permute(0, 3, 1, 2).to(x) / 255


def _brightness(x: Tensor, added: float) -> Tensor:
    """Scaling R, G and B alike keeps hue and saturation; black, which has neither, becomes grey."""
    value = x.amax(1, keepdim=True)
    raised = (value + added).clamp(max=1)
    return torch.where(value > 0, x * (raised / value), raised)


def _blur(x: Tensor, sigma: float) -> Tensor:
    radius = int(TRUNCATE * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1, dtype=x.dtype, device=x.device)
    kernel = torch.exp(-0.5 * (offsets / sigma).square())
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    rows = x.flatten(0, 1)[:, None]  # (B C, 1, H, W)
    rows = F.conv2d(F.pad(rows, (radius, radius, 0, 0), mode="replicate"), kernel)
    rows = F.conv2d(F.pad(rows, (0, 0, radius, radius), mode="replicate"), kernel.mT)
    return rows.view_as(x)


def _tint(x: Tensor, strength: float) -> Tensor:
    left = 1 - strength * (1 - torch.tensor(TINT[: x.size(1)], dtype=x.dtype, device=x.device))
    return x * left.view(-1, 1, 1)


def _invert(x: Tensor, factor: float) -> Tensor:
    return factor * (1 - x)


def _scale(x: Tensor, factor: float) -> Tensor:
    _, _, height, width = x.shape
    high, wide = (max(1, side // int(factor)) for side in (height, width))
    made = x.mean((2, 3), keepdim=True).expand_as(x).clone()
    top, left = (height - high) // 2, (width - wide) // 2
    made[:, :, top : top + high, left : left + wide] = F.interpolate(x, (high, wide), mode="area")
    return made


_KINDS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "contrast": _contrast,
    "jpeg": _jpeg,
    "brightness": _brightness,
    "blur": _blur,
    "tint": _tint,
    "invert": _invert,
    "scale": _scale,
}
