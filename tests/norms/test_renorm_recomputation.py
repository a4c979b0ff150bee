"""Batch renorm under activation checkpointing: r and d are what the repeated forward had."""

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from normlab.norms import BatchRenorm

NOW = {"r_max": 1.5, "d_max": 0.5, "start": 0.0, "r_end": 0.0, "d_end": 0.0, "decay": 0.5}
"""Final limits from the first forward on, and statistics that move far at each."""


def made(nbs=None):
    """A layer whose running statistics no batch of these tests has, and its twin."""
    torch.manual_seed(0)
    layer = BatchRenorm(3, nbs=nbs, **NOW).double()
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.1, 3)
    return layer, copy.deepcopy(layer)


def repeated(layer, x, reentrant=False):
    return checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum()


def assert_equal(layer, twin, ours, theirs):
    """Gradients of the inputs and the parameters, and the buffers."""
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
    for p, q in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-11)
    assert all(torch.equal(v, twin.state_dict()[k]) for k, v in layer.state_dict().items())


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("nbs", [None, 4])
def test_forwards_before_one_backward_repeat_their_own_correction(nbs, reentrant, same):
    """P53, P18: two recomputations, with other statistics each, of two batches or twice of one."""
    layer, twin = made(nbs)
    inputs = torch.randn(2, 8, 3, 4, 4, dtype=torch.float64)
    if same:
        inputs[1] = inputs[0]
    ours, theirs = (inputs.clone().requires_grad_() for _ in range(2))
    sum(repeated(layer, x, reentrant) for x in ours).backward()
    sum(twin(x).pow(3).sum() for x in theirs).backward()
    assert_equal(layer, twin, ours, theirs)


def test_one_batch_in_two_successive_steps():
    """Each step repeats its own forward, not the equal one of the step before."""
    layer, twin = made()
    x = torch.randn(8, 3, 4, 4, dtype=torch.float64)
    for _ in range(2):
        ours, theirs = (x.clone().requires_grad_() for _ in range(2))
        repeated(layer, ours).backward()
        twin(theirs).pow(3).sum().backward()
        assert_equal(layer, twin, ours, theirs)


def test_a_graph_that_is_kept_is_repeated_as_often_as_one_likes():
    """Also in checkpoints within checkpoints, which repeat a forward twice in one backward."""
    layer, twin = made()
    ours, theirs = (torch.randn(8, 3, 4, 4).double().requires_grad_() for _ in range(2))
    theirs.data.copy_(ours)
    loss = checkpoint(lambda x: repeated(layer, x, True), ours, use_reentrant=True)
    layer(ours.detach() + 1)  # what came after moved the buffers
    expected = twin(theirs).pow(3).sum()
    twin(theirs.detach() + 1)
    for _ in range(2):
        loss.backward(retain_graph=True)
        expected.backward(retain_graph=True)
    assert_equal(layer, twin, ours, theirs)


def test_transformed_forwards_and_moved_layers_are_not_remembered():
    """Their values end with the transformation, and lie in another precision or device."""
    layer, twin = made()
    layer.update = twin.update = False
    torch.func.vmap(layer)(torch.randn(2, 8, 3, 4, dtype=torch.float64))
    layer(torch.randn(8, 3, 4, dtype=torch.float64))
    assert len(layer._recent) == 1
    assert not layer.double()._recent
    torch.func.vmap(layer)(torch.randn(2, 8, 3, 4, dtype=torch.float64))
    ours, theirs = (torch.ones(8, 3, 4).double().cumsum(0).requires_grad_() for _ in range(2))
    repeated(layer, ours).backward()
    twin(theirs).pow(3).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-12)
