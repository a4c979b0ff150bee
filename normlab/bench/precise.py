"""Precise population statistics of a ResNet-20 against fvcore's ``update_bn_stats``."""

import warnings

import torch
from torch import Tensor, nn

from normlab import norms
from normlab.bench.images import CLASSES, SHAPE, dataset
from normlab.bench.measure import Row, rate_row
from normlab.models.cifar_resnet import build
from normlab.population import estimate
from normlab.turns import take_turns

BATCH = 100


def row(*, rounds: int, images: int, channels_last: bool) -> Row:
    """Estimate over ``images`` images in batches of 100, both in the same layout.

    Raises ImportError where fvcore is not installed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn.precise_bn import update_bn_stats

    torch.set_num_threads(1)
    data = dataset(images)
    batches: list[tuple[Tensor, Tensor]] = list(
        data.eval_batches("train", batch_size=BATCH, order=None, channels_last=channels_last)
    )
    inputs = [x for x, _ in batches]
    torch.manual_seed(0)
    ours = build(norms.find("bn"), num_classes=CLASSES, shape=SHAPE, depth=20)
    theirs = build(nn.BatchNorm2d, num_classes=CLASSES, shape=SHAPE, depth=20)
    theirs.load_state_dict(ours.state_dict())
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for model in (ours, theirs):
        model.to(memory_format=layout)
    theirs.train()
    seconds = take_turns(
        {
            "ours": lambda: estimate(ours, batches, estimator="pooled"),
            "theirs": lambda: update_bn_stats(theirs, inputs, len(inputs)),
        },
        rounds,
    )
    return rate_row(
        f"precise statistics of ResNet-20 over {images} images, "
        f"{'channels_last' if channels_last else 'NCHW'}",
        "fvcore's update_bn_stats, the same model and layout",
        seconds["ours"],
        seconds["theirs"],
        unit="img/s",
        amount=images,
        bar=1.0,
    )
