"""Runs that freeze their batch norms after some epochs (``freeze_after``), and where they begin.

Up to there such a run is another run, the one that does not freeze. Where that has kept what it was
at that moment (``keep_after``), the frozen run begins there, and ends, bit for bit, as if it had
trained all of it.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch

from normlab import agreement
from normlab.config import run_id
from normlab.norms.base import population_layers
from normlab.population import Population, freeze
from normlab.runs import RunDir
from normlab.train import Trainer

log = logging.getLogger(__name__)


def parent(config: dict[str, Any], run: RunDir, *, first_needed: int) -> RunDir | None:
    """The run that this one repeats up to the epoch where it freezes; None where it would not be
    the same: made by other code, by another torch, with another number of threads, or for a while
    of ranks; and where this run must evaluate an epoch before (first_needed: the first of these).

    It need not be there, nor have kept anything.
    """
    after, env = config["freeze_after"], run.env()
    if after is None or first_needed < after:
        return None
    found = run.path.parent / run_id(
        config | {"freeze_after": None}, device=env["device"], data_digest=env["data_digest"],
        kernels=config["kernels"],
    )  # fmt: skip
    there = RunDir(found).env()
    same = all(there.get(key) == env[key] for key in ("source", "torch", "threads"))
    return RunDir(found) if same and "world_sizes" not in there else None


def beginning(
    config: dict[str, Any], run: RunDir, device: torch.device, *, first_needed: int
) -> RunDir | None:
    """Where a run begins, if it need not from nothing: its `parent`, if that has kept what it was,
    as the first rank sees it."""
    found = parent(config, run, first_needed=first_needed)
    if found is None:  # for all ranks alike
        return None
    there = found.kept(config["freeze_after"]).exists()
    return found if any(agreement.told([there], device)) else None


def is_frozen(config: dict[str, Any], epoch: int) -> bool:
    """Whether the weights at the end of an epoch are those of a frozen network."""
    return config["freeze_after"] is not None and epoch > config["freeze_after"]


def due(config: dict[str, Any], trainer: Trainer) -> bool:
    """Whether the epoch that comes is a frozen one, and the network is not."""
    layers = population_layers(trainer.model).values()
    return is_frozen(config, trainer.epoch + 1) and not all(layer.frozen for layer in layers)


def carry_out(config: dict[str, Any], trainer: Trainer, precise: Callable[[], Population]) -> None:
    """Freeze the trainer's network; at the switch, where the config says so, with the statistics
    that `precise` estimates. Later, as a run goes on, they are in its checkpoint."""
    how, after = config["freeze_statistics"], config["freeze_after"]
    begins = trainer.position.tolist() == [after, 0]
    population = precise() if begins and how == "precise" else None
    freeze(trainer.model, population, affine=config["freeze_affine"])
    trainer.network_changed()
    if begins:
        log.info("batch norms are frozen from here on, with %s statistics", how)
