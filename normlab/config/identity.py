"""By what a run is known: a hash over everything that changes its weights, and nothing else.

Changing what enters the hash orphans every run made so far. A test freezes ids; a key that is added
to the schema later goes into LATER with the default it came with, and then changes no old id.
"""

import copy
import hashlib
import json
from collections.abc import Collection
from dataclasses import fields
from typing import Any

from normlab import tasks
from normlab.config.schema import Config, ConfigError, plan_of

SCHEMA_VERSION = 1
"""Raised only when old runs shall not be found again."""

LATER: dict[str, Any] = {
    "norm.cumulative": False,
    "norm.statistics": None,
    "norm.update": None,
    "conv": {"name": "plain"},
    "init": "default",
    "order": "shuffled",
    "launch": True,
    "max_restarts": 0,
    "stall_timeout": 600.0,
    "resume": None,
    "sync_group_size": None,
    "sync_layers": None,
    "buffers": "average",
    "debug_sync": False,
    "kernels": False,
    "model.zero_init_last": None,
    "model.channels": 64,
    "model.stages": 5,
    "eval_at": [],
    "probes": [],
    "task": {"name": tasks.CLASSIFIER},
    "domains": ["none"],
    "freeze_after": None,
    "freeze_statistics": "precise",
    "freeze_affine": "trainable",
    "keep_after": None,
    "init_from": None,
    "weights": None,
    "tracker": None,
}
"""Dotted keys introduced after version 1, each with the default of its introduction."""

_OPEN = ("norm", "model", "data")  # groups whose keys are those of what is chosen

# What a run reads, writes, prints or is called; none of it reaches the weights. What `init_from`
# holds is in `weights`. `remainder` decides only whether to refuse. The number of threads changes
# the last bits of sums: it is recorded, and restored on resuming. The size of a sync group follows
# from the NBS and the micro-batch.
NOT_TRAINING = {
    "evals", "eval_last", "eval_at", "probes", "ema_bank", "runs", "data_root", "skip_done",
    "checkpoint_every", "scale", "experiment", "allocator", "device", "threads", "remainder",
    "sync_group_size", "debug_sync", "resume", "keep_after", "init_from", "tracker",
    "launch", "max_restarts", "stall_timeout",
}  # fmt: skip


def training_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a resolved config that changes the weights, in a canonical form.

    A group's option is known by its module and settings, not by what it is called. NBS and
    micro-batch are those of the batch plan, so that a spelt-out default changes nothing; norms that
    look at no other sample have neither ``nbs`` nor ``decay``, a cumulative average has no
    ``decay``, one rank no ``buffers`` to agree on. Raises ``batchplan.PlanError``.

    A task that is no classifier's training has seed, precision, its options and what it needs
    (`normlab.tasks.needs`), and no other key.
    """
    if is_task(config):
        return _of_task(config)
    plan = plan_of(config)
    kept = {key: value for key, value in config.items() if key not in NOT_TRAINING}
    kept |= {group: _option(config[group]) for group in _OPEN}
    kept["recipe"] = {key: value for key, value in config["recipe"].items() if key != "name"}
    kept |= {"nbs": plan.nbs, "micro_batch": plan.micro_batch}
    if plan.nbs is None:
        del kept["nbs"], kept["decay"]
    elif kept["norm"].get("cumulative"):
        del kept["decay"]
    if kept.get("freeze_after") is None:  # what is never frozen is frozen in no way
        kept.pop("freeze_statistics", None)
        kept.pop("freeze_affine", None)
    if plan.nbs is None or plan.world_size == 1:
        kept.pop("buffers", None)
    return _without_defaults(kept)


def is_task(config: dict[str, Any]) -> bool:
    """Whether a run is something else than a classifier's training."""
    return bool(config.get("task", LATER["task"])["name"] != tasks.CLASSIFIER)


def check_taken(config: dict[str, Any], named: Collection[str]) -> None:
    """Refuse a key that was given by name and that the task does not take.

    What ``conf/`` and a scale say of such keys does not reach a task, and is let pass. Raises
    ConfigError.
    """
    if not is_task(config):
        return
    takes = [*_ALWAYS, *_of_task(config)]
    measured = {"evals", "eval_last", "eval_at", "probes", "ema_bank", "init_from"}
    for key in named:
        group = key.partition(".")[0]
        if group not in takes and (group not in NOT_TRAINING or group in measured):
            known = ", ".join(key for key in takes if key not in _ALWAYS)
            raise ConfigError(
                f"{key}: task={config['task']['name']} does not take it (it takes {known})"
            )


_ALWAYS = ("world_size", "kernels", "arm")  # of any run; a task runs in one process


def _of_task(config: dict[str, Any]) -> dict[str, Any]:
    needed = tasks.needs(config["task"])
    kept = {key: config[key] for key in ("seed", "precision", *needed)}
    kept |= {group: _option(config[group]) for group in _OPEN if group in needed}
    kept["task"] = _option(config["task"])
    if "norm" in needed and config["norm"]["batch"] != "none":
        # Not the plan's: how many samples a layer sees at a time is the task's own affair.
        kept |= {"nbs": config["nbs"], "decay": config["decay"]}
    if "model" in needed:
        kept |= {"conv": config["conv"], "init": config["init"]}
    return _without_defaults(kept)


def _option(group: dict[str, Any]) -> dict[str, Any]:
    """What a group has chosen, by its module and settings."""
    kept = {key: value for key, value in group.items() if key not in ("name", "workers")}
    return kept | {"module": group.get("module") or group["name"]}


def _without_defaults(kept: dict[str, Any]) -> dict[str, Any]:
    for key, default in LATER.items():
        _drop(kept, key.split("."), default)
    return kept


def with_later_keys(config: dict[str, Any], where: object = "this") -> dict[str, Any]:
    """A recorded config, completed by the keys that came after it, at their first defaults.

    A group's own options are not: other members of the group do not have them, and what has them
    has the default in its signature.

    where: the directory it was read from. Raises ConfigError, which names it, for a mapping that is
    no run's config: without a key that every run has had.
    """
    every = [field.name for field in fields(Config) if field.name not in LATER]
    if lacking := [key for key in every if key not in config]:
        raise ConfigError(
            f"{where} is no run: its config.yaml lacks {', '.join(lacking[:4])}"
            + f" and {len(lacking) - 4} more" * (len(lacking) > 4)
        )
    completed = copy.deepcopy(config)
    for key, default in LATER.items():
        *path, last = key.split(".")
        if path and path[0] in _OPEN:
            continue
        node = completed
        for part in path:
            node = node.setdefault(part, {})
        node.setdefault(last, copy.deepcopy(default))
    return completed


def _drop(node: Any, path: list[str], default: Any) -> None:
    """Remove a key that has its introduction's default."""
    for part in path[:-1]:
        node = node.get(part, {})
    if path[-1] in node and node[path[-1]] == default:
        del node[path[-1]]


def cell_key(config: dict[str, Any]) -> str:
    """8 hex digits of everything but the seed: runs that share it are repetitions of each other."""
    kept = training_config(config)
    del kept["seed"]
    return _digest(kept)


def network_name(config: dict[str, Any]) -> str:
    """The model's name, and by what given weights are known: ``resnet50@<8 hex>``."""
    name, weights = str(config["model"]["name"]), config.get("weights")
    return f"{name}@{weights[:8]}" if weights else name


def run_id(config: dict[str, Any], *, device: str, data_digest: str, kernels: bool) -> str:
    """``<model>-<norm>-nbs<n>-s<seed>-<8 hex>``, the name of the run's directory.

    device: the kind (cpu, cuda). data_digest: of the underlying data. kernels: whether the fused
    kernels are on. Norms that look at no other sample have no ``nbs`` part; given weights follow
    the model, ``conv`` and ``init`` the norm, ``order`` and the epoch of ``freeze_after`` the NBS,
    where they are not the default (``tiny-gn-ws-s0-...``). A task: ``<task>-<norm>-s<seed>-<8
    hex>``, without the norm where it takes none.
    """
    kept = training_config(config)
    digest = _digest(
        {
            "schema": SCHEMA_VERSION,
            "config": kept,
            "device": device,
            "data": data_digest,
            "kernels": kernels,
        }
    )
    if is_task(config):
        parts = [config["task"]["name"], *([config["norm"]["name"]] if "norm" in kept else [])]
        return "-".join([*parts, f"s{config['seed']}", digest])
    parts = [network_name(config), config["norm"]["name"]]
    parts += [config["conv"]["name"]] if "conv" in kept else []
    parts += [config["init"]] if "init" in kept else []
    if "nbs" in kept:
        parts.append(f"nbs{kept['nbs']}")
    parts += [config["order"]] if "order" in kept else []
    if "freeze_after" in kept:
        parts.append(f"frozen{kept['freeze_after']}")
    return "-".join([*parts, f"s{config['seed']}", digest])


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
