"""Weights that a run begins with (``init_from``): read from a file, and known by what they are.

The file is a state_dict as `torch.save` writes it, torchvision's own among them, or a checkpoint
that holds one as ``model`` or ``state_dict``. Its path is where it happens to lie: what makes the
run is the digest of the tensors, the same from whichever of these they are read.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

State = dict[str, Tensor]

DIGITS = 16

_WITHIN = ("model", "state_dict")
"""Under which of its keys a checkpoint holds the weights."""

_COUNTER = "num_batches_tracked"
"""What older state_dicts of batch norms lack, and no evaluation needs."""


def known(path: str, wanted: str | None = None) -> str:
    """The digest of a file's weights, 16 hex digits.

    Raises ValueError for what cannot be read as weights, and for others than those `wanted`.
    """
    digest = _read(path)[1]
    if wanted not in (None, digest):
        raise ValueError(f"init_from={path} holds the weights {digest}, and not weights={wanted}")
    return digest


def load(model: nn.Module, path: str, wanted: str | None = None) -> None:
    """Put a file's weights into a model, parameters and buffers alike.

    Raises ValueError as `known` does, and for weights of another network, in a line that names the
    first parameter that does not fit.
    """
    known(path, wanted)
    state, ours = _read(path)[0], model.state_dict()
    needed = [name for name in ours if not name.endswith(_COUNTER)]
    wrong = [f"it lacks {name}" for name in needed if name not in state]
    wrong += [f"the network has no {name}" for name in state if name not in ours]
    wrong += [
        f"{name} is {tuple(state[name].shape)}, the network's {tuple(ours[name].shape)}"
        for name in needed
        if name in state and state[name].shape != ours[name].shape
    ]
    if wrong:
        more = f" (and {len(wrong) - 1} more such names)" if len(wrong) > 1 else ""
        raise ValueError(f"init_from={path} is of another network: {wrong[0]}{more}")
    model.load_state_dict(state)


def digest_of(state: State) -> str:
    """16 hex digits of the SHA-256 over names, dtypes, shapes and bytes, in the names' order."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(f"{name}|{value.dtype}|{tuple(value.shape)}|".encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:DIGITS]


def _read(path: str) -> tuple[State, str]:
    file = Path(path).expanduser()
    try:
        at = file.stat()
    except OSError as error:
        raise ValueError(f"init_from={path}: {error.strerror}") from None
    return _read_once(file, at.st_mtime_ns, at.st_size)


@lru_cache(maxsize=1)  # the runs of a sweep begin with the same
def _read_once(file: Path, _: int, __: int) -> tuple[State, str]:
    """A file's weights with their digest; `weights_only`: no code in the file can run."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # on foreign bytes torch's unpickler fails in any way it can
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"init_from={file} cannot be read as weights ({reason})") from None
    for key in _WITHIN:
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
            break
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ValueError(
            f"init_from={file} holds no state_dict: names with tensors, or such a mapping under"
            f" {' or '.join(_WITHIN)}"
        )
    # A network that was trained by several ranks, and saved as it was wrapped for them.
    state = {name.removeprefix("module."): value.detach() for name, value in state.items()}
    return state, digest_of(state)
