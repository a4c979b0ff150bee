"""What a fault is, and what a diagnosis is given to find it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from normlab.trial.material import Labelled
from normlab.trial.training import Trained

__all__ = ["Case", "Fault"]


@dataclass(frozen=True)
class Case:
    """A user's model with its checkpoint loaded, and what comes with it.

    optimizer: the state_dict of the last one. states: checkpoints of all ranks, where there are
    several. nbs: normalization batch size of the last training.
    """

    model: nn.Module
    batches: Sequence[Labelled]
    test: Sequence[Labelled]
    optimizer: Mapping[str, object] | None = None
    states: Sequence[Mapping[str, Tensor]] = field(default=())
    nbs: int | None = None


@dataclass(frozen=True)
class Fault:
    """A fault that users have met.

    name: in the trial's table. pains: where users met it, by number. story: how it happens here.
    expected: the names that are right: the first is the fault's own, others only where what a
    diagnosis is given cannot tell them apart, and `apart` says why. inject: from a healthy network.
    """

    name: str
    pains: str
    story: str
    expected: tuple[str, ...]
    inject: Callable[[Trained], Case]
    apart: str = ""
