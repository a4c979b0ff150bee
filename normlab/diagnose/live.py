"""One training step of a copy of the user's model, watched: what moves, how often, behind what.

Modes, `requires_grad`, momenta and activation checkpointing say what a training is meant to do;
whether a buffer moves, and how many times in a forward and its backward, is seen.
"""

import copy
import warnings
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from normlab.diagnose.forwards import take
from normlab.norms.base import PopulationNorm
from normlab.subject import Scoring

__all__ = ["Live", "norms_of", "watch"]

SAMPLES = 16


@dataclass
class Live:
    """uses: forwards of each layer in one forward of the model; moved: layers whose statistics
    it moved; again: updates of the backward pass; biases: layers with a bias right before a norm.
    """

    uses: Counter[str] = field(default_factory=Counter)
    moved: set[str] = field(default_factory=set)
    again: Counter[str] = field(default_factory=Counter)
    biases: dict[str, str] = field(default_factory=dict)


def norms_of(model: nn.Module) -> dict[str, nn.Module]:
    """The batch norms of a model by name: of torch, normlab and others, frozen ones too."""
    return {name: module for name, module in model.named_modules() if _is_norm(module)}


def _is_norm(module: nn.Module) -> bool:
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    kinds = (nn.modules.batchnorm._BatchNorm, PopulationNorm)
    return isinstance(module, kinds) or "running_var" in module._buffers


def watch(model: nn.Module, batch: Any, scoring: Scoring) -> Live | None:
    """One step in train() on the first samples of `batch`; None where the model cannot take it.

    The model is copied and stays as it is; torch's random numbers are put back.
    """
    mine = copy.deepcopy(model)
    norms = norms_of(mine)
    found = Live()
    outputs: dict[int, tuple[Tensor, str]] = {}
    handles = [_note_output(name, module, outputs) for name, module in _biased(mine).items()]
    for name, norm in norms.items():
        handles.append(norm.register_forward_pre_hook(_note_input(name, found, outputs)))
    mine.train()
    before = {name: _held(norm) for name, norm in norms.items()}
    devices = sorted({p.device.index for p in mine.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        try:
            result = scoring.forward(mine, take(batch, slice(SAMPLES)))
        except Exception:  # a model of which train() asks something else, or too small a batch
            return None
        uses, forward = Counter(found.uses), {name: _held(norm) for name, norm in norms.items()}
        with suppress(RuntimeError):  # nothing to differentiate, or not so
            _backward(result)
    after = {name: _held(norm) for name, norm in norms.items()}
    for handle in handles:
        handle.remove()
    found.uses = uses
    for name in norms:
        if _differ(before[name], forward[name]):
            found.moved.add(name)
        if _differ(forward[name], after[name]):
            found.again[name] += 1
    return found


def _biased(model: nn.Module) -> dict[str, nn.Module]:
    linear = (nn.modules.conv._ConvNd, nn.Linear)
    found = {n: m for n, m in model.named_modules() if isinstance(m, linear)}
    return {name: module for name, module in found.items() if module.bias is not None}


def _note_output(name: str, module: nn.Module, outputs: dict[int, tuple[Tensor, str]]) -> Any:
    def hook(_: nn.Module, __: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs[id(output)] = (output, name)  # held, so that no other gets its id

    return module.register_forward_hook(hook)


def _note_input(name: str, found: Live, outputs: dict[int, tuple[Tensor, str]]) -> Any:
    def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.uses[name] += 1
        if inputs and id(inputs[0]) in outputs:
            found.biases[name] = outputs[id(inputs[0])][1]

    return hook


def _held(norm: nn.Module) -> list[Tensor]:
    buffers = [norm._buffers.get(name) for name in ("running_mean", "running_var")]
    return [buffer.detach().clone() for buffer in buffers if buffer is not None]


def _differ(before: list[Tensor], after: list[Tensor]) -> bool:
    return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def _backward(result: Any) -> None:
    leaves = pytree.tree_leaves(result)
    if leaves and not isinstance(leaves[0], Tensor) and hasattr(leaves[0], "__dict__"):
        leaves = pytree.tree_leaves(vars(leaves[0]))
    total = [
        leaf.float().sum() for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad
    ]
    if total:
        torch.stack(total).sum().backward()
