"""The walk-through and the carried layers, against the frameworks' own updates (4 s)."""

import pytest
import torch
from oracles import conventions as oracle

from normlab.tasks import conventions

TINY = ["epochs=1", "data.subset=200", "batch_size=50"]


def test_the_walk_through_is_torchs_batch_norm():
    x = torch.tensor(conventions.INPUT, dtype=torch.float64).unsqueeze(0)
    layer = torch.nn.BatchNorm2d(2).double()
    layer.running_mean.fill_(2.0)
    y = layer(x).detach()
    found = conventions.walk()
    assert found["walk_running"] == pytest.approx(float(layer.running_var[1]), abs=1e-12)
    assert found["walk_output"] == pytest.approx(float(y[0, 1, 0, 0]), abs=1e-12)
    assert found["walk_biased"] == pytest.approx(1.6404, abs=1e-4)
    assert found["walk_unbiased"] == pytest.approx(2.1872, abs=1e-4)
    assert found["walk_running_biased"] == pytest.approx(1.0640, abs=1e-4)
    assert found["walk_output_unbiased"] == pytest.approx(-0.9276 * 0.75**0.5, abs=1e-3)
    assert found["misfit_biased"] == pytest.approx(1.1187 - 1.0640, abs=1e-4)


def test_the_printed_input_is_a_draw_of_torch():
    drawn = torch.randn(2, 2, 2, generator=torch.Generator().manual_seed(42))
    assert torch.equal(torch.tensor(conventions.INPUT), (drawn * 1e4).round() / 1e4)


def test_a_layers_numbers_are_those_of_the_frameworks_own_words():
    draw = torch.Generator().manual_seed(3)

    def batch(n):
        return torch.randn(n, 5, 1, 1, generator=draw, dtype=torch.float64) * 3 + 1

    keras, test = oracle.Keras(5, momentum=0.9, eps=1e-5), batch(16)
    for _ in range(400):
        keras.train(batch(2))
    theirs = keras(test)
    layer = conventions.BatchNorm(5).double().eval()
    mean, biased = keras.moving_mean, keras.moving_variance
    got = conventions._with(layer, test[..., 0, 0], biased, mean)
    assert torch.allclose(got, theirs[..., 0, 0], atol=1e-12)


@pytest.mark.parametrize("seed", [0, 1])
def test_without_conversion_by_the_closed_form_and_with_it_not_at_all(seed):
    found = conventions.carried(seed, 6, 400)
    for name in ("variance_2", "variance_32", "eps", "scale", "momentum"):
        assert found[name] == pytest.approx(found[f"{name}_closed"], rel=1e-9)
        assert found[name] > 1e-3
        assert found[f"{name}_converted"] < 1e-9
    assert found["variance_2"] > 5 * found["variance_32"]  # sqrt(2) - 1 against sqrt(32 / 31) - 1


def test_a_network_carried_over(measure):
    found = measure("conventions", *TINY)
    assert found["error_converted"] == found["error"]
    assert found["error_scale"] > found["error"] or found["error"] > 80


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["norm=gn"], "this network has none"),
        (["task.channels=0"], "task.channels=0, task.updates=400: each is at least 1"),
    ],
)
def test_refusals(measure, overrides, says):
    with pytest.raises(ValueError, match=says) as refused:
        measure("conventions", *TINY, *overrides)
    assert "\n" not in str(refused.value)
