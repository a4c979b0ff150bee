"""The talk's formula against gradients written out, and the four forms of a network (5 s)."""

import pytest
import torch
from oracles import fusion as oracle

from normlab import surgery
from normlab.models import find
from normlab.norms.bn import BatchNorm
from normlab.tasks import fusion

TINY = ["epochs=1", "data.subset=200", "batch_size=50", "task.images=20", "task.steps=2"]


@pytest.mark.parametrize("scale", [0.5, 1.0, 3.0])
def test_the_scalars_step_is_the_gradients_written_out(scale):
    found = fusion.scalars(4, scale, 0.1)
    draw = torch.Generator().manual_seed(4)
    w2, w3, x, target = torch.randn(4, generator=draw, dtype=torch.float64).tolist()
    g = scale * (w2 * x + w3) - target
    fused = (scale * w2 - 0.1 * g * x) * x + (scale * w3 - 0.1 * g)
    inner = (w2 - 0.1 * g * scale * x) * x + (w3 - 0.1 * g * scale)
    factor = scale - 0.1 * g * (w2 * x + w3)
    for name, value in (("constant", scale * inner - fused), ("trained", factor * inner - fused)):
        assert found[f"scalar_{name}"] == pytest.approx(value, abs=1e-12)
        assert found[f"scalar_{name}_closed"] == pytest.approx(value, abs=1e-12)
    assert abs(found["scalar_before"]) < 1e-13
    assert abs(found["scalar_trained"]) > 1e-3


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = find("tiny")(BatchNorm, num_classes=4, shape=(1, 8, 8))
    for layer in model.modules():
        if isinstance(layer, BatchNorm):
            torch.nn.init.normal_(layer.weight)
            torch.nn.init.normal_(layer.running_mean)
            torch.nn.init.uniform_(layer.running_var, 1e-3, 3)
    return model.double().eval()


@pytest.mark.parametrize("scale", [0.25, 4.0])
def test_filters_get_the_length_and_the_function_stays(network, scale):
    x = torch.randn(5, 1, 8, 8, dtype=torch.float64)
    before = network(x)
    fusion.rescale(network, scale)
    assert torch.allclose(network(x), before, atol=1e-9)
    for layer in network.modules():
        if isinstance(layer, BatchNorm):
            got = layer.weight.abs() / (layer.running_var + layer.eps).sqrt()
            assert torch.allclose(got, torch.full_like(got, scale))
            assert (layer.running_var >= 0).all()


def test_forms_train_what_their_names_say(network):
    count = dict.fromkeys(fusion.FORMS, 0)
    for form in fusion.FORMS:
        made = fusion.formed(network, form)
        count[form] = sum(p.numel() for p in made.parameters() if p.requires_grad)
        assert form == "fused" or len(surgery.fusible(made.eval())) == 3
    channels = 16 + 32 + 32
    assert count["affine"] == count["bn"] == count["frozen"] + 2 * channels
    assert count["fused"] == count["frozen"] + channels
    weight = network[0].weight
    norm = network[1]
    expected, _ = oracle.folded(
        weight, torch.zeros(16), norm.weight, norm.bias, norm.running_mean, norm.running_var,
        norm.eps,
    )  # fmt: skip
    assert torch.allclose(fusion.formed(network, "fused")[0].weight, expected)


def test_a_step_leads_further_where_the_factor_is_larger(measure):
    one, four = (measure("fusion", *TINY, f"task.scale={scale}") for scale in (1.0, 4.0))
    for form in ("frozen", "affine"):
        assert four[f"step_{form}"] > 3 * one[f"step_{form}"]
    assert one["step_frozen"] < 1
    assert max(four[f"same_{form}"] for form in fusion.FORMS) < 1e-4


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task.scale=0.0"], r"task.scale=0.0: it must be above 0"),
        (["norm=gn"], "this network has none"),
    ],
)
def test_refusals(measure, overrides, says):
    with pytest.raises(ValueError, match=says) as refused:
        measure("fusion", *TINY, *overrides)
    assert "\n" not in str(refused.value)
