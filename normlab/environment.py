"""What a run's numbers depend on besides its config: recorded with it, and restored on resuming."""

import platform
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normlab import experiment, runs, tasks
from normlab.config import cell_key, network_name

if TYPE_CHECKING:
    from normlab.perform import Task
    from normlab.worker import Job


@cache
def default_threads() -> int:
    """What torch would use in this process, before any run set a number."""
    import torch

    return torch.get_num_threads()


def describe(job: "Job | Task") -> dict[str, Any]:
    """What the numbers depend on besides the config; no names of hosts or users."""
    import numpy
    import torch
    import torchvision

    from normlab import __version__, build, worker

    device, world = build.device(job.config), job.config["world_size"]
    commit, dirty = runs.commit()
    return {
        "cell": cell_key(job.config),
        "commit": commit,
        "dirty": dirty,
        "source": runs.source_digest(),
        "claims": _claims(job.config["scale"]),
        "device": device.type,
        "processor": torch.cuda.get_device_name() if device.type == "cuda" else _processor(),
        "kernels": job.config["kernels"],
        "world_size": world,
        "backend": None if world == 1 else "nccl" if device.type == "cuda" else "gloo",
        "threads": job.config["threads"] or max(1, default_threads() // world),
        "normlab": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "started": worker.now(),
        **_of_data(job),
        **(_of_training(job) if isinstance(job, worker.Job) else _of_task(job)),
    }


def _of_data(job: "Job | Task") -> dict[str, Any]:
    if job.data is None:
        return {}
    data = job.data
    chance = 100 * (1 - 1 / data.num_classes)
    return {"data_digest": data.digest, "data_note": data.note, "chance": chance}


def _of_training(job: "Job") -> dict[str, Any]:
    parameters = sum(p.numel() for p in job.model.parameters())
    return {
        "network": network_name(job.config), "nbs": job.plan.nbs, "parameters": parameters,
        "dropped_per_epoch": job.dropped,
    }  # fmt: skip


def _of_task(job: "Task") -> dict[str, Any]:
    """``takes``: the keys of the config that reach the task's numbers."""
    takes = tasks.needs(job.config["task"])
    batched = job.config["norm"]["batch"] != "none"
    takes += ("decay", "nbs") if "norm" in takes and batched else ()
    return {"takes": list(takes), "nbs": job.config["nbs"] if "nbs" in takes else None}


def _claims(scale: str | None) -> str:
    """``experiment:digest`` of every experiment that judges at this scale, as declared now."""
    loaded = [experiment.load(name) for name in experiment.names()]
    return " ".join(f"{e.name}:{e.claims_digest(scale)}" for e in loaded if scale in e.scales)


def _processor() -> str:
    """The processor's model, for the record of a measurement."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(
            line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.machine()
