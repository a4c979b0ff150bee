import pytest
import torch
from oracles.moments import elementwise_forward_backward, sets_per_sample
from torch import nn

from normlab import build
from normlab.config import compose
from normlab.norms import ChannelsLayerNorm, ElementwiseLayerNorm, LayerNorm

from .checks import assert_values, numpy
from .inputs import cases, lay_out, random_affine

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2}


@cases()
def test_formula(shape, dtype, layout):
    layer = ElementwiseLayerNorm(6, shape=shape[2:])
    layer = layer.double() if dtype == torch.float64 else layer
    random_affine(layer)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    leaf = lay_out(x.clone(), layout).requires_grad_()
    y = layer(leaf)
    y.backward(lay_out(dy, layout))
    weight, bias = numpy(layer.weight), numpy(layer.bias)
    sets = sets_per_sample(shape, 1)
    expected = elementwise_forward_backward(numpy(x), sets, weight, bias, numpy(dy))
    assert y.dtype == dtype
    if layout in ("contiguous", "channels_last"):
        assert y.stride() == leaf.stride()
    tensors = y, leaf.grad, layer.weight.grad, layer.bias.grad
    assert_values(tensors, expected, TOLERANCE[dtype])


def test_the_three_layers_called_layer_norm_are_three():
    """P68: each its own function, and equal exactly where their definitions are."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 5, 3)
    whole, elements, channels = (
        LayerNorm(6), ElementwiseLayerNorm(6, shape=(5, 3)), ChannelsLayerNorm(6)
    )  # fmt: skip
    torch.testing.assert_close(whole(x), elements(x))
    assert (whole(x) - channels(x)).abs().max() > 0.1
    assert [tuple(layer.weight.shape) for layer in (whole, elements, channels)] == [
        (6,), (6, 5, 3), (6,)
    ]  # fmt: skip
    before = elements(x)
    with torch.no_grad():
        elements.weight[0, 0, 0] = 2.0
    changed = (elements(x) != before).any(0).nonzero().tolist()
    assert changed == [[0, 0, 0]]  # of a channel: the whole map would change
    # An image of another size: only a weight per element forbids it.
    larger = torch.randn(4, 6, 8, 8)
    assert whole(larger).shape == channels(larger).shape == larger.shape
    with pytest.raises(ValueError, match=r"each of \(6, 5, 3\) and takes no other size"):
        elements(larger)


def test_is_torchs_layer_and_its_state():
    theirs = nn.LayerNorm([6, 5, 3])
    random_affine(theirs)
    ours = ElementwiseLayerNorm(6, shape=(5, 3))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(4, 6, 5, 3)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.eval()(x), theirs(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_half_inputs_of_300(dtype, affine):
    x = (300 * torch.randn(4, 8, 3, 3)).to(dtype)
    y = ElementwiseLayerNorm(8, shape=(3, 3), affine=affine)(x)
    assert y.dtype == dtype
    expected = nn.functional.layer_norm(x.double(), (8, 3, 3))
    torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("channels", "shape", "message"),
    [
        (3, (0, 2), "sizes of at least 1"),
        (3, (2, 2, 2, 2), "up to three sizes"),
        (1, (1, 1), "more than one element"),
        (0, (2, 2), "num_features"),
    ],
)
def test_bad_shapes_are_refused(channels, shape, message):
    with pytest.raises(ValueError, match=message):
        ElementwiseLayerNorm(channels, shape=shape)


@pytest.mark.parametrize(
    ("model", "shapes"),
    [
        ("tiny", [(8, 8), (4, 4), (4, 4)]),
        ("resnet8", [(8, 8)] * 3 + [(4, 4)] * 3 + [(2, 2)] * 3),
    ],
)
def test_a_network_tells_its_norms_their_shapes(model, shapes):
    """The sizes come from the network and the data, and the weights are those of any other norm."""
    config = compose([f"model={model}", "norm=ln_elementwise", "device=cpu"])
    dataset = build.data(config)
    network = build.model(config, dataset)
    layers = [m for m in network.modules() if isinstance(m, ElementwiseLayerNorm)]
    assert [layer.shape for layer in layers] == shapes
    x = torch.randn(2, *dataset.shape)
    assert network(x).shape == (2, 10)
    plain = build.model(compose([f"model={model}", "norm=ln", "device=cpu"]), dataset)
    torch.testing.assert_close(network(x), plain(x))


def test_the_shape_is_no_option_of_the_config():
    config = compose(["norm=ln_elementwise", "+norm.shape=[8,8]", "device=cpu"])
    with pytest.raises(ValueError, match=r"norm\.shape: norm=ln_elementwise has no such option"):
        build.model(config, build.data(config))
