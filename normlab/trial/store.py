"""What a trial has done so far, so that an interrupted one goes on where it was.

Trainings are kept by what they depend on, verdicts by the code of the diagnosis, too.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from normlab import runs
from normlab.trial import training
from normlab.trial.judge import Verdict
from normlab.trial.material import Material
from normlab.trial.networks import Network
from normlab.trial.training import Size, Trained

__all__ = ["Store"]

TRAINING = ("trial/networks.py", "trial/material.py", "trial/training.py")
VERDICT = ("trial", "diagnose", "population", "norms", "surgery")


class Store:
    """A folder with trainings and verdicts of one size of trial."""

    def __init__(self, root: Path, size: Size) -> None:
        self.size = size
        self.trainings = root / f"trained-{_digest(TRAINING, size)}"
        self.verdicts = root / f"verdicts-{_digest(VERDICT, size)}"

    def trained(self, network: Network, seed: int, material: Material) -> Trained:
        """The network as trained with this seed, now or before."""
        path = self.trainings / f"{network.name.replace(':', '-')}-s{seed}.pt"
        if path.exists():
            kept: dict[str, Any] = torch.load(path, weights_only=True)
            return Trained(network, seed, self.size, material, **kept)
        made = training.trained(network, seed, self.size, material)
        self.trainings.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".part")
        kept = {key: getattr(made, key) for key in ("state", "optimizer", "buffers")}
        torch.save(kept, temporary)
        temporary.replace(path)
        return made

    def verdict(self, network: Network, fault: str, seed: int, make: Callable[[], Verdict]) -> Verdict:
        """That of this fault ("": of none) in this network, now or before."""
        word = hashlib.sha256(fault.encode()).hexdigest()[:8] if fault else "healthy"
        path = self.verdicts / f"{network.name.replace(':', '-')}-s{seed}-{word}.json"
        if path.exists():
            values = json.loads(path.read_text())
            lists = {key: tuple(v) for key, v in values.items() if isinstance(v, list)}
            return Verdict(**(values | lists))
        made = make()
        self.verdicts.mkdir(parents=True, exist_ok=True)
        runs.write_atomically(path, json.dumps(asdict(made)))
        return made


def _digest(parts: tuple[str, ...], size: Size) -> str:
    """8 hex digits over these modules and rooms, the size of the trial and torch's version."""
    package = Path(runs.__file__).resolve().parent
    digest = hashlib.sha256(f"{size} {torch.__version__}".encode())
    for part in parts:
        path = package / part
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:8]
