"""Forward and backward of every layer, as a multiple of torch's BatchNorm2d and of its peers.

The layers are those of `normlab.norms` with the options of `conf/`; what one needs beyond them, its
signature tells. In each cell, a shape in a memory format and a dtype, the layer, the batch norm and
the peers take turns, so that every ratio is one of neighbours in time. Below 1 ours is the faster.
"""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from itertools import product
from statistics import median
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from omegaconf import OmegaConf
from torch import Tensor, nn
from tqdm import tqdm

from normlab import allocator, config, kernels
from normlab.bench import peers
from normlab.bench.measure import Spread
from normlab.norms import domains
from normlab.turns import take_turns

Shape = tuple[int, ...]
Options = dict[str, Any]

SHAPES: tuple[Shape, ...] = (
    (128, 16, 32, 32),
    (128, 32, 16, 16),
    (128, 64, 8, 8),
    (32, 256, 56, 56),
)
"""Inputs of the norms: the three stages of a CIFAR network, and the first of an ImageNet one."""

FILTERS: tuple[Shape, ...] = ((16, 16, 3, 3), (64, 64, 3, 3), (512, 512, 3, 3), (2048, 512, 1, 1))
"""Weights of the convolutions: their normalization is all that is measured of them."""

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

VARIANTS: Mapping[str, tuple[Options, ...]] = {
    "frozen": ({}, {"affine": "trainable"}),
    "ghost": ({}, {"grouping": "interleaved"}),
}
"""Options besides the defaults of `conf/` that compute in another way."""

NBS = (2, 4, 8, 16, 32)
FEW_NBS = (2, 8, 32)
"""For layers that also do without, and for variants."""

LEVEL = 1.10
"""Up to this ratio to the fastest peer, a layer is not slower."""

REPEAT = 0.005
"""Seconds that the batch norm of a turn takes at least, by repetition."""


@dataclass(frozen=True)
class Layer:
    """One of ours, as it is made for one shape."""

    name: str
    kind: Callable[..., nn.Module]
    options: Options
    variant: str
    shape: Shape
    conv: bool

    def make(self) -> nn.Module:
        if self.conv:
            outputs, inputs, *size = self.shape
            return self.kind(inputs, outputs, tuple(size), bias=False, **self.options)
        return self.kind(self.shape[1], **self.options)

    def native(self) -> nn.Module:
        return BatchNormOfFilters(self.shape) if self.conv else nn.BatchNorm2d(self.shape[1])


@dataclass(frozen=True)
class LayerRow:
    """A layer in a cell; times are milliseconds of a forward and a backward."""

    layer: str
    variant: str
    shape: str
    format: str
    dtype: str
    clock: str
    rounds: int
    ours: Spread
    native: Spread
    ratio: Spread
    """Our time over torch's BatchNorm2d, in training."""
    peer: str
    """The fastest one; nobody: ''."""
    to_peer: Spread | None
    peers: Mapping[str, float] = field(default_factory=dict)
    """All of them, over BatchNorm2d, with the digits that the table has."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Peers that do not take this dtype: what they said."""
    saved: float = 1.0
    """Bytes kept for the backward pass over those of the input (which BatchNorm2d keeps)."""
    bar: float | None = None
    """What `ratio` may be at most."""
    kernels: bool = False
    """Whether the layer could use the fused kernels."""

    @property
    def met(self) -> bool | None:
        return None if self.bar is None else self.ratio.median <= self.bar

    @property
    def level(self) -> bool | None:
        """Whether ours is at most a tenth slower than the fastest peer."""
        return None if self.to_peer is None else self.to_peer.median <= LEVEL


def rows(*, quick: bool) -> list[LayerRow]:
    """All of them within about ten minutes; quick: the smaller shapes, two minutes.

    This process keeps freed memory afterwards, as every run does. A peer that refuses a cell, and
    one whose package is not installed, is missing from it.
    """
    allocator.keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cells = list(_cells(len(SHAPES) - 1 if quick else len(SHAPES)))
    deadline = time.perf_counter() + (75 if quick else 600)
    done = []
    with tqdm(cells, desc="layers", unit="row", leave=False, disable=None) as bar:
        for number, (layer, format, dtype) in enumerate(bar):
            share = (deadline - time.perf_counter()) / (len(cells) - number)
            done.append(
                row(layer, format, dtype, device=device, rounds=6 if quick else 20, seconds=share)
            )
    return done


def _cells(shapes: int) -> Iterator[tuple[Layer, str, str]]:
    """The largest shapes last: they get the time that the others leave."""
    for which, format, dtype in product(range(shapes), FORMATS, DTYPES):
        for layer in layers(which):
            yield layer, format, dtype


def layers(which: int) -> list[Layer]:
    """Every norm and convolution that has a file in `conf/`, for the shape of that number."""
    found = []
    for group, room, shape in (
        ("norm", "normlab.norms", SHAPES[which]),
        ("conv", "normlab.norms.conv", FILTERS[which]),
    ):
        names = import_module(room).names()
        for name, path in sorted(config.options(group).items()):
            keys = OmegaConf.to_container(OmegaConf.load(path))
            assert isinstance(keys, dict)
            module = str(keys.get("module") or name)
            if module not in names:  # conv=plain
                continue
            kind = import_module(room).find(module)
            given = {str(k): v for k, v in keys.items() if k not in ("name", "module", "batch")}
            for variant in VARIANTS.get(name, ({},)):
                for needed in _needed(kind, shape, few=bool(variant)):
                    options = given | variant | needed
                    label = _spelled(variant | needed, shape)
                    found.append(Layer(name, kind, options, label, shape, group == "conv"))
    return found


def _needed(kind: Callable[..., nn.Module], shape: Shape, *, few: bool) -> list[dict[str, Any]]:
    """What the signature asks for beyond `conf/`: one set of options for each row."""
    parameters = inspect.signature(kind).parameters
    half = shape[0] // 2
    if "nbs" in parameters:
        optional = parameters["nbs"].default is None
        sizes = FEW_NBS if few or optional else NBS
        return [*[{}] * optional, *({"nbs": nbs} for nbs in sizes)]
    if "shape" in parameters:
        return [{"shape": shape[2:]}]
    if "num_domains" in parameters:
        return [{"num_domains": 2}]
    if "reference" in parameters:
        return [{"extra": half}, {"reference": half}]
    return [{}]


def _spelled(options: Options, shape: Shape) -> str:
    """The options that tell rows apart; those that follow from the shape are the same in all."""
    half = {key: "N/2" for key in ("extra", "reference") if options.get(key) == shape[0] // 2}
    return " ".join(f"{k}={v}" for k, v in (options | half).items() if k != "shape")


def bar(name: str, options: Options, format: str) -> float | None:
    """The declared limits of `ratio`."""
    if name == "ghost" and format == "NCHW":
        return 1.0
    if name == "frozen" and options["affine"] == "frozen":
        return 0.45
    if name == "renorm" and "nbs" not in options:
        return 1.35
    return None


def row(
    layer: Layer,
    format: str,
    dtype: str,
    *,
    device: torch.device,
    rounds: int,
    seconds: float,
) -> LayerRow:
    """Measure one layer in one cell, for at most `rounds` rounds or about `seconds`."""
    torch.set_num_threads(1)
    makers = {"ours": layer.make, "native": layer.native}
    others = peers.of(layer.name, layer.options, layer.shape)
    makers |= {name: maker for name, maker in others.items() if name != peers.NATIVE}
    steps: dict[str, Step] = {}
    refused: dict[str, str] = {}
    with ExitStack() as stack:
        torch.manual_seed(0)
        if layer.conv:  # what is left of it are its filters
            stack.enter_context(mock.patch.object(F, "conv2d", lambda _, weight, *__: weight))
            x = torch.zeros(1, device=device)
        else:
            x = torch.randn(layer.shape, device=device).to(DTYPES[dtype])
            x = x.to(memory_format=FORMATS[format]).requires_grad_()
        for name, make in makers.items():
            made = make().to(device)
            if layer.conv:
                made.to(memory_format=FORMATS[format]).to(DTYPES[dtype])
            if name == "ours" and "num_domains" in layer.options:
                count = layer.options["num_domains"]
                labels = torch.arange(count).repeat_interleave(layer.shape[0] // count)
                stack.enter_context(domains(made, labels))
            try:
                steps[name] = Step(made, x, FORMATS[format])
            except (NotImplementedError, RuntimeError) as error:
                if name not in others:
                    raise
                refused[name] = str(error).splitlines()[0]
        clock = cuda_time if device.type == "cuda" else time.process_time
        repeats = _repeats(steps["native"], clock)
        taken = take_turns(
            {name: partial(step, repeats) for name, step in steps.items()},
            rounds,
            clock=clock,
            seconds=seconds,
        )
    if peers.NATIVE in others:
        taken[peers.NATIVE] = taken["native"]
    return _row(
        layer,
        format,
        dtype,
        {name: [1000 * one / repeats for one in of] for name, of in taken.items()},
        saved=steps["ours"].saved,
        refused=refused,
        clock="elapsed" if device.type == "cuda" else "CPU time, 1 thread",
    )


def _row(
    layer: Layer,
    format: str,
    dtype: str,
    milliseconds: Mapping[str, Sequence[float]],
    *,
    saved: float,
    refused: Mapping[str, str],
    clock: str,
) -> LayerRow:
    def over(name: str, base: str) -> Spread:
        pairs = zip(milliseconds[name], milliseconds[base], strict=True)
        return Spread.of([a / b for a, b in pairs])

    medians = {
        name: over(name, "native").median for name in milliseconds if name not in ("ours", "native")
    }
    fastest = min(medians, key=medians.__getitem__, default="")
    return LayerRow(
        layer=layer.name,
        variant=layer.variant,
        shape="x".join(map(str, layer.shape)),
        format=format,
        dtype=dtype,
        clock=clock,
        rounds=len(milliseconds["ours"]),
        ours=Spread.of(milliseconds["ours"]),
        native=Spread.of(milliseconds["native"]),
        ratio=over("ours", "native"),
        peer=fastest,
        to_peer=over("ours", fastest) if fastest else None,
        peers={name: float(f"{ratio:.4g}") for name, ratio in medians.items()},
        refused=refused,
        saved=saved,
        bar=bar(layer.name, layer.options, format),
        kernels=kernels.enabled() and kernels.available(),
    )


class Step:
    """Forward and backward of a layer, for every gradient that training would ask for.

    Output and gradients have the memory format of the input, which the next layer expects: one
    that comes in another is copied here, as the next layer would have to.
    """

    def __init__(self, layer: nn.Module, x: Tensor, format: torch.memory_format) -> None:
        self.layer = layer
        self.x = x
        self.format = format
        self.inputs = [t for t in (x, *layer.parameters()) if t.requires_grad]
        kept: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            y = self._forward()
        self.saved = sum(kept.values()) / y.untyped_storage().nbytes()
        self.dy = torch.randn_like(y)
        torch.autograd.grad(y, self.inputs, self.dy)

    def __call__(self, repeats: int) -> None:
        for _ in range(repeats):
            torch.autograd.grad(self._forward(), self.inputs, self.dy)

    def _forward(self) -> Tensor:
        y: Tensor = self.layer(self.x)
        return y.contiguous(memory_format=self.format)


class BatchNormOfFilters(nn.Module):
    """What a convolution's row is a multiple of: batch norm in training, filters as channels."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))

    def forward(self, _: Tensor) -> Tensor:
        rows = self.weight.reshape(1, len(self.weight), -1)
        return F.batch_norm(rows, None, None, training=True).reshape(self.weight.shape)


def cuda_time() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def _repeats(step: Step, clock: Callable[[], float]) -> int:
    taken = []
    for _ in range(3):
        started = clock()
        step(1)
        taken.append(clock() - started)
    return max(1, round(REPEAT / max(median(taken), 1e-6)))
