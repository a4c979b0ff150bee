"""Augmented batches in CIFAR's shape: whole batches at a time against one sample at a time."""

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision import transforms

from normlab.bench.images import dataset, pixels
from normlab.bench.measure import Row, rate_row
from normlab.turns import take_turns

BATCH = 128


class PerSample(TorchDataset[tuple[Tensor, int]]):
    """What torchvision's CIFAR10 does with a sample: to a PIL image, through the transforms."""

    def __init__(self, n: int) -> None:
        self.images, labels = pixels(n)
        self.labels = labels.tolist()
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.5,) * 3, (0.29,) * 3),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), self.labels[index]


def row(*, rounds: int, batches: int) -> Row:
    """Crop, mirror and normalize ``batches`` batches of 128 in the main process."""
    torch.set_num_threads(1)
    n = batches * BATCH
    ours = dataset(n)
    loader = DataLoader(PerSample(n), batch_size=BATCH, shuffle=True, drop_last=True)

    def in_memory() -> None:
        for _ in ours.train_batches(
            batch_size=BATCH, seed=0, epoch=0, device="cpu", channels_last=True
        ):
            pass

    def per_sample() -> None:
        for _ in loader:
            pass

    seconds = take_turns({"ours": in_memory, "theirs": per_sample}, rounds)
    return rate_row(
        "augmented batches from memory",
        "DataLoader with torchvision's per-sample transforms",
        seconds["ours"],
        seconds["theirs"],
        unit="img/s",
        amount=n,
        bar=4.0,
    )
