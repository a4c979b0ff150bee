"""Two kinds of batches in one layer, and a discriminator's statistics (5 s)."""

import copy

import pytest
import torch
from torch import nn

from normlab.norms.base import normalization
from normlab.norms.bn import BatchNorm
from normlab.tasks import gan_update

TINY = ["data.subset=200", "batch_size=50", "task.steps=2", "task.width=4"]


@pytest.mark.parametrize("pairs", [1, 3, 200])
def test_the_gaussians_statistics_are_torchs(pairs):
    found = gan_update.gaussians(5, pairs)
    mean, var = 0.0, 1.0
    for _ in range(pairs):
        for to_mean, to_var in ((0.0, 1.0), (2.0, 9.0)):
            mean, var = 0.9 * mean + 0.1 * to_mean, 0.9 * var + 0.1 * to_var
    for name in ("both", "closed"):
        assert found[f"mean_{name}"] == pytest.approx(mean, abs=1e-12)
        assert found[f"var_{name}"] == pytest.approx(var, abs=1e-12)
    assert found["mean_off"] == found["mean_alone"] == pytest.approx(0, abs=1e-12)
    assert found["var_off"] == found["var_alone"] == pytest.approx(1, abs=1e-12)


def test_what_follows_every_forward_is_what_a_layer_that_updates_in_all_has():
    torch.manual_seed(0)
    critic = gan_update.discriminator(BatchNorm, (1, 8, 8), 4)
    plain = copy.deepcopy(critic)
    both = gan_update.followed(critic)
    for step in range(3):
        x = torch.randn(6, 1, 8, 8) + step
        plain(x)
        with normalization(critic, update=step != 1):
            critic(x).sum().backward()  # watching does not stand in the way of learning
    for name, stands in both.items():
        layer = plain.get_submodule(name)
        assert torch.allclose(stands.mean, layer.running_mean, atol=1e-6)
        assert torch.allclose(stands.var, layer.running_var, atol=1e-6)
        assert not torch.allclose(critic.get_submodule(name).running_mean, stands.mean, atol=1e-3)


def test_shapes():
    maker = gan_update.generator((3, 12, 16), 4)
    critic = gan_update.discriminator(BatchNorm, (3, 12, 16), 4)
    images = maker(torch.randn(5, gan_update.LATENT))
    assert images.shape == (5, 3, 12, 16)
    assert critic(images).shape == (5,)
    assert sum(isinstance(layer, nn.Conv2d) for layer in critic) == 3


def test_shares_and_distances():
    def stands(value):
        one = torch.tensor([value, 0.0])
        return {"a": gan_update.Statistics(one, torch.tensor([4.0, 1.0]), 1)}

    assert gan_update._share(stands(3.0), stands(1.0), stands(9.0)) == pytest.approx(0.25)
    assert gan_update._apart(stands(3.0), stands(1.0), stands(1.0)) == pytest.approx(0.5**0.5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["task.steps=0"], "task.steps=0: it is at least 1"),
        (["norm=gn", "norm.groups=2"], "this norm has none"),
        (["data=synthetic", "data.size=6"], "sides that 4 divides, not"),
    ],
)
def test_refusals(measure, overrides, says):
    tiny = TINY[1:] if "data=synthetic" in overrides else TINY
    with pytest.raises(ValueError, match=says) as refused:
        measure("gan_update", *tiny, *overrides)
    assert "\n" not in str(refused.value)
