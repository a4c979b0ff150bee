"""The options by which a command is told of a user's model, and what they stand for."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from normlab.subject.batches import Batches
    from normlab.subject.checkpoint import Checkpoint
    from normlab.subject.scoring import Scoring

__all__ = ["SAMPLES", "Subject", "add_arguments", "from_arguments"]

SAMPLES = 10_000
"""How many samples statistics are estimated on unless told, as in Wu & Johnson (2021)."""


@dataclass(frozen=True)
class Subject:
    """A model with its checkpoint's weights in eval mode, and data for it, all on one device."""

    model: "nn.Module"
    checkpoint: "Checkpoint | None"
    """What `model` holds: the first that was named; None: what the model was made with."""
    others: "list[Checkpoint]" = field(repr=False)
    train: "Batches"
    """Of --data, at most --samples of them."""
    target: "Batches | None"
    """Of --target, at most --samples."""
    test: "Batches | None"
    """Of --test, all of them."""
    scoring: "Scoring"
    device: "torch.device"


def add_arguments(parser: ArgumentParser) -> None:
    """The options that `from_arguments` reads."""
    model = parser.add_argument_group("the model")
    model.add_argument(
        "--model", required=True, metavar="SPEC",
        help="torchvision:NAME, timm:NAME or path/to/file.py:make_model",
    )  # fmt: skip
    model.add_argument(
        "--model-arg", action="append", default=[], metavar="NAME=VALUE",
        help="a keyword argument of its maker, a Python literal: num_classes=10; again for more",
    )  # fmt: skip
    model.add_argument(
        "--checkpoint", nargs="+", default=[], metavar="FILE",
        help="its weights: a file of torch.save (tensors only are loaded) or .safetensors",
    )  # fmt: skip
    model.add_argument(
        "--state-key", metavar="KEY", help="the file's entry with the weights, if it has several"
    )
    model.add_argument(
        "--state-prefix", default="", metavar="PREFIX",
        help="how the model's names begin in the file, if not as in the model: model.",
    )  # fmt: skip
    model.add_argument(
        "--device", metavar="DEVICE", help="cpu, cuda, cuda:1 (default: a GPU if there is one)"
    )
    data = parser.add_argument_group(
        "data", "a folder of images, a .parquet, .npz or .npy file, path/to/file.py:make_batches"
    )
    data.add_argument("--data", metavar="SPEC", help="what the statistics are to be of")
    data.add_argument("--target", metavar="SPEC", help="another domain's")
    data.add_argument("--test", metavar="SPEC", help="what loss and error are measured on")
    data.add_argument(
        "--batch-size", type=int, default=64, metavar="N", help="samples in a batch (default: 64)"
    )
    data.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N",
        help=f"of --data and --target, at most; drawn at random (default: {SAMPLES})",
    )  # fmt: skip
    data.add_argument(
        "--image-size", type=int, metavar="N", help="pixels a side (default: as they are)"
    )
    for name in ("mean", "std"):
        data.add_argument(
            f"--{name}", type=float, nargs="+", metavar="X",
            help="of the channels, where 8-bit values are 0 to 1 (default: ImageNet's, of images)",
        )  # fmt: skip
    data.add_argument(
        "--workers", type=int, default=0, metavar="N", help="threads that decode images ahead"
    )
    data.add_argument(
        "--forward", metavar="FILE.py:F", help="F(model, batch) returns outputs, if not model(x)"
    )
    data.add_argument(
        "--loss", metavar="FILE.py:F",
        help="F(outputs, batch) returns the mean loss, or (mean loss, mean error in 0..1)",
    )  # fmt: skip


def from_arguments(given: Namespace) -> Subject:
    """What the options name; the first checkpoint's weights in the model.

    Raises ValueError in one line for anything that is not there, cannot be read or does not fit.
    """
    from normlab.subject import code
    from normlab.subject.checkpoint import Checkpoint
    from normlab.subject.data import load_batches
    from normlab.subject.model import load_model
    from normlab.subject.scoring import Scoring, check

    if given.data is None:
        raise ValueError("--data says what the statistics are to be of: it is missing")
    device = _device(given.device)
    options = dict(_pair(text) for text in given.model_arg)
    checkpoints = [
        Checkpoint.read(path, key=given.state_key, prefix=given.state_prefix)
        for path in given.checkpoint
    ]
    scoring = Scoring(
        forward=code.named(given.forward) if given.forward else None,
        loss=code.named(given.loss) if given.loss else None,
    )

    def batches(spec: str | None, samples: int | None) -> "Batches | None":
        if spec is None:
            return None
        return load_batches(
            spec, batch_size=given.batch_size, samples=samples, size=given.image_size,
            mean=given.mean, std=given.std, workers=given.workers,
        ).on(device)  # fmt: skip

    train, target = batches(given.data, given.samples), batches(given.target, given.samples)
    test = batches(given.test, None)
    assert train is not None
    model = load_model(given.model, options)
    if checkpoints:
        checkpoints[0].load_into(model)
    first = checkpoints[0] if checkpoints else None
    model = model.to(device).eval()
    for one in (train, target, test):
        if one is not None:
            check(model, one, scoring)
    return Subject(model, first, checkpoints[1:], train, target, test, scoring, device)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ValueError(f"--model-arg is NAME=VALUE, as in num_classes=10, not '{text}'")
    return name, value


def _device(name: str | None) -> "torch.device":
    import os

    import torch

    local = os.environ.get("LOCAL_RANK", "0")  # of torchrun: each rank has a GPU of its own
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(f"cuda:{local}" if name == "cuda" else name)
    except RuntimeError:
        raise ValueError(f"--device is cpu, cuda or cuda:N, not '{name}'") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device is cpu, cuda or cuda:N, not '{name}': statistics are float64")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no GPU that torch can use")
    return device
