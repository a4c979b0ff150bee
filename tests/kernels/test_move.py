"""The population moved by the kernels, against the rule in float64."""

import torch

from normlab import kernels


def test_moves_towards_the_averages_of_the_groups() -> None:
    torch.manual_seed(0)
    means, biased = torch.randn(3, 5).double(), torch.rand(3, 5).double() + 1
    mean, var = torch.randn(5), torch.rand(5) + 1
    expected = (
        mean.double().lerp(means.mean(0), 0.1),
        var.double().lerp(biased.mean(0) * (8 / 7), 0.1),
    )
    before = mean._version, var._version
    with kernels.use(True):
        assert kernels.move_towards(mean, var, means, biased, count=8, weight=0.1)
    torch.testing.assert_close(
        (mean, var), tuple(v.float() for v in expected), rtol=2e-7, atol=1e-7
    )
    assert (mean._version > before[0], var._version > before[1]) == (True, True)


def test_leaves_what_is_not_of_a_kernel_to_the_caller() -> None:
    mean, var = torch.zeros(5), torch.ones(5)
    batch = torch.ones(2, 5), torch.ones(2, 5)
    with kernels.use(True):
        assert not kernels.move_towards(mean, var, *batch, count=8, weight=0.1)
        doubled = (v.double() for v in (mean, var, *batch))
        assert not kernels.move_towards(*doubled, count=8, weight=0.1)
    torch.testing.assert_close((mean, var), (torch.zeros(5), torch.ones(5)))
