"""Objects from a config, by name: the only reader of the config besides identity.

A group's ``module`` (default: its ``name``) is looked up in its room, its other keys are keyword
arguments of what is found there (``normlab.signatures``). Everything that can be wrong is refused
here, before a run writes anything.
"""

import inspect
import json
import typing
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache, partial
from typing import Any

import torch
from torch import nn
from torch.distributed import ProcessGroup

import normlab.data
import normlab.models
import normlab.norms
import normlab.norms.conv.base
import normlab.probes
import normlab.tasks
from normlab import batchplan, dist, schedule, signatures, weights
from normlab.config import plan_of
from normlab.data.base import Dataset
from normlab.domains import Domain
from normlab.norms import BatchNorm
from normlab.norms.base import PopulationNorm, population_layers
from normlab.norms.separate import in_turn
from normlab.norms.sync import name_layers
from normlab.orders import Order
from normlab.probes.base import Context
from normlab.tasks.base import Row
from normlab.train import Settings

Norm = Callable[..., nn.Module]

PLAIN = "plain"
"""The convolutions that a network has by itself."""

GRAPHS = "graphs"
"""Of the key compile: the compiled network is recorded once and replayed, without launches."""

TENTH = 0.1
"""Of the learning rate, for scalar biases and factors (Fixup, in its authors' code)."""


def device(config: dict[str, Any]) -> torch.device:
    """``auto`` takes a GPU if there is one. Raises ValueError for a device that is not there."""
    wanted = config["device"]
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: this machine has no usable GPU (device=auto or device=cpu)")
    return torch.device(wanted)


def plan(config: dict[str, Any]) -> batchplan.BatchPlan:
    """The batch plan. Raises ``batchplan.PlanError`` when the numbers do not fit."""
    return plan_of(config)


def data(config: dict[str, Any]) -> Dataset:
    """The data set; runs of one process that read the same data share it."""
    return _load(config["data_root"], config["seed"], json.dumps(config["data"], sort_keys=True))


def steps(config: dict[str, Any], dataset: Dataset) -> tuple[int, int]:
    """(SGD steps, training samples left out) of an epoch; none where nothing is trained. Raises
    ValueError for too few samples, labels that do not allow the order, and a remainder that is to
    be an error."""
    if config["epochs"] == 0:
        return 0, 0
    size, order, step = dataset.size("train"), Order.parse(config["order"]), plan(config)
    if not order.patterned:
        left = size % len(config["domains"])  # images that make no domain's share larger
        per_epoch, dropped = batchplan.steps(size - left, step, config["remainder"])
        return per_epoch, dropped + left
    used = dataset.train_size(order)
    per_epoch = used // step.batch_size
    dropped = size - per_epoch * step.batch_size
    if per_epoch == 0:
        raise ValueError(
            f"batch_size={step.batch_size} is more than the {used} of {size} training samples that"
            f" order={order} can use, which leaves no step"
        )
    if dropped and config["remainder"] == "error":
        raise ValueError(
            f"order={order} with batch_size={step.batch_size} leaves {dropped} of {size} training"
            " samples over (remainder=error)"
        )
    return per_epoch, dropped


@lru_cache(maxsize=1)
def _load(root: str, seed: int, group: str) -> Dataset:
    options = json.loads(group)
    load = normlab.data.find(signatures.module(options))
    given = signatures.options("data", options, load, {"root", "seed"})
    dataset: Dataset = load(root, seed=seed, **given)
    return dataset


def norm(config: dict[str, Any], dataset: Dataset | None = None) -> Norm:
    """The constructor that a model calls with a number of channels.

    What a layer's signature asks of the run is filled in: ``nbs``, ``decay``, ``forwards``, the
    training's forward passes on this data set (without one the layer's own default stays), and, for
    a virtual batch, the plan's ``extra`` images (it has no ``reference`` batch to offer).
    Raises ValueError if the config says otherwise than the layer how its batch is formed: the batch
    plan, and with it the recorded NBS, would be another layer's.
    """
    layer = normlab.norms.find(signatures.module(config["norm"]))
    batch = getattr(layer, "batch", "none")
    if config["norm"]["batch"] != batch:
        raise ValueError(
            f"norm.batch={config['norm']['batch']}: norm={config['norm']['name']} is a "
            f"{layer.__name__}, whose batch is formed as {batch} (norm.batch={batch})"
        )
    given: dict[str, Any] = {"nbs": plan(config).nbs, "decay": config["decay"]}
    if batch == "sync":
        given["group"] = _group(plan(config))
    if batch == "virtual":
        given["extra"] = plan(config).virtual_extra
    parameters = signatures.parameters(layer)
    taken = {key: value for key, value in given.items() if key in parameters}
    if "forwards" in parameters and dataset is not None:
        taken["forwards"] = _forwards(config, dataset)
    reserved = {"num_features", "shape", "forwards", "group", *given}
    if batch == "virtual":
        reserved.add("reference")
    options = signatures.options("norm", config["norm"], layer, reserved)
    return partial(layer, **options, **taken)


def _group(formed: batchplan.BatchPlan) -> ProcessGroup | None:
    """The ranks that share this one's statistics; None: all, or a process that is no rank yet.

    Raises ValueError where there are other ranks than planned.
    """
    _, ranks = dist.place()
    if ranks == 1:
        return None
    if ranks != formed.world_size:
        raise ValueError(f"world_size={formed.world_size}: there are {ranks} ranks")
    return dist.subgroup(formed.sync_group)


def _keep_apart(network: nn.Module, pattern: str, layers: Norm) -> None:
    """Put batch norms of one rank in the place of the synchronized layers that `pattern`, a glob of
    names or, after "!", of the names of the others, does not mean. Raises ValueError where it
    means none or all of them."""
    glob, reverse = pattern.removeprefix("!"), pattern.startswith("!")
    found = population_layers(network)
    meant = [name for name in found if fnmatchcase(name, glob) != reverse]
    if not meant or len(meant) == len(found):
        which = "none" if not meant else "every one"
        raise ValueError(
            f"sync_layers={pattern} means {which} of the layers {', '.join(found)}"
            + (": leave it out" if meant else "")
        )
    assert isinstance(layers, partial)
    options = {key: value for key, value in layers.keywords.items() if key != "group"}
    for name in found.keys() - set(meant):
        layer = found[name]
        own = BatchNorm(layer.num_features, **options)
        own.load_state_dict(layer.state_dict())  # a gamma may start at zero
        network.set_submodule(name, own)


def _forwards(config: dict[str, Any], dataset: Dataset) -> int:
    """How often each rank of the run calls its model in training."""
    per_epoch, _ = steps(config, dataset)
    return int(config["epochs"]) * per_epoch * plan(config).accumulation


def model(config: dict[str, Any], dataset: Dataset) -> nn.Module:
    """The network, on the run's device and layout, its weights drawn with the run's seed or, with
    ``init_from``, those of the file."""
    network = normlab.models.find(signatures.module(config["model"]))
    reserved = {"norm", "num_classes", "shape", "init"}
    options = signatures.options("model", config["model"], network, reserved)
    if config["init"] != "default":
        _check_init(config, network)
        options["init"] = config["init"]
    network = partial(network, num_classes=dataset.num_classes, shape=dataset.shape, **options)
    layers = norm(config, dataset)
    if "shape" in signatures.parameters(normlab.norms.find(signatures.module(config["norm"]))):
        layers = _shaped(layers, network, dataset)
    # fp32 means float32: a GPU would round what it multiplies to TF32, in convolutions by default.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    torch.manual_seed(config["seed"])
    built: nn.Module = network(layers)
    if config["sync_layers"] is not None:
        _keep_apart(built, config["sync_layers"], layers)
    if config["conv"]["name"] != PLAIN:
        kind = normlab.norms.conv.find(config["conv"]["name"])
        taken = inspect.signature(nn.Conv2d).parameters
        options = signatures.options("conv", config["conv"], kind, taken)
        built = normlab.norms.conv.base.replace(built, kind, **options)
    name_layers(built, debug=config["debug_sync"])
    if config["init_from"] is not None:
        weights.load(built, config["init_from"], config["weights"])
    layout = torch.channels_last if config["channels_last"] else torch.contiguous_format
    return built.to(device(config)).to(memory_format=layout)


def check_graphs(config: dict[str, Any]) -> None:
    """Refuse CUDA graphs where there is no GPU to replay them, and where a step accumulates: its
    second forward pass would write over the gradients of the first."""
    if config["compile"] != GRAPHS:
        return
    if (kind := device(config).type) != "cuda":
        raise ValueError(f"compile={GRAPHS} needs a GPU, and device={kind}: compile=true or false")
    if (accumulation := plan(config).accumulation) > 1:
        raise ValueError(
            f"compile={GRAPHS} needs one forward pass per rank and step, and this plan has"
            f" accumulation={accumulation}: compile=true or false, or another way to form the batch"
        )


def check_gpus(config: dict[str, Any]) -> None:
    """Refuse more ranks on this machine than it has GPUs."""
    size = config["world_size"]
    here = config["launch"] and device(config).type == "cuda"
    if here and 1 < size > (count := torch.cuda.device_count()):
        raise ValueError(
            f"world_size={size}: each rank needs a GPU of its own, and this machine has {count}"
            f" (launch=false prepares a run for several machines; world_size={count}; device=cpu)"
        )


def compiled(config: dict[str, Any], network: nn.Module) -> nn.Module | None:
    """What training calls in the place of `network`, on the same weights; None: the network."""
    if not config["compile"]:
        return in_turn(network, len(config["domains"]))
    mode = "reduce-overhead" if config["compile"] == GRAPHS else None
    return typing.cast(nn.Module, torch.compile(network, mode=mode))


def domains(config: dict[str, Any]) -> tuple[Domain, ...]:
    """How the images of training look, in turn."""
    return tuple(map(Domain.parse, config["domains"]))


def _check_init(config: dict[str, Any], network: Callable[..., nn.Module]) -> None:
    """Refuse an initialization that the network, the norm or the convolutions do not go with."""
    init = config["init"]
    if "init" not in signatures.parameters(network):
        able = [
            name for name in normlab.models.names()
            if "init" in signatures.parameters(normlab.models.find(name))
        ]  # fmt: skip
        raise ValueError(
            f"init={init}: model={config['model']['name']} has no such initialization "
            f"(models of the module {', '.join(able)} have)"
        )
    if signatures.module(config["norm"]) != "none":
        raise ValueError(
            f"init={init} is in the place of a norm: it needs norm=none, "
            f"not norm={config['norm']['name']}"
        )
    if config["conv"]["name"] != PLAIN:
        raise ValueError(
            f"init={init} starts filters at zero, which no filter with conv="
            f"{config['conv']['name']} can be: it needs conv={PLAIN}"
        )


class _Recorder(nn.Module):
    """In the place of a norm, notes the sizes after the channels of what it is given."""

    def __init__(self, _: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(()))  # a network may ask for a gamma
        self.shape: list[int] | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.shape = list(x.shape[2:])
        return x


def _shaped(layer: Norm, network: Callable[[Norm], nn.Module], dataset: Dataset) -> Norm:
    """`layer` with its ``shape``, for norms with a parameter per element.

    A network asks for a norm by channels alone, always in the same order: it is built once without
    memory, an image without values shows the shapes, and the n-th norm gets the n-th.
    """
    recorders: list[_Recorder] = []

    def record(channels: int) -> nn.Module:
        recorders.append(_Recorder(channels))
        return recorders[-1]

    with torch.device("meta"), torch.no_grad():
        network(record).eval()(torch.empty((1, *dataset.shape)))
    shapes = (recorder.shape for recorder in recorders)
    return lambda channels: layer(channels, shape=next(shapes))


def optimizer(config: dict[str, Any], network: nn.Module) -> torch.optim.Optimizer:
    """SGD with two groups of parameters: with weight decay, and without.

    Parameters of normalization layers, lengths of normalized filters and Fixup's factors decay if
    ``recipe.decay_norm``, biases of the other layers if ``recipe.decay_bias``, everything else
    always. With init=fixup, biases and factors form two more groups, whose ``lr_factor`` the
    training loop multiplies the learning rate with.
    """
    recipe = config["recipe"]
    layer = normlab.norms.find(signatures.module(config["norm"]))
    kinds = (layer, PopulationNorm)  # of norm=sync, some layers may be each rank's own batch norm
    norms = {id(p) for m in network.modules() if isinstance(m, kinds) for p in m.parameters()}
    slow = ("bias", "scale") if config["init"] == "fixup" else ()
    gains = ("scale",) if slow else ("weight_g",) if config["conv"]["name"] != PLAIN else ()
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {(False, True): [], (False, False): []}
    for name, parameter in network.named_parameters():
        if id(parameter) in norms or name.endswith(gains):
            decays = recipe["decay_norm"]
        else:
            decays = recipe["decay_bias"] or not name.endswith("bias")
        groups.setdefault((name.endswith(slow), decays), []).append(parameter)
    return torch.optim.SGD(
        [
            {"params": parameters, "weight_decay": recipe["weight_decay"] if decays else 0.0}
            | ({"lr_factor": TENTH} if slowly else {})
            for (slowly, decays), parameters in groups.items()
        ],
        lr=config["lr"],
        momentum=recipe["momentum"],
        nesterov=recipe["nesterov"],
    )


def settings(config: dict[str, Any]) -> Settings:
    """What the training loop needs to know."""
    recipe = config["recipe"]
    lr = schedule.scaled(config["lr"], batch_size=config["batch_size"], lr_batch=recipe["lr_batch"])
    return Settings(
        epochs=config["epochs"],
        lr=lr,
        seed=config["seed"],
        device=device(config),
        order=Order.parse(config["order"]),
        domains=domains(config),
        schedule={key: recipe[key] for key in ("schedule", "warmup", "milestones", "gamma")},
        precision=config["precision"],
        channels_last=config["channels_last"],
        label_smoothing=recipe["label_smoothing"],
        clip_norm=recipe["clip_norm"],
        checkpoint_every=config["checkpoint_every"],
        buffers=config["buffers"],
    )


Measure = Callable[[Context], dict[str, float]]


def probe(name: str) -> Measure:
    """The function that measures it. Raises ValueError naming the probes there are."""
    return normlab.probes.find(name)


def check_probes(config: dict[str, Any], context: Context) -> None:
    """Refuse, as its own `check` says, a probe that this network or these data are not made for."""
    for name in config["probes"]:
        check = normlab.probes.beside(name, "check", lambda _: None)
        try:
            check(context)
        except ValueError as error:
            raise ValueError(f"probes: {name}: {error}") from None


def task(config: dict[str, Any], dataset: Dataset | None) -> Callable[[], Iterator[Row]]:
    """The task of a config with all that it asks for; it does nothing before it is iterated.

    Raises ValueError for an unknown task or option, and for what its objects refuse.
    """
    name = signatures.module(config["task"])
    run = normlab.tasks.find(name)
    given: dict[str, Any] = {"seed": config["seed"], "device": device(config)}
    for key in normlab.tasks.keys(name):
        if key == "norm":
            given[key] = norm(config)
        elif key == "data":
            given[key] = dataset
        elif key == "model":
            assert dataset is not None, "what a model needs, a task needs"
            given[key] = model(config, dataset)
        else:
            given[key] = config[key]
    return partial(run, **given, **signatures.options("task", config["task"], run, given))


def data_of(config: dict[str, Any]) -> Dataset | None:
    """The data set, or None for a task that needs none."""
    return data(config) if "data" in normlab.tasks.needs(config["task"]) else None
