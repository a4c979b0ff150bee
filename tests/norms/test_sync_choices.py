"""What ranks that share statistics choose: which statistics, updates, recomputation, observers."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab.norms import BatchNorm, SyncBatchNorm
from normlab.norms.base import normalization
from normlab.population import EmaBank, estimate

from .test_sync import EQUAL, SHAPES, made, parts


def choices(rank, xs):
    """Statistics, update and groups within the rank; what each leaves in the buffers."""
    layer = SyncBatchNorm(6).double()
    with normalization(layer, update=False):
        batch = layer(xs[rank])
    fresh = [b.clone() for b in layer.buffers()]
    layer(xs[rank])
    moved = [b.clone() for b in layer.buffers()]
    layer.eval()
    with normalization(layer, statistics="batch"):
        evaluated = layer(xs[rank])
    alone = None
    if rank == 2:  # no other rank joins: nothing is exchanged
        with normalization(layer, statistics="population"):
            alone = layer(xs[rank]), layer(xs[rank][:0])
        layer.train()
        layer.statistics = "population"  # frozen
        assert torch.equal(layer(xs[rank]), alone[0])
        layer.statistics = None
        layer.eval()
    with normalization(layer, statistics="batch", group_size=2):
        grouped = layer(xs[rank]) if len(xs[rank]) % 2 == 0 else None
    layer.train().group_size = 2
    try:
        layer(xs[rank])
        said = ""
    except ValueError as error:
        said = str(error)
    unchanged = all(torch.equal(a, b) for a, b in zip(moved, layer.buffers(), strict=True))
    return batch, fresh, moved, evaluated, alone, grouped, said, unchanged


def test_the_choices(ranks):
    xs, _ = parts([(5, 6, 3, 2), (3, 6, 3, 2), (4, 6, 3, 2), (6, 6, 3, 2)])
    results = ranks.run(choices, xs)
    plain = BatchNorm(6).double()
    expected = plain(torch.cat(xs))
    sizes = [len(x) for x in xs]
    for rank, part in enumerate(expected.split(sizes)):
        batch, fresh, moved, evaluated, _, _, said, unchanged = results[rank]
        torch.testing.assert_close(batch, part, rtol=0, atol=1e-12)
        torch.testing.assert_close(evaluated, part, rtol=0, atol=1e-12)
        for buffer, value in zip(fresh, BatchNorm(6).double().buffers(), strict=True):
            assert torch.equal(buffer, value)
        for buffer, value in zip(moved, plain.buffers(), strict=True):
            torch.testing.assert_close(buffer, value, rtol=0, atol=1e-12)
        assert "group_size=2 forms groups within a rank" in said
        assert unchanged
    plain.eval()
    torch.testing.assert_close(results[2][4][0], plain(xs[2]), rtol=0, atol=1e-12)
    assert results[2][4][1].shape == (0, 6, 3, 2)
    ghost = BatchNorm(6).double()
    ghost.group_size = 2
    torch.testing.assert_close(results[3][5], ghost(xs[3]), rtol=0, atol=1e-12)


def adversary(rank, xs, dys):
    """D(real) and D(fake, no update), then one backward; then the same with a recomputation."""
    layer = made(SyncBatchNorm(6))
    real, fake = (x.clone().requires_grad_() for x in (xs[rank], dys[rank]))
    y = layer(real)
    with normalization(layer, update=False):
        z = layer(fake)
    ((y * dys[rank]).sum() + (z * xs[rank]).sum()).backward()
    return {
        "dreal": real.grad, "dfake": fake.grad,
        **{name: p.grad for name, p in layer.named_parameters()},
        **{name: b.clone() for name, b in layer.named_buffers()},
    }  # fmt: skip


def test_two_forwards_before_one_backward(ranks):
    """P28, P62: gradients of both, buffers of D(real) alone, as in one process."""
    xs, dys = parts(EQUAL)
    results = ranks.run(adversary, xs, dys)
    layer = made(BatchNorm(6))
    real, fake = (torch.cat(all_).requires_grad_() for all_ in (xs, dys))
    y = layer(real)
    layer.update = False
    ((y * fake.detach()).sum() + (layer(fake) * real.detach()).sum()).backward()
    close = {"rtol": 0, "atol": 1e-11}
    for key, leaf in (("dreal", real), ("dfake", fake)):
        torch.testing.assert_close(torch.cat([r[key] for r in results]), leaf.grad, **close)
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(sum(r[name] for r in results), parameter.grad, **close)
    for name, buffer in layer.named_buffers():
        for result in results:
            torch.testing.assert_close(result[name], buffer, **close)


def recomputed(rank, xs, dys, reentrant):
    found = []
    for checkpointed in (False, True):
        layer = made(SyncBatchNorm(6))
        x = xs[rank].clone().requires_grad_()
        y = checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)
        y.backward(dys[rank])
        found.append([y.detach(), x.grad, *(p.grad for p in layer.parameters()), *layer.buffers()])
    return [torch.equal(a, b) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_updates_once(ranks, reentrant):
    """P18: with and without activation checkpointing the same bits, buffers included."""
    results = ranks.run(recomputed, *parts(SHAPES["unequal"]), reentrant)
    assert results == [[True] * 7] * 4


def watched(rank, batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), SyncBatchNorm(3)).double()
    bank = EmaBank(model, [0.5, 0.9])
    for batch in batches:
        model(batch[rank])
    bank.detach()
    averages = {decay: bank.population(decay)["1"] for decay in bank.decays}
    found = estimate(model, [batch[rank] for batch in batches], estimator="pooled")["1"]
    return averages, (model[1].running_mean, model[1].running_var), found


def test_observers_see_the_group(ranks):
    """EmaBank and estimate have on every rank what one process has on all samples."""
    generator = torch.Generator().manual_seed(1)
    batches = torch.randn(3, 4, 5, 2, 3, 3, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), BatchNorm(3)).double()
    bank = EmaBank(model, [0.5, 0.9])
    together = [batch.flatten(0, 1) for batch in batches]
    for batch in together:
        model(batch)
    expected = estimate(model, together, estimator="pooled")["1"]
    for averages, (mean, var), found in ranks.run(watched, batches):
        torch.testing.assert_close(mean, averages[0.9].mean)
        torch.testing.assert_close(var, averages[0.9].var)
        for decay, values in averages.items():
            torch.testing.assert_close(values.mean, bank.population(decay)["1"].mean)
            torch.testing.assert_close(values.var, bank.population(decay)["1"].var)
        torch.testing.assert_close(found.mean, expected.mean, rtol=0, atol=1e-12)
        torch.testing.assert_close(found.var, expected.var, rtol=1e-12, atol=0)
