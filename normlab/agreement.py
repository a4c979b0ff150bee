"""What the ranks of a run tell each other besides gradients and statistics.

Each function must be called by every rank, and is what it would be without the others in a process
that is alone. All that travels is tensors, never a pickle.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from normlab import dist

__all__ = ["FirstRankFailed", "by_first", "check_same", "gather", "told"]


class FirstRankFailed(RuntimeError):
    """Raised by ranks that have not failed themselves."""


def told(values: list[int], device: torch.device) -> list[int]:
    """The first rank's `values`; all ranks must have equally many."""
    first: list[int] = dist.stack(torch.tensor(values, dtype=torch.int64, device=device))[
        0
    ].tolist()
    return first


def by_first(action: Callable[[], object], device: torch.device) -> None:
    """What the first rank does while the others wait.

    What it raises is raised there, and FirstRankFailed on the others, which do not wait in vain.
    """
    rank, ranks = dist.place()
    failure: Exception | None = None
    if rank == 0:
        try:
            action()
        except Exception as error:
            if ranks == 1:
                raise
            failure = error
    failed = dist.stack(torch.tensor([failure is not None], device=device).int())
    if failure is not None:
        raise failure
    if failed.any():
        raise FirstRankFailed("rank 0 failed in what it alone writes: its own error says why")


def gather(state: Mapping[str, Tensor], device: torch.device) -> list[dict[str, Tensor]]:
    """Every rank's `state`, bit for bit, on the CPU; names, shapes and types must agree."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    data = [tensor.reshape(-1).view(torch.uint8) for tensor in held.values()]
    packed = torch.cat(data) if data else torch.empty(0, dtype=torch.uint8)
    rows = dist.stack(packed.to(device)).cpu()
    return [
        {
            name: piece.clone().view(tensor.dtype).view(tensor.shape)
            for (name, tensor), piece in zip(
                held.items(), row.split([len(part) for part in data]), strict=True
            )
        }
        for row in rows
    ]


def check_same(tensors: Mapping[str, Tensor], device: torch.device) -> None:
    """Raise RuntimeError on every rank where they hold a tensor with different bits.

    A rank sends one number per tensor, whatever its size; names and sizes must agree.
    """
    if not tensors or dist.place()[1] == 1:
        return
    prints = torch.stack([_fingerprint(tensor).to(device) for tensor in tensors.values()])
    different = (rows := dist.stack(prints)).ne(rows[0]).any(0).nonzero().flatten().tolist()
    if different:
        names = list(tensors)
        more = f" and {len(different) - 1} more" if len(different) > 1 else ""
        raise RuntimeError(f"ranks hold different values of {names[different[0]]}{more}")


_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _fingerprint(tensor: Tensor) -> Tensor:
    """A sum modulo 2**64 over the bits of the elements, each weighted by its own odd number."""
    bits = tensor.detach().reshape(-1).view(_WORDS[tensor.element_size()]).long()
    return (bits * torch.arange(1, 2 * len(bits), 2, device=bits.device)).sum()
