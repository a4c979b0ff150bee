"""What a batch norm's conventions cost: a printed walk-through, and checkpoints carried over.

Three parts, each with closed forms beside what the layers do, in float64:

- A walk-through of batch norm on one image of two channels, published with its printed numbers
  (`PRINTED`). They do not follow from one variance: the output needs the biased one, the running
  variance and the printed batch variance the unbiased one.
- A layer trained in one framework's words and read in another's without conversion
  (`normlab.surgery.conventions` converts): for a test batch the largest change of the output.
  With m, v of the layer, gamma, beta its weights and y its output:
  variance: v of n elements biased instead of unbiased: (y - beta) (sqrt((v + eps) / (v (n - 1) / n
  + eps)) - 1). eps: 1e-3 for 1e-5: (y - beta) (sqrt((v + eps) / (v + eps')) - 1). scale: Caffe's
  sums read without division by their factor s: gamma (x - s m) / sqrt(s v + eps) + beta - y.
  momentum: an EMA constant p of the old value's share read as the newest batch's: after one more
  batch of mean b the running mean is (2 p - 1) (b - m) from where it should be.
- A trained network under the same mistakes: its error.

Sources: the talk "Devils in BatchNorm" on implementations; the notes with the walk-through.
"""

from collections.abc import Callable, Iterator

import torch
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
from normlab.surgery.conventions import CONVENTIONS, read, translate, with_eps, write
from normlab.tasks import training
from normlab.tasks.base import Row

KEYS: tuple[str, ...] = ("model", "data", "epochs", "lr", "batch_size")

INPUT = (((0.3367, 0.1288), (0.2345, 0.2303)), ((-1.1229, -0.1863), (2.2082, -0.6380)))
"""(channels, height, width) of the walk-through's one image, as printed; running mean 2 and
variance 1 before it."""

PRINTED: dict[str, tuple[float, ...]] = {
    "var": (0.0072, 2.1872),
    "running_var": (0.9007, 1.1187),
    "output": (1.4150, -1.4102, 0.0257, -0.0305, -0.9276, -0.1964, 1.6731, -0.5491),
}

COUNTS = (2, 32)
"""Elements per channel of a training batch, of the layer that is carried over."""

KERAS, CAFFE = CONVENTIONS["keras"], CONVENTIONS["caffe"]


def run(
    *,
    seed: int,
    device: torch.device,
    model: nn.Module,
    data: Dataset,
    epochs: int,
    lr: float,
    batch_size: int,
    channels: int,
    updates: int,
) -> Iterator[Row]:
    """Yield the numbers of all three parts, the walk-through's and the layer's as epoch 0.

    Args:
        model: a network whose norms are of the batch-norm family.
        channels: of the layer that is carried over.
        updates: of its statistics before it is; so many that nothing of the initial value is left.

    Raises ValueError for a network without such norms, and for counts below 1.
    """
    if channels < 1 or updates < 1:
        raise ValueError(f"task.channels={channels}, task.updates={updates}: each is at least 1")
    if not population_layers(model):
        raise ValueError("task=conventions carries batch norms over; this network has none")
    for quantity, value in (walk() | carried(seed, channels, updates)).items():
        yield Row(0, quantity, value)
    training.fit(model, data, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed, device=device)
    for quantity, value in mistaken(model, data, device=device, batch_size=batch_size).items():
        yield Row(epochs, quantity, value)


def walk() -> dict[str, float]:
    """The walk-through: what torch's two variances are and give, and how far that is from print."""
    x = torch.tensor(INPUT, dtype=torch.float64).unsqueeze(0)
    layer = BatchNorm(2).double()
    layer.running_mean.fill_(2.0)
    with torch.no_grad():
        y = layer(x).flatten()
    biased, unbiased = (x.var((0, 2, 3), correction=c) for c in (0, 1))
    printed = {name: torch.tensor(p, dtype=torch.float64) for name, p in PRINTED.items()}
    by_biased = 0.9 + 0.1 * biased
    centred = x - x.mean((0, 2, 3), keepdim=True)
    by_unbiased = (centred / (unbiased.view(1, 2, 1, 1) + layer.eps).sqrt()).flatten()
    return {
        "walk_biased": float(biased[1]),
        "walk_unbiased": float(unbiased[1]),
        "walk_running": float(layer.running_var[1]),
        "walk_running_biased": float(by_biased[1]),
        "walk_output": float(y[4]),
        "walk_output_unbiased": float(by_unbiased[4]),
        "printed_output": _largest(y - printed["output"]),
        "printed_running": _largest(layer.running_var - printed["running_var"]),
        "printed_var": _largest(unbiased - printed["var"]),
        "misfit_biased": float(printed["running_var"][1] - by_biased[1]),
        "misfit_closed": float(0.1 * biased[1] / 3),  # n / (n - 1) - 1 of four elements
    }


def carried(seed: int, channels: int, updates: int) -> dict[str, float]:
    """A layer carried over without conversion, by the closed form, and converted."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw, dtype=torch.float64)

    spread, offset = normal(channels).exp(), normal(channels)
    test = normal(16, channels) * spread + offset
    found: dict[str, float] = {}
    for count in COUNTS:
        layer = BatchNorm(channels).double()
        gamma, beta = _affine(layer)
        gamma.copy_(normal(channels))
        beta.copy_(normal(channels))
        keras: dict[str, Tensor] = {
            "gamma": gamma, "beta": beta,
            "moving_mean": torch.zeros(channels).double(),
            "moving_variance": torch.ones(channels).double(),
        }  # fmt: skip
        for _ in range(updates):
            batch = normal(count, channels) * spread + offset
            layer(batch)
            for name, value in (
                ("moving_mean", batch.mean(0)),
                ("moving_variance", batch.var(0, correction=0)),
            ):
                keras[name] = layer.decay * keras[name] + (1 - layer.decay) * value
        layer.eval()
        right = layer(test).detach()
        v, eps = layer.running_var, layer.eps
        share = v * (count - 1) / count
        converted = translate(keras, "keras", "torch", eps=eps, momentum=layer.decay, count=count)
        found |= {
            f"variance_{count}": _largest(_with(layer, test, keras["moving_variance"]) - right),
            f"variance_{count}_closed": _largest(
                (right - beta) * (((v + eps) / (share + eps)).sqrt() - 1)
            ),
            f"variance_{count}_converted": _largest(
                _with(layer, test, converted["running_var"]) - right
            ),
        }
    return found | _eps(layer, test) | _scale(layer, test) | _momentum(layer, normal(32, channels))


def _eps(layer: BatchNorm, x: Tensor) -> dict[str, float]:
    right, v = layer(x), layer.running_var
    state = read("torch", layer.state_dict(), eps=layer.eps)
    other = BatchNorm(layer.num_features, eps=KERAS.eps).double().eval()
    other.load_state_dict(layer.state_dict())
    changed = other(x)
    other.load_state_dict(write("torch", with_eps(state, KERAS.eps))[0])
    closed = (right - _affine(layer)[1]) * (((v + layer.eps) / (v + KERAS.eps)).sqrt() - 1)
    return {
        "eps": _largest(changed - right),
        "eps_closed": _largest(closed),
        "eps_converted": _largest(other(x) - right),
    }


def _scale(layer: BatchNorm, x: Tensor) -> dict[str, float]:
    right, m, v = layer(x), layer.running_mean, layer.running_var
    gamma, beta = _affine(layer)
    state = read("torch", layer.state_dict(), momentum=round(1 - CAFFE.momentum, 12))
    blobs, _ = write("caffe", state)
    total = float(blobs["scale_factor"])
    back = translate(blobs, "caffe", "torch")
    changed = _with(layer, x, blobs["variance"], blobs["mean"])
    closed = gamma * (x - total * m) / (total * v + layer.eps).sqrt() + beta
    return {
        "scale": _largest(changed - right),
        "scale_closed": _largest(closed - right),
        "scale_converted": _largest(
            _with(layer, x, back["running_var"], back["running_mean"]) - right
        ),
    }


def _momentum(layer: BatchNorm, batch: Tensor) -> dict[str, float]:
    m, p = layer.running_mean.clone(), KERAS.momentum
    due = p * m + (1 - p) * batch.mean(0)
    keras = {"moving_mean": m, "moving_variance": layer.running_var}
    _, options = write("torch", read("keras", keras, variance="unbiased"))
    read_right = options["momentum"]
    assert read_right is not None
    return {
        "momentum": _largest(_followed(m, batch, p) - due),
        "momentum_closed": (2 * p - 1) * _largest(batch.mean(0) - m),
        "momentum_converted": _largest(_followed(m, batch, read_right) - due),
    }


def _followed(mean: Tensor, batch: Tensor, momentum: float) -> Tensor:
    """The running mean after a batch, with torch's `momentum`."""
    layer = nn.BatchNorm1d(len(mean), momentum=momentum).double()
    assert layer.running_mean is not None
    layer.running_mean.copy_(mean)
    layer(batch)
    return layer.running_mean


@torch.no_grad()
def _with(layer: BatchNorm, x: Tensor, var: Tensor, mean: Tensor | None = None) -> Tensor:
    """The layer's output with other statistics."""
    mean = layer.running_mean if mean is None else mean
    with population.using(layer, {"": population.Statistics(mean, var, 0)}):
        y: Tensor = layer(x)
    return y


def _affine(layer: BatchNorm) -> tuple[Tensor, Tensor]:
    """The layer's gamma and beta, in its memory and without a gradient."""
    assert layer.weight is not None
    assert layer.bias is not None
    return layer.weight.detach(), layer.bias.detach()


def _largest(x: Tensor) -> float:
    return float(x.detach().abs().max())


def mistaken(
    model: nn.Module, data: Dataset, *, device: torch.device, batch_size: int
) -> dict[str, float]:
    """The network's test error in %, as it is and with its statistics carried over wrongly."""
    layers = population_layers(model)
    own = {
        name: population.Statistics(layer.running_mean.clone(), layer.running_var.clone(), 0)
        for name, layer in layers.items()
    }
    batches = list(data.train_batches(batch_size=batch_size, seed=0, epoch=0, device=device))
    counts = _counts(model, layers, batches[0][0])

    def error(change: Callable[[str, population.Statistics], tuple[Tensor, Tensor]]) -> float:
        wrong = {
            name: population.Statistics(*change(name, one), one.count) for name, one in own.items()
        }
        with population.using(model, wrong):
            return training.error(model, data, "test", device=device)

    total = 1 / (1 - CAFFE.momentum)
    there = {name: value.cpu() for name, value in model.state_dict().items()}
    back = translate(translate(there, "torch", "caffe"), "caffe", "torch")
    last = population.estimate(
        model, batches, estimator="cheap", decay=round(1 - 0.9, 12)
    )  # 0.9 of torch, where 0.9 of Keras was meant
    found = {
        "error": error(lambda _, one: (one.mean, one.var)),
        "error_variance": error(
            lambda name, one: (one.mean, one.var * (counts[name] - 1) / counts[name])
        ),
        "error_scale": error(lambda _, one: (one.mean * total, one.var * total)),
        "error_momentum": error(lambda name, _: (last[name].mean, last[name].var)),
        "error_converted": error(
            lambda name, _: (back[f"{name}.running_mean"], back[f"{name}.running_var"])
        ),
    }
    for layer in layers.values():
        layer.eps = KERAS.eps
    return found | {"error_eps": error(lambda _, one: (one.mean, one.var))}


@torch.no_grad()
def _counts(model: nn.Module, layers: dict[str, PopulationNorm], x: Tensor) -> dict[str, int]:
    """Elements per channel that each layer sees of a batch."""
    seen: dict[str, int] = {}

    def watch(name: str) -> Callable[[BatchStatistics], None]:
        return lambda batch: seen.__setitem__(name, batch.count)

    watchers = {name: watch(name) for name in layers}
    for name, layer in layers.items():
        layer.observers.append(watchers[name])
    with normalization(model.eval(), statistics="batch"):
        model(x)
    for name, layer in layers.items():
        layer.observers.remove(watchers[name])
    return seen
