"""The average of several checkpoints' weights."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normlab.subject.checkpoint import Checkpoint

__all__ = ["average"]


def average(model: nn.Module, checkpoints: Sequence[Checkpoint]) -> dict[str, Tensor]:
    """The first checkpoint's state, each parameter of `model` replaced by the mean over them all.

    The mean is taken in float64 and rounded once, to the type that the first file has. Buffers are
    the first file's: no file's statistics are those of the mean weights, nor is their mean
    (`recalibrate` estimates them). These are stochastic weight averaging's weights (Izmailov et
    al. 2018) and a model soup's (Wortsman et al. 2022).

    Raises ValueError for fewer than two checkpoints, and where names or shapes differ.
    """
    if len(checkpoints) < 2:
        raise ValueError("an average is of two checkpoints at least")
    first = checkpoints[0]
    for other in checkpoints[1:]:
        differing = [n for n in first.state.keys() | other.state if not _alike(n, first, other)]
        if differing:
            raise ValueError(
                f"{first.path} and {other.path} are not of one model: '{min(differing)}' is not "
                "in both, or has another shape"
            )
    held = model.state_dict(keep_vars=True)
    parameters = [name for name, value in held.items() if isinstance(value, nn.Parameter)]
    state = dict(first.state)
    for name in parameters:
        if name in state and state[name].is_floating_point():
            values = [one.state[name].double() for one in checkpoints]
            state[name] = torch.stack(values).mean(0).to(state[name].dtype)
    return state


def _alike(name: str, one: Checkpoint, other: Checkpoint) -> bool:
    both = name in one.state and name in other.state
    return both and one.state[name].shape == other.state[name].shape
