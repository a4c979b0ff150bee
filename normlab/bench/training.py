"""Training throughput on ResNet-20: the trainer, the shortest loop one would write, the defaults.

All three see the same augmented batches of 128. ``bare`` has the trainer's settings (channels_last,
freed memory kept) with torch's own BatchNorm2d; ``stock`` is what one gets without asking: NCHW and
the allocator untouched. The allocator is set once per process, so each has a process of its own.
"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from normlab import allocator, batchplan, dist, norms
from normlab.bench.images import CLASSES, SHAPE, dataset
from normlab.bench.measure import Process, Row, rate_row, serve
from normlab.checkpoint import Stop
from normlab.models.base import NormConstructor
from normlab.models.cifar_resnet import build
from normlab.train import Settings, Trainer
from normlab.turns import Measured

BATCH = 128
LR = 0.1


def rows(*, rounds: int, steps: int) -> list[Row]:
    """Against the bare loop and against the stock one; ``steps`` optimizer steps in each round."""
    seconds: Measured = {"ours": [], "bare": [], "stock": []}
    code = "from normlab.bench import training; training.contestant({!r}, {})"
    with (
        Process(code.format("ours", steps)) as ours,
        Process(code.format("bare", steps)) as bare,
        Process(code.format("stock", steps)) as stock,
    ):
        processes = {"ours": ours, "bare": bare, "stock": stock}
        for number in range(rounds + 1):
            order = list(processes) if number % 2 else list(reversed(processes))
            for name in order:
                taken = processes[name]()
                if number:  # the first round warms up
                    seconds[name].append(taken)
    amount = steps * BATCH
    return [
        rate_row(
            "training, ResNet-20, float32",
            peer,
            seconds["ours"],
            seconds[other],
            unit="img/s",
            amount=amount,
            bar=bar,
        )
        for peer, other, bar in (
            ("a bare PyTorch loop with the same settings", "bare", 0.97),
            ("torch's defaults: NCHW, allocator untouched", "stock", 1.35),
        )
    ]


def contestant(name: str, steps: int) -> None:
    """Serve one of the three in this process."""
    torch.set_num_threads(1)
    if name != "stock":
        allocator.keep_freed_memory()
    if name == "ours":
        with tempfile.TemporaryDirectory() as directory:
            serve(trainer(steps, Path(directory)).train_epoch)
    else:
        serve(_bare_loop(steps, channels_last=name == "bare"))


def _model(norm: NormConstructor, *, channels_last: bool) -> nn.Module:
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return build(norm, num_classes=CLASSES, shape=SHAPE, depth=20).to(memory_format=layout)


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9, weight_decay=5e-4)


def trainer(steps: int, directory: Path, norm: str = "bn") -> Trainer:
    """A run of that many steps an epoch, on as many ranks as this process is one of."""
    layer: Any = norms.find(norm)
    model = _model(layer, channels_last=True)
    return Trainer(
        model=model,
        optimizer=_sgd(model),
        data=dataset(steps * BATCH),
        plan=batchplan.plan(BATCH, None, world_size=dist.place()[1], batch=layer.batch, norm=norm),
        steps=steps,
        settings=Settings(
            epochs=10_000,
            lr=LR,
            seed=0,
            device=torch.device("cpu"),
            schedule={"schedule": "constant", "warmup": 0.0},
            channels_last=True,
        ),
        path=directory / "checkpoint.pt",
        stop=Stop(),
    )


def _bare_loop(steps: int, *, channels_last: bool) -> Callable[[], None]:
    model = _model(nn.BatchNorm2d, channels_last=channels_last)
    optimizer = _sgd(model)
    data = dataset(steps * BATCH)

    def epoch() -> None:
        model.train()
        batches = data.train_batches(
            batch_size=BATCH, seed=0, epoch=0, device="cpu", channels_last=channels_last
        )
        for x, y in batches:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

    return epoch
