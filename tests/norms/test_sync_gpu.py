"""torch's fused operators in the place of ours, where a GPU is at hand: the same layer."""

import pytest
import torch
from torch import distributed

from normlab.norms import SyncBatchNorm, sync

SIZES = (5, 3, 1, 7)


def on_rank(rank, fused, dtype, layout):
    """Three steps on one GPU, which all ranks share; gloo carries its tensors."""
    torch.manual_seed(rank)
    layer = SyncBatchNorm(6).cuda()
    x = torch.randn(SIZES[rank], 6, 4, 4, device="cuda").mul(1 + rank).add(2 * rank).to(dtype)
    x = x.contiguous(memory_format=layout)
    used = []
    original = sync.TorchSync.apply

    def counting(*arguments):
        used.append(1)
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sync, "_is_torchs", lambda *_: fused)
        patch.setattr(sync.TorchSync, "apply", counting)
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
    ours, theirs = (ranks.run(on_rank, fused, dtype, layout) for fused in (False, True))
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, fused in zip(ours, theirs, strict=True):
        for name, value in mine.items():
            torch.testing.assert_close(fused[name], value, **close)


class Elsewhere:
    """What decides for the fused operators: where a tensor lies, and what it is for."""

    def __init__(self, is_cuda, requires_grad):
        self.is_cuda, self.requires_grad = is_cuda, requires_grad


@pytest.mark.parametrize("backend", ["gloo", "nccl"])
def test_the_fused_layer_is_for_nccl_and_inputs_with_gradients(monkeypatch, backend):
    monkeypatch.setattr(distributed, "get_backend", lambda _: backend)
    nccl = backend == "nccl"
    assert sync._is_torchs(Elsewhere(True, True), None) == nccl
    assert not sync._is_torchs(Elsewhere(False, True), None)
    assert not sync._is_torchs(Elsewhere(True, False), None)
    with torch.no_grad():
        assert sync._is_torchs(Elsewhere(True, False), None) == nccl
