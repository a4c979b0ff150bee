"""A discriminator's statistics, with and without an update on the generator's images.

A discriminator sees real images, and then generated ones, each with their own batch statistics.
Where both move its running statistics, these are of neither kind. With batches of mean r (real) and
f (fake) in turns, the running mean after T pairs is, from 0 on and with decay d,

    d^(2T) 0 + r d (1 - d^(2T)) / (1 + d) + f (1 - d^(2T)) / (1 + d),

between the two and nearer to what came last; the variance is the same mean of the two variances,
and the spread between the kinds is in none of it. With no update on fakes it is the real ones'.

A small DCGAN is trained beside it. Its discriminator trains with batch statistics, so that what
moves its running statistics changes no weight: the layers' own follow the real images alone
(`normalization(discriminator, update=False)` on fakes), and a second running average by the same
rule follows every forward, as a layer does that updates in all of them: of the real images, of the
fakes, and of the fakes once more for the generator's step.

Source: the talk "Devils in BatchNorm", on two distributions in one discriminator.
"""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normlab import population
from normlab.data.base import Dataset
from normlab.norms.base import (
    BatchStatistics,
    PopulationNorm,
    normalization,
    population_layers,
)
from normlab.norms.bn import BatchNorm
from normlab.population import Population, Statistics
from normlab.tasks.base import Row
from normlab.tasks.training import BATCH

KEYS: tuple[str, ...] = ("norm", "data", "batch_size")

Norm = Callable[[int], nn.Module]

LATENT = 16
"""Numbers that the generator makes an image of."""


def run(
    *,
    seed: int,
    device: torch.device,
    norm: Norm,
    data: Dataset,
    batch_size: int,
    steps: int,
    rate: float,
    width: int,
    pairs: int,
) -> Iterator[Row]:
    """Yield the two Gaussians' numbers as epoch 0, the GAN's after the last step.

    Args:
        steps, rate: of both networks, by Adam with betas 0.5 and 0.999.
        width: channels of the discriminator's first layer.
        pairs: of a real and a fake batch, in the part with two Gaussians.

    Of the GAN, with `real` for running statistics of real images and `both` for those of every
    forward: `from_real_<which>` and `from_fake_<which>` are how far their means are from those of
    the population of real or generated images at the end (root mean square over all channels, in
    standard deviations of the real ones); `share_<which>` is where on the way from the one to the
    other they are, 0 at real; `shift_<which>` is how far the scores of real test images are from
    what batch statistics give (mean, in standard deviations of those); `error_<which>` is the share
    of real and generated test images that are taken for the other kind, in %, and `error_batch`
    with batch statistics, each kind in batches of its own.

    Raises ValueError for numbers below 1, for images whose sides 4 does not divide, for a norm that
    keeps no statistics, and for fewer training images than a batch has.
    """
    for key, given in {"steps": steps, "width": width, "pairs": pairs}.items():
        if given < 1:
            raise ValueError(f"task.{key}={given}: it is at least 1")
    if data.shape[1] % 4 or data.shape[2] % 4:
        raise ValueError(f"task=gan_update makes images of sides that 4 divides, not {data.shape}")
    torch.manual_seed(seed)
    critic = discriminator(norm, data.shape, width).to(device)
    if not population_layers(critic):
        raise ValueError("task=gan_update is about running statistics; this norm has none")
    maker = generator(data.shape, width).to(device)
    for quantity, value in gaussians(seed, pairs).items():
        yield Row(0, quantity, value)
    both = followed(critic)
    _play(critic, maker, data, seed=seed, batch_size=batch_size, steps=steps, rate=rate)
    for layer in population_layers(critic).values():
        layer.observers.clear()
    for quantity, value in judged(critic, maker, data, seed, both).items():
        yield Row(steps, quantity, value)


def gaussians(seed: int, pairs: int, decay: float = 0.9) -> dict[str, float]:
    """One layer on batches of two kinds, each exactly with its mean and variance: real ones of 0
    and 1, fakes of 2 and 9."""
    draw = torch.Generator().manual_seed(seed)

    def batch(mean: float, spread: float) -> Tensor:
        x = torch.randn(32, 1, generator=draw, dtype=torch.float64)
        return (x - x.mean()) / x.std() * spread + mean

    layers = {which: BatchNorm(1, decay=decay).double() for which in ("both", "off", "alone")}
    for _ in range(pairs):
        real, fake = batch(0.0, 1.0), batch(2.0, 3.0)
        for which, layer in layers.items():
            layer(real)
            if which == "alone":
                continue
            with normalization(layer, update=False if which == "off" else None):
                layer(fake)
    kept = decay ** (2 * pairs)
    fakes = (1 - kept) / (1 + decay)
    found = {}
    for which, layer in layers.items():
        found[f"mean_{which}"] = float(layer.running_mean)
        found[f"var_{which}"] = float(layer.running_var)
    return found | {
        "mean_closed": 2 * fakes,
        "var_closed": kept + decay * fakes + 9 * fakes,
    }


def discriminator(norm: Norm, shape: tuple[int, int, int], width: int) -> nn.Module:
    """(B, C, H, W) to scores (B,): three convolutions, norms after the second and the third."""
    return nn.Sequential(
        nn.Conv2d(shape[0], width, 4, stride=2, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
        norm(2 * width),
        nn.LeakyReLU(0.2),
        nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False),
        norm(2 * width),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * width * (shape[1] // 4) * (shape[2] // 4), 1),
        nn.Flatten(0),
    )


def generator(shape: tuple[int, int, int], width: int) -> nn.Module:
    """(B, LATENT) to images (B, C, H, W), by two transposed convolutions."""
    height, breadth = shape[1] // 4, shape[2] // 4
    return nn.Sequential(
        nn.Linear(LATENT, 2 * width * height * breadth),
        nn.Unflatten(1, (2 * width, height, breadth)),
        BatchNorm(2 * width),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1, bias=False),
        BatchNorm(width),
        nn.ReLU(),
        nn.ConvTranspose2d(width, shape[0], 4, stride=2, padding=1),
    )


def followed(critic: nn.Module) -> Population:
    """Running statistics that every forward with batch statistics moves from here on, whether the
    layer itself follows it or not, by the layer's own rule."""
    found = {}
    for name, layer in population_layers(critic).items():
        found[name] = Statistics(layer.running_mean.clone(), layer.running_var.clone(), 0)

        def follow(
            batch: BatchStatistics, layer: PopulationNorm = layer, stands: Statistics = found[name]
        ) -> None:
            layer.ema_step(stands.mean, stands.var, batch, layer.decay)

        layer.observers.append(follow)
    return found


def _play(
    critic: nn.Module,
    maker: nn.Module,
    data: Dataset,
    *,
    seed: int,
    batch_size: int,
    steps: int,
    rate: float,
) -> None:
    """Train both, a step of each in turns; the layers of the critic follow the real images."""
    device = next(critic.parameters()).device
    draw = torch.Generator().manual_seed(seed)
    optimizers = [
        torch.optim.Adam(network.parameters(), lr=rate, betas=(0.5, 0.999))
        for network in (critic, maker)
    ]
    real = _endless(data, seed=seed, batch_size=batch_size, device=device)
    for _ in range(steps):
        fake = maker(torch.randn(batch_size, LATENT, generator=draw).to(device))
        on_real = critic(next(real))
        with normalization(critic, update=False):
            on_fake = critic(fake.detach())
        loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
        _step(optimizers[0], loss)
        with normalization(critic, update=False):
            loss = F.softplus(-critic(fake)).mean()
        _step(optimizers[1], loss)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def _endless(
    data: Dataset, *, seed: int, batch_size: int, device: torch.device
) -> Iterator[Tensor]:
    epoch = 0
    while True:
        epoch += 1
        for x, _ in data.train_batches(
            batch_size=batch_size, seed=seed, epoch=epoch, device=device
        ):
            yield x


@torch.no_grad()
def judged(
    critic: nn.Module, maker: nn.Module, data: Dataset, seed: int, both: Population
) -> dict[str, float]:
    """What the two kinds of running statistics are near to, and what they make of test images."""
    device = next(critic.parameters()).device
    draw = torch.Generator().manual_seed(seed + 1)
    real = {
        split: [x for x, _ in data.eval_batches(split, batch_size=BATCH, order=0, device=device)]
        for split in ("train", "test")
    }
    maker.train()
    with normalization(maker, update=False):
        fakes = {
            split: [maker(torch.randn(len(x), LATENT, generator=draw).to(device)) for x in batches]
            for split, batches in real.items()
        }
    of_real = population.estimate(critic, real["train"], estimator="pooled")
    of_fake = population.estimate(critic, fakes["train"], estimator="pooled")
    own = {
        name: Statistics(layer.running_mean.clone(), layer.running_var.clone(), 0)
        for name, layer in population_layers(critic).items()
    }
    critic.eval()
    with normalization(critic, statistics="batch", update=False):
        right = torch.cat([critic(x) for x in real["test"]])
        wrong = torch.cat([critic(x) for x in fakes["test"]])
    found = {"error_batch": _error(right, wrong)}
    spread = right.std().clamp_min(1e-12)
    for which, stands in {"real": own, "both": both}.items():
        with population.using(critic, stands):
            on_real = torch.cat([critic(x) for x in real["test"]])
            on_fake = torch.cat([critic(x) for x in fakes["test"]])
        found |= {
            f"from_real_{which}": _apart(stands, of_real, of_real),
            f"from_fake_{which}": _apart(stands, of_fake, of_real),
            f"share_{which}": _share(stands, of_real, of_fake),
            f"shift_{which}": float((on_real - right).abs().mean() / spread),
            f"error_{which}": _error(on_real, on_fake),
        }
    return found


def _scaled(one: Population, by: Population) -> Tensor:
    """All means, in standard deviations of another population."""
    return torch.cat([
        one[name].mean.double() / by[name].var.double().clamp_min(1e-12).sqrt() for name in by
    ])  # fmt: skip


def _apart(one: Population, other: Population, by: Population) -> float:
    return float((_scaled(one, by) - _scaled(other, by)).square().mean().sqrt())


def _share(one: Population, start: Population, end: Population) -> float:
    """Where on the way from `start` to `end` the means are, projected on it."""
    begin = _scaled(start, start)
    way = _scaled(end, start) - begin
    return float((_scaled(one, start) - begin) @ way / (way @ way))


def _error(on_real: Tensor, on_fake: Tensor) -> float:
    return 100 * float(((on_real <= 0).double().mean() + (on_fake > 0).double().mean()) / 2)
