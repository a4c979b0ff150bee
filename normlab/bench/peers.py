"""The layers that ours are compared with: torch's, torchvision's, timm's own, and seven rewritten.

Rewritten are the layers of projects that do not install beside a current torch, or at all: from
their published descriptions, in our words, with the operations that decide their speed. Each is
tested for what it computes. Every peer takes and returns (N, C, H, W).
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.nn.utils import parametrizations

NATIVE = "torch BatchNorm2d"
"""The layer that every row is a multiple of; where it does the same as ours, a peer as well."""

Maker = Callable[[], nn.Module]


def of(name: str, options: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Maker]:
    """Who does the same as our layer `name` with these options: peer -> how it is made.

    shape is that of the input (N, C, H, W), for a convolution of its weight (O, I, kh, kw). A layer
    that nobody else has gets {}, and so do peers whose package is not installed.
    """
    from torchvision.models.convnext import LayerNorm2d
    from torchvision.ops import FrozenBatchNorm2d

    samples, channels = shape[:2]
    nbs = options.get("nbs")
    found: dict[str, Maker] = {}
    if name in ("bn", "sync") or options.get("extra"):
        found[NATIVE] = lambda: nn.BatchNorm2d(channels)
    if name == "ghost":
        found["composer GhostBatchNorm"] = lambda: ChunkedBatchNorm(channels, nbs=options["nbs"])
        found["cifar10-fast GhostBatchNorm"] = lambda: ViewBatchNorm(
            channels, groups=samples // options["nbs"]
        )
    elif name == "frozen" and options["affine"] == "frozen":
        found["torchvision FrozenBatchNorm2d"] = lambda: FrozenBatchNorm2d(channels)
        found["detectron2 FrozenBatchNorm2d"] = lambda: ScaleAndShift(channels)
    elif name == "frozen":
        found["torch BatchNorm2d, eval()"] = lambda: nn.BatchNorm2d(channels).eval()
    elif name == "renorm" and nbs is None:
        found["Batch Renorm written out"] = lambda: RenormWrittenOut(channels)
    elif name == "l1":
        found["norm_matters L1BatchNorm"] = lambda: L1WrittenOut(channels)
    elif options.get("reference"):
        found["improved-gan VBN"] = lambda: BlendedBatchNorm(channels, options["reference"])
    elif name == "gn":
        found["torch GroupNorm"] = lambda: nn.GroupNorm(options["groups"], channels)
    elif name == "ln":
        found["torch GroupNorm(1)"] = lambda: nn.GroupNorm(1, channels)
    elif name == "ln_elementwise":
        found["torch LayerNorm"] = lambda: nn.LayerNorm(shape[1:])
    elif name == "ln_channels":
        found["torchvision LayerNorm2d"] = lambda: LayerNorm2d(channels)
    elif name == "in":
        found["torch InstanceNorm2d"] = lambda: nn.InstanceNorm2d(channels, affine=True)
        found["torch GroupNorm(C)"] = lambda: nn.GroupNorm(channels, channels)
    elif name == "lrn":
        size, alpha = options["size"], options["alpha"] * options["size"]
        beta, k = options["beta"], options["k"]
        found["torch LocalResponseNorm"] = lambda: nn.LocalResponseNorm(size, alpha, beta, k)
    elif name == "wn":
        found["torch weight_norm"] = lambda: parametrizations.weight_norm(_conv(nn.Conv2d, shape))
    return found | _of_timm(name, options, shape)


def _of_timm(name: str, options: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Maker]:
    try:
        from timm.layers.norm import GroupNorm, GroupNorm1, LayerNorm2d
        from timm.layers.split_batchnorm import SplitBatchNorm2d
        from timm.layers.std_conv import StdConv2d
    except ImportError:
        return {}
    channels = shape[1]
    found: dict[str, dict[str, Maker]] = {
        "gn": {"timm GroupNorm": lambda: GroupNorm(channels, options["groups"])},
        "ln": {"timm GroupNorm1": lambda: GroupNorm1(channels)},
        "ln_channels": {"timm LayerNorm2d": lambda: LayerNorm2d(channels)},
        "separate": {
            "timm SplitBatchNorm2d": partial(
                SplitBatchNorm2d, channels, num_splits=options.get("num_domains", 2)
            )
        },
        "ws": {"timm StdConv2d": lambda: _conv(StdConv2d, shape)},
    }
    return found.get(name, {})


def _conv(kind: Callable[..., nn.Module], shape: tuple[int, ...]) -> nn.Module:
    return kind(shape[1], shape[0], shape[2:], padding=0, bias=False)


class ChunkedBatchNorm(nn.BatchNorm2d):
    """composer's ghost batch norm: one batch norm after another, over the chunks of the batch.

    All chunks move the running statistics, by momentum / chunks each.
    """

    def __init__(self, num_features: int, *, nbs: int) -> None:
        super().__init__(num_features)
        self.nbs = nbs

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        chunks = input.chunk(math.ceil(len(input) / self.nbs))
        momentum, self.momentum = self.momentum, 0.1 / len(chunks)
        y = torch.cat([super(ChunkedBatchNorm, self).forward(chunk) for chunk in chunks])
        self.momentum = momentum
        return y


class ViewBatchNorm(nn.BatchNorm2d):
    """cifar10-fast's ghost batch norm: sample i in group i mod G, as channels of its own.

    Every group has running statistics of its own, which evaluation averages. Free in NCHW, where
    (N, C) is (N / G, G C) without a copy; channels_last is copied.
    """

    def __init__(self, num_features: int, *, groups: int) -> None:
        super().__init__(num_features)
        self.groups = groups
        self.register_buffer("means", torch.zeros(groups * num_features))
        self.register_buffer("vars", torch.ones(groups * num_features))

    def forward(self, input: Tensor) -> Tensor:
        _, channels, *size = input.shape
        assert isinstance(self.means, Tensor)
        assert isinstance(self.vars, Tensor)
        y = F.batch_norm(
            input.reshape(-1, channels * self.groups, *size), self.means, self.vars,
            self.weight.repeat(self.groups), self.bias.repeat(self.groups), True, 0.1, self.eps,
        )  # fmt: skip
        return y.reshape(input.shape)


class ScaleAndShift(nn.Module):
    """detectron2's frozen batch norm, where gradients pass: x * scale + shift, made anew each time.

    Unlike torchvision's, scale and shift are cast to the input's dtype.
    """

    def __init__(self, num_features: int) -> None:
        super().__init__()
        from torchvision.ops import FrozenBatchNorm2d  # seconds, which no rank should wait for

        self.layer = FrozenBatchNorm2d(num_features)

    def forward(self, x: Tensor) -> Tensor:
        constants = self.layer
        scale = constants.weight * (constants.running_var + constants.eps).rsqrt()
        shift = constants.bias - constants.running_mean * scale
        y: Tensor = x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)
        return y


class RenormWrittenOut(nn.BatchNorm2d):
    """Batch Renorm's Algorithm 1 term by term, differentiated by autograd, as its ports have it.

    The limits are the final ones, 3 and 5; the ramp towards them costs nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        x, shape = input, (1, -1, 1, 1)
        mean = x.mean((0, 2, 3))
        sigma = (x.var((0, 2, 3), correction=0) + self.eps).sqrt()
        with torch.no_grad():
            population = (self.running_var + self.eps).sqrt()
            r = (sigma / population).clamp(1 / 3, 3)
            d = ((mean - self.running_mean) / population).clamp(-5, 5)
            self.running_mean.lerp_(mean.float(), 0.1)
            self.running_var.lerp_(sigma.float().square(), 0.1)
        y = (x - mean.view(shape)) / sigma.view(shape) * r.view(shape) + d.view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)


class L1WrittenOut(nn.BatchNorm2d):
    """norm_matters' L1 batch norm: channels gathered into rows, differentiated by autograd.

    Its running averages hold the scale's inverse and keep a tenth; here they are as elsewhere.
    """

    def forward(self, input: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        x, shape = input, (1, -1, 1, 1)
        rows = x.transpose(0, 1).flatten(1)
        mean = rows.mean(1)
        deviation = (rows - mean[:, None]).abs().mean(1)
        scale = 1 / (math.sqrt(math.pi / 2) * deviation + self.eps)
        with torch.no_grad():
            self.running_mean.lerp_(mean.float(), 0.1)
            self.running_var.lerp_(scale.float(), 0.1)
        y = (x - mean.view(shape)) * scale.view(shape)
        return (y * self.weight.view(shape) + self.bias.view(shape)).to(input.dtype)


class BlendedBatchNorm(nn.BatchNorm2d):
    """improved-gan's virtual batch norm: first and second moments of reference and sample, blended.

    The reference batch is the last `reference` samples, normalized by itself. The variance is the
    blended square less the square of the blended mean.
    """

    def __init__(self, num_features: int, reference: int) -> None:
        super().__init__(num_features)
        self.reference = reference

    def forward(self, input: Tensor) -> Tensor:
        own, reference = input[: -self.reference], input[-self.reference :]
        mean, square = _two_moments(reference, (0, 2, 3))
        own_mean, own_square = _two_moments(own, (2, 3))
        share = 1 / (self.reference + 1)
        y = self._blend(
            own, share * own_mean + (1 - share) * mean, share * own_square + (1 - share) * square
        )
        return torch.cat([y, self._blend(reference, mean, square)]).to(input.dtype)

    def _blend(self, x: Tensor, mean: Tensor, square: Tensor) -> Tensor:
        shape = (1, -1, 1, 1)
        y = (x - mean) / (square - mean.square() + self.eps).sqrt()
        return y * self.weight.view(shape) + self.bias.view(shape)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """detectron2's batch norm over all ranks, in its default mode: each rank counts alike.

    Means of x and of x^2 are averaged over the ranks, differentiably, and the rest is scale and
    shift under autograd. The running variance is the biased one. Alone, it is torch's batch norm.
    """

    def forward(self, input: Tensor) -> Tensor:
        ranks = distributed.get_world_size() if distributed.is_initialized() else 1
        if ranks == 1 or not self.training:
            return super().forward(input)
        assert self.running_mean is not None
        assert self.running_var is not None
        x, over = input, (0, 2, 3)
        moments = torch.cat([x.mean(over), (x * x).mean(over)])
        mean, square = (_SumOfRanks.apply(moments) / ranks).chunk(2)
        var = square - mean * mean
        scale = self.weight * (var + self.eps).rsqrt()
        shift = self.bias - mean * scale
        with torch.no_grad():
            self.running_mean += 0.1 * (mean - self.running_mean)
            self.running_var += 0.1 * (var - self.running_var)
        y: Tensor = x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return y


class _SumOfRanks(torch.autograd.Function):
    """The sum of the ranks' x, as fvcore has it: gathered and added up, reduced on the way back."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.zeros_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x)
        return torch.stack(parts).sum(0)

    @staticmethod
    def backward(_ctx: Any, dy: Tensor) -> Tensor:
        distributed.all_reduce(dy)
        return dy


def _two_moments(x: Tensor, over: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    return x.mean(over, keepdim=True), x.square().mean(over, keepdim=True)
