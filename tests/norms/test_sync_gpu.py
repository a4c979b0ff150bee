"""torch's fused operators for what a rank does by itself: the same layer, whoever has them."""

import pytest
import torch
from torch import distributed

from normlab.norms import SyncBatchNorm, sync

from .test_sync import SHAPES, check, in_one, on_rank, parts

SIZES = (5, 3, 1, 7)


def alone(rank, fused, dtype, layout):
    """Three steps on one GPU, which all ranks share; gloo carries its tensors."""
    torch.manual_seed(rank)
    layer = SyncBatchNorm(6).cuda()
    x = torch.randn(SIZES[rank], 6, 4, 4, device="cuda").mul(1 + rank).add(2 * rank).to(dtype)
    x = x.contiguous(memory_format=layout)
    used = []
    original = torch.batch_norm_backward_elemt

    def counting(*arguments):
        used.append(1)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        if not fused:
            patch.setattr(sync, "_has_operators", lambda _: False)
        patch.setattr(torch, "batch_norm_backward_elemt", counting)
        for _ in range(3):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            (y.float() * torch.arange(4, device="cuda")).sum().backward()
    assert len(used) == 3 * fused
    found = {"y": y.detach(), "dx": leaf.grad, **dict(layer.named_buffers())}
    found |= {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_fused_layer_is_ours(ranks, dtype, layout):
    """With unequal counts: outputs, gradients and buffers, to the rounding of the inputs' type."""
    ours, theirs = (ranks.run(alone, fused, dtype, layout) for fused in (False, True))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, fused in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(fused[name], value, **close)


# -- where only some ranks have them, by stand-ins of the operators for the CPU -------------------


def rows(x):
    return x.movedim(1, -1).reshape(-1, x.size(1))


def stats(x, eps):
    mean, var = rows(x).mean(0), rows(x).var(0, correction=0)
    return mean, torch.where(var + eps > 0, (var + eps).rsqrt(), 0.0)


def backward_reduce(dy, x, mean, _rstd, _weight, *wanted):
    assert wanted == (True, False, False)
    empty = torch.empty(0)
    return rows(dy).sum(0), (rows(dy) * (rows(x) - mean)).sum(0), empty, empty


def backward_elemt(dy, x, mean, rstd, weight, sum_dy, sum_dy_xmu, counts):
    assert counts.dtype == torch.int32
    n = counts.sum()
    dx = rows(dy) - sum_dy / n - (rows(x) - mean) * rstd.square() * sum_dy_xmu / n
    dx = dx * (rstd if weight is None else rstd * weight)
    return dx.view(x.movedim(1, -1).shape).movedim(-1, 1)


def mixed(rank, having, xs, dys, layout):
    """What the layer leaves behind, which stand-ins it called, and what this rank exchanged."""
    called, exchanged = [], []

    def noting(notes, name, original):
        def call(*arguments, **options):
            notes.append(name)
            return original(*arguments, **options)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync, "_has_operators", lambda x: rank in having and x.numel() > 0)
        for stand_in in (stats, backward_reduce, backward_elemt):
            name = f"batch_norm_{stand_in.__name__}"
            patch.setattr(torch, name, noting(called, stand_in.__name__, stand_in))
        for name in ("all_gather", "all_reduce"):
            patch.setattr(distributed, name, noting(exchanged, name, getattr(distributed, name)))
        return on_rank(rank, xs, dys, layout), called, exchanged


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("having", [{0}, {1, 3}, {0, 1, 2, 3}])
@pytest.mark.parametrize("shapes", ["unequal", "positions", "empty", "2d", "5d"])
def test_ranks_with_the_operators_meet_those_without(ranks, shapes, having, layout):
    """Whatever each decides for, it exchanges the same, and no rank waits in vain for another."""
    xs, dys = parts(SHAPES[shapes])
    results, called, exchanged = zip(*ranks.run(mixed, having, xs, dys, layout), strict=True)
    check(results, in_one(xs, dys), 1e-11)
    assert exchanged == (["all_gather", "all_reduce"],) * 4
    for rank, x in enumerate(xs):
        fused = rank in having and len(x) > 0
        assert called[rank] == ["stats", "backward_reduce", "backward_elemt"] * fused


def test_the_operators_are_for_elements_on_a_gpu():
    assert not sync._has_operators(torch.ones(2, 3))
    if torch.cuda.is_available():
        assert sync._has_operators(torch.ones(2, 3, device="cuda"))
        assert not sync._has_operators(torch.ones(0, 3, device="cuda"))


def test_a_constant_channel_has_no_variance_by_the_operators(monkeypatch):
    """Of which the operator says 0 for 1 / sqrt(0)."""
    monkeypatch.setattr(sync, "_has_operators", lambda _: True)
    monkeypatch.setattr(torch, "batch_norm_stats", stats)
    x = torch.tensor([[1.0, 2.0], [1.0, 4.0]])
    mean, var = sync._moments(x)
    assert torch.equal(mean, torch.tensor([1.0, 3.0], dtype=torch.float64))
    torch.testing.assert_close(var, torch.tensor([0.0, 1.0], dtype=torch.float64))
