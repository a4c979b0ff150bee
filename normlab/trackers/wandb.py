"""Weights & Biases, offline unless the variable ``WANDB_MODE`` says otherwise: into ``wandb/`` in
the run's directory, from where ``wandb sync <run>/wandb/offline-run-*`` sends it when asked to.

Every start of a run leaves a folder there, with the same id: synchronized, they are one run. What
the package would tell of the machine (its name, its hardware, its git) and of the console is
switched off.
"""

import os
from collections.abc import Mapping
from typing import Any

from normlab.runs import RunDir
from normlab.trackers.base import key

__all__ = ["LEAVES", "start"]

LEAVES = "wandb"


def start(run: RunDir, config: dict[str, Any]) -> "_WeightsAndBiases":
    """See `normlab.trackers.base`. Its project is normlab, or that of ``WANDB_PROJECT``."""
    return _WeightsAndBiases(run, config)


class _WeightsAndBiases:
    durable = False  # its other process writes every 15 seconds

    def __init__(self, run: RunDir, config: dict[str, Any]) -> None:
        import wandb

        quiet = wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            disable_job_creation=True,
            save_code=False,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            host="",  # its name
        )
        self._run = wandb.init(
            mode=os.environ.get("WANDB_MODE", "offline"),
            project=os.environ.get("WANDB_PROJECT", "normlab"),
            dir=run.path,
            id=key(run),
            name=run.id,
            resume="allow",
            reinit="create_new",
            config=config,
            settings=quiet,
        )
        # Its own steps only grow, and an epoch may be evaluated after a later one.
        self._run.define_metric("*", step_metric="epoch")

    def log(self, values: Mapping[str, float], epoch: int) -> None:
        self._run.log({"epoch": epoch, **values})

    def end(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status == "done" else 1)
