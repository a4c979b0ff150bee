"""The contract of a task: an experiment that is no classifier's training, as a function.

A module of this room has

    KEYS: tuple[str, ...] = ("norm", "data")

    def run(*, seed: int, device: torch.device, norm: ..., data: ..., <options>) -> Iterator[Row]

`KEYS` says which of the run's keys (`normlab.tasks.KNOWN`) it wants: it is given each by its name,
`norm` as a constructor of one layer from its number of channels, `data` as a Dataset, `model` as a
network on the device, the others as they are in the config. The other keys do not reach it, and do
not enter the hash of its run. What else the signature has are its options, with the defaults of
``conf/task/<name>.yaml``.

A task draws from generators that it seeds itself, or from torch's global one, which the run has
seeded. It yields its rows as it has them, and runs again from the beginning when it was ended:
keep it short.
"""

from typing import NamedTuple

__all__ = ["Row"]


class Row(NamedTuple):
    """One number of a task: `epoch` by the task's own clock (its steps, say), `quantity` an
    identifier, `value`."""

    epoch: int
    quantity: str
    value: float
