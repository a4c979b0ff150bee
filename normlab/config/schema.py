"""The keys of a run, their types, and the ranges of their values.

``conf/config.yaml`` gives every key its default and says what it means; the types here are what
makes Hydra refuse a misspelt key or a word where a number belongs.
"""

import difflib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from normlab import batchplan, probes, tasks, trackers
from normlab.domains import Domain
from normlab.orders import Order
from normlab.protocols import Protocol


class ConfigError(ValueError):
    """A config that cannot be run: one line that says what is wrong and what is allowed."""


@dataclass
class Recipe:
    """Optimizer and learning-rate schedule (group ``recipe``)."""

    name: str = MISSING
    momentum: float = MISSING
    nesterov: bool = MISSING
    weight_decay: float = MISSING
    decay_norm: bool = MISSING
    decay_bias: bool = MISSING
    schedule: str = MISSING
    warmup: float = MISSING
    milestones: list[float] = MISSING
    gamma: float = MISSING
    lr_batch: int | None = MISSING
    label_smoothing: float = MISSING
    clip_norm: float | None = MISSING


@dataclass
class Config:
    """Every key of a run; ``norm``, ``conv``, ``model``, ``data``, ``task`` have those of their
    files."""

    norm: Any = MISSING
    conv: Any = MISSING
    model: Any = MISSING
    data: Any = MISSING
    task: Any = MISSING
    recipe: Recipe = field(default_factory=Recipe)
    nbs: int | None = MISSING
    batch_size: int = MISSING
    micro_batch: int | None = MISSING
    sync_group_size: int | None = MISSING
    sync_layers: str | None = MISSING
    remainder: str = MISSING
    order: str = MISSING
    domains: list[str] = MISSING
    epochs: int = MISSING
    lr: float = MISSING
    decay: float = MISSING
    freeze_after: int | None = MISSING
    freeze_statistics: str = MISSING
    freeze_affine: str = MISSING
    init: str = MISSING
    init_from: str | None = MISSING
    weights: str | None = MISSING
    seed: int = MISSING
    precision: str = MISSING
    world_size: int = MISSING
    buffers: str = MISSING
    debug_sync: bool = MISSING
    evals: list[str] = MISSING
    eval_last: int = MISSING
    eval_at: list[int] = MISSING
    probes: list[str] = MISSING
    tracker: Any = MISSING
    ema_bank: list[float] = MISSING
    channels_last: bool = MISSING
    compile: bool | str = MISSING
    device: str = MISSING
    threads: int | None = MISSING
    kernels: bool = MISSING
    allocator: str = MISSING
    checkpoint_every: float = MISSING
    keep_after: int | None = MISSING
    launch: bool = MISSING
    max_restarts: int = MISSING
    stall_timeout: float = MISSING
    resume: str | None = MISSING
    runs: str = MISSING
    data_root: str = MISSING
    skip_done: str = MISSING
    scale: str | None = MISSING
    experiment: str | None = MISSING


BUFFERS = ("average", "mean", "broadcast")
"""What becomes of the ranks' population statistics at the end of an epoch, see
`normlab.dist.average_statistics`."""

_CHOICES = {
    "init": ("default", "fixup"),
    "remainder": ("drop", "error"),
    "precision": ("fp32", "bf16"),
    "buffers": BUFFERS,
    "freeze_statistics": ("precise", "ema"),
    "freeze_affine": ("trainable", "frozen"),
    "device": ("auto", "cpu", "cuda"),
    "allocator": ("keep", "system"),
    "skip_done": ("all", "local"),
    "recipe.schedule": ("cosine", "step", "constant"),
}

_SIZES = {  # at least so many, at most batchplan.MOST
    "batch_size": 1,
    "epochs": 0,
    "seed": 0,
    "world_size": 1,
    "eval_last": 1,
    "freeze_after": 1,
    "keep_after": 1,
    "threads": 1,
    "max_restarts": 0,
    "micro_batch": 1,
    "sync_group_size": 1,
    "recipe.lr_batch": 1,
}

# Half-open ranges: (lowest allowed, first not allowed).
_WITHIN = {
    "decay": (0.0, 1.0),
    "ema_bank": (0.0, 1.0),
    "checkpoint_every": (0.0, math.inf),
    "stall_timeout": (1.0, 1e6),
    "recipe.momentum": (0.0, 1.0),
    "recipe.weight_decay": (0.0, math.inf),
    "recipe.warmup": (0.0, 1.0),
    "recipe.milestones": (0.0, 1.0),
    "recipe.label_smoothing": (0.0, 1.0),
}

_POSITIVE = ("lr", "recipe.gamma", "recipe.clip_norm")


def check(config: dict[str, Any]) -> None:
    """Refuse values that have the right type and make no sense, with ConfigError naming the key.

    Whether the norm, model and data set take their options is for ``normlab.build`` to see.
    """
    for group in ("norm", "conv", "model", "data", "task"):
        _check_named(config, group)
        for key, value in _numbers(group, config[group]):
            if isinstance(value, int) and abs(value) > batchplan.MOST:
                raise ConfigError(f"{key} must be at most {batchplan.MOST}, got {key}={value}")
            if not math.isfinite(value):
                raise ConfigError(f"{key} must be a finite number, got {key}={value}")
    if not config["runs"].strip():
        raise ConfigError(f"runs must be the path of a directory, got runs='{config['runs']}'")
    for key, choices in _CHOICES.items():
        if (value := _at(config, key)) not in choices:
            raise ConfigError(f"{key} must be one of {', '.join(choices)}, got {key}={value}")
    if config["compile"] not in (False, True, "graphs"):
        raise ConfigError(
            "compile must be true or false, or graphs (the compiler with CUDA graphs, on a GPU),"
            f" got compile={config['compile']}"
        )
    for key, least in _SIZES.items():
        if (value := _at(config, key)) is not None and not least <= value <= batchplan.MOST:
            raise ConfigError(
                f"{key} must be at least {least} and at most {batchplan.MOST}, got {key}={value}"
            )
    for key, (low, high) in _WITHIN.items():
        for value in _values(config, key):
            if not low <= value < high:
                below = "finite" if high == math.inf else f"below {high:g}"
                raise ConfigError(f"{key} must be at least {low:g} and {below}, got {key}={value}")
    for key in _POSITIVE:
        for value in _values(config, key):
            if not 0 < value < math.inf:
                raise ConfigError(f"{key} must be a finite number above 0, got {key}={value}")
    recipe = config["recipe"]
    if recipe["nesterov"] and not recipe["momentum"]:
        raise ConfigError(
            "recipe.nesterov=true needs recipe.momentum above 0, got recipe.momentum=0"
        )
    if recipe["milestones"] != sorted(recipe["milestones"]):
        raise ConfigError(f"recipe.milestones must ascend, got {recipe['milestones']}")
    if not config["epochs"] and config["init_from"] is None:
        raise ConfigError(
            "epochs=0 trains nothing: init_from=<file> names the weights that are to be measured"
        )
    if config["weights"] is not None and config["init_from"] is None:
        raise ConfigError(f"weights={config['weights']} says which init_from=<file> has to hold")
    if config["eval_last"] > max(1, config["epochs"]):
        raise ConfigError(
            f"eval_last must be at most epochs={config['epochs']},"
            f" got eval_last={config['eval_last']}"
        )
    for epoch in config["eval_at"]:
        if not 0 <= epoch <= config["epochs"]:
            raise ConfigError(
                f"eval_at: an epoch from 0 (before training) to epochs={config['epochs']},"
                f" got eval_at={config['eval_at']}"
            )
    _check_evals(config)
    _check_probes(config)
    if "norm" not in tasks.needs(config["task"]):
        return  # no batch is formed
    try:
        plan = plan_of(config)
    except batchplan.PlanError as error:
        raise ConfigError(str(error)) from None
    if config["sync_layers"] is not None and plan.batch != "sync":
        raise ConfigError(
            f"sync_layers={config['sync_layers']} says which layers of norm=sync are synchronized:"
            f" leave it out with norm={config['norm']['name']}"
        )
    _check_order(config["order"], plan)
    _check_domains(config, plan)
    _check_freeze(config, plan)


def _check_domains(config: dict[str, Any], plan: batchplan.BatchPlan) -> None:
    """Refuse domains that are none, and batches that would not hold equal parts of several."""
    given = config["domains"]
    listed = f"domains=[{','.join(given)}]"
    try:
        parsed = [Domain.parse(spec) for spec in given]
    except ValueError as error:
        raise ConfigError(f"{listed}: {error}") from None
    if not parsed or len(set(parsed)) < len(parsed):
        raise ConfigError(f"{listed} must name at least one domain, and none twice")
    several = len(parsed)
    if (told := config["norm"].get("num_domains", 1)) not in (1, several):
        raise ConfigError(
            f"norm.num_domains={told}, and the run has {listed}: norm.num_domains={several}"
            + ", or 1 to share everything" * (several > 1)
        )
    if told != 1 and config["compile"]:
        raise ConfigError(f"norm.num_domains={told} goes with compile=false alone")
    if several == 1:
        return
    if config["order"] != "shuffled":
        raise ConfigError(f"{listed}: several domains go with order=shuffled alone")
    if plan.batch == "virtual" or config["norm"].get("grouping") == "interleaved":
        raise ConfigError(f"{listed}: several domains need normalization batches of neighbours")
    for key, size in (("micro_batch", plan.micro_batch), ("nbs", plan.nbs)):
        if size is not None and size % several:
            raise ConfigError(f"{listed}: {key}={size} is no multiple of {several} domains")


def _check_order(spec: str, plan: batchplan.BatchPlan) -> None:
    """Refuse a pattern that a rank's batch or a normalization batch would cut in pieces."""
    try:
        order = Order.parse(spec)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    whole = f"order={order}: groups of {order.group} samples must fill"
    if (plan.batch_size // plan.world_size) % order.group:
        ranks = f" over world_size={plan.world_size}" if plan.world_size > 1 else ""
        raise ConfigError(
            f"{whole} batch_size={plan.batch_size}{ranks}: a multiple of"
            f" {order.group * plan.world_size}"
        )
    if plan.nbs is not None and (plan.nbs - plan.virtual_extra) % order.group:
        extra = f" less virtual_extra={plan.virtual_extra}" if plan.virtual_extra else ""
        raise ConfigError(f"{whole} nbs={plan.nbs}{extra}: a multiple of {order.group}")


def _check_freeze(config: dict[str, Any], plan: batchplan.BatchPlan) -> None:
    """Refuse to freeze what has no statistics, and at an epoch after which no training is left."""
    for key in ("freeze_after", "keep_after"):
        if config[key] is not None and config[key] >= config["epochs"]:
            raise ConfigError(
                f"{key} must be below epochs={config['epochs']}, got {key}={config[key]}"
            )
    if config["freeze_after"] is not None and plan.nbs is None:
        raise ConfigError(
            f"freeze_after={config['freeze_after']} makes population statistics constant, and"
            f" norm={config['norm']['name']} has none that batches move: leave it out"
        )


def _check_evals(config: dict[str, Any]) -> None:
    for spec in config["evals"]:
        try:
            protocol = Protocol.parse(spec)
        except ValueError as error:
            raise ConfigError(str(error)) from None
        if protocol.decay is not None and protocol.decay not in config["ema_bank"]:
            raise ConfigError(
                f"evals: '{spec}' reads an EMA that is not tracked: ema_bank=[{protocol.decay:g}]"
            )


def _check_probes(config: dict[str, Any]) -> None:
    _check_names("probes", config["probes"], "probe", probes.names())
    tracker = config["tracker"]
    if not (tracker is None or isinstance(tracker, str | list)):
        raise ConfigError(f"tracker must be null, a name or a list of names, got tracker={tracker}")
    _check_names("tracker", trackers.asked(config), "tracker", trackers.names())
    _check_task(config)


def _check_names(key: str, given: list[str], kind: str, known: list[str]) -> None:
    """Refuse a name that nothing has, and one that is given twice."""
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            meant = f"; did you mean '{close[0]}'?" if close else ""
            raise ConfigError(f"{key}: no {kind} '{name}'{meant} ({kind}s: {', '.join(known)})")
    if len(set(given)) < len(given):
        raise ConfigError(f"{key}: one of them is named twice: {given}")


def _check_task(config: dict[str, Any]) -> None:
    name = config["task"]["name"]
    if name == tasks.CLASSIFIER:
        if options := [key for key in config["task"] if key != "name"]:
            raise ConfigError(f"task.{options[0]}: task={name} has no options of its own")
        return
    try:
        tasks.needs(config["task"])
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _check_named(config: dict[str, Any], group: str) -> None:
    if not isinstance(config[group], dict) or "name" not in config[group]:
        raise ConfigError(
            f"{group} must be a mapping with a name, as the files of conf/{group} are"
        )


def plan_of(config: dict[str, Any]) -> batchplan.BatchPlan:
    """The batch plan of a config. Raises ``batchplan.PlanError``, and ConfigError for a norm that
    does not say how its batch is formed."""
    _check_named(config, "norm")
    if "batch" not in config["norm"]:
        raise ConfigError(
            f"norm={config['norm']['name']} lacks norm.batch, how its batch is formed:"
            f" one of {', '.join(batchplan.BATCHES)}"
        )
    return batchplan.plan(
        config["batch_size"],
        config["nbs"],
        world_size=config["world_size"],
        batch=config["norm"]["batch"],
        norm=config["norm"]["name"],
        micro_batch=config["micro_batch"],
        sync_group_size=config["sync_group_size"],
    )


def _at(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value[part]
    return value


def _numbers(key: str, value: Any) -> Iterator[tuple[str, int | float]]:
    """(dotted key, number) of every number in a group's option."""
    if isinstance(value, dict):
        for inner, below in value.items():
            yield from _numbers(f"{key}.{inner}", below)
    elif isinstance(value, list):
        for below in value:
            yield from _numbers(key, below)
    elif isinstance(value, int | float):
        yield key, value


def _values(config: dict[str, Any], key: str) -> list[float]:
    value = _at(config, key)
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
