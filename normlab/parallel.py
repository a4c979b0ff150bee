"""One network on several ranks: its gradients are averaged over them, once an optimizer step.

torch's DistributedDataParallel does it, and nothing else: it broadcasts no buffers, so population
statistics stay each rank's own until a run says what becomes of them (`dist.average_statistics`).
"""

import inspect
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel

from normlab.agreement import check_same
from normlab.population import EmaBank

__all__ = ["averaging", "load_own_state", "own_state", "wrapped"]

WHOLE = 2**20
"""Megabytes: more than any network has, so that its gradients travel in one piece."""


def wrapped(network: nn.Module, device: torch.device) -> DistributedDataParallel:
    """`network`, whose gradients become the mean of all ranks' in a backward pass.

    Nothing is broadcast, not even at the start: ranks have drawn or loaded the same weights, and
    RuntimeError says so where they have not.

    On GPUs they travel in pieces while the backward pass goes on. On a CPU there is nothing to gain
    from that, and they travel in one piece, always in the order of the parameters: sums over three
    ranks or more depend on where in the piece a number is, and torch orders gradients anew after
    the first step, so that a resumed run would end in other bits.
    """
    check_same(dict(network.named_parameters()), device)
    options: dict[str, Any] = {"init_sync": False, _buffers_key(): False}
    if device.type != "cpu":
        return DistributedDataParallel(network, **options)
    made = DistributedDataParallel(network, bucket_cap_mb=WHOLE, **options)
    order = {id(parameter): number for number, parameter in enumerate(network.parameters())}
    made.register_comm_hook(order, _mean_in_order)
    return made


def _buffers_key() -> str:
    """What torch calls the broadcast of buffers in every forward: newer ones warn at the old name,
    and older ones, which `pyproject.toml` allows, do not know the new one."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return next(key for key in ("forward_sync_buffers", "broadcast_buffers") if key in known)


def _mean_in_order(order: dict[int, int], bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """One all-reduce of the gradients in the order of their parameters."""
    held = zip(bucket.parameters(), bucket.gradients(), strict=True)
    gradients = [gradient for _, gradient in sorted(held, key=lambda pair: order[id(pair[0])])]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    distributed.all_reduce(flat)
    flat /= distributed.get_world_size()
    for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def averaging(network: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch's forward and backward: only the `last` one of a step averages."""
    if last or not isinstance(network, DistributedDataParallel):
        return nullcontext()
    waiting: AbstractContextManager[None] = network.no_sync()
    return waiting


def own_state(model: nn.Module, bank: EmaBank | None, device: torch.device) -> dict[str, Tensor]:
    """What a rank has of its own in the middle of an epoch: statistics, and torch's generators."""
    own = {f"buffer {name}": buffer for name, buffer in model.named_buffers()}
    if bank:
        own |= {f"bank {name}": tensor for name, tensor in bank.tensors().items()}
    own["rng cpu"] = torch.get_rng_state()
    if device.type == "cuda":
        own["rng cuda"] = torch.cuda.get_rng_state(device)
    return own


def load_own_state(
    state: Mapping[str, Tensor], model: nn.Module, bank: EmaBank | None, device: torch.device
) -> None:
    """Go on with what `own_state` gave, on this or another kind of device."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(state[f"buffer {name}"])
    if bank:
        banked = {name.removeprefix("bank "): tensor for name, tensor in state.items()}
        bank.load_tensors(banked)
    torch.set_rng_state(state["rng cpu"])
    if "rng cuda" in state and device.type == "cuda":
        torch.cuda.set_rng_state(state["rng cuda"], device)
