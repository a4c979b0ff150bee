import torch

from normlab.norms import NoNorm


def test_identity():
    layer = NoNorm(3)
    x = torch.randn(2, 3, 4, 4)
    assert layer(x) is x
    assert list(layer.parameters()) == []
    assert layer.state_dict() == {}
