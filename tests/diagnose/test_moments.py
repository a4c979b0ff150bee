"""What is merged from the moments of samples is what all elements give at once, in float64."""

from itertools import product

import torch
from torch import nn

from diagnose.networks import signals
from normlab.diagnose.comparison import Pair, explained
from normlab.diagnose.moments import Moments, Spread, of_samples
from normlab.population import ema_noise


def accumulated(x: torch.Tensor, batch: int, group: int | None = None) -> Moments:
    moments = Moments(x.size(1), x.device)
    for part in x.split(batch):
        moments.add(part, group)
    return moments


def test_the_population_is_that_of_all_elements_however_they_are_split() -> None:
    x = 100 + torch.randn(24, 3, 5, generator=torch.Generator().manual_seed(0))
    elements = x.double().transpose(0, 1).flatten(1)
    for batch, group in ((24, None), (8, None), (8, 2), (7, None)):
        found = accumulated(x, batch, group).statistics()
        torch.testing.assert_close(found.mean, elements.mean(1), rtol=1e-6, atol=0)
        torch.testing.assert_close(found.var, elements.var(1, correction=0), rtol=1e-4, atol=0)


def test_the_statistics_of_batches_are_torchs() -> None:
    x = torch.randn(32, 3, 5, generator=torch.Generator().manual_seed(1))
    found = accumulated(x, 16, 4)
    norm = nn.BatchNorm1d(3, momentum=1.0)
    means, variances = [], []
    for part in x.split(4):
        norm(part)
        means.append(norm.running_mean.double().clone())
        variances.append(norm.running_var.double().clone())
    torch.testing.assert_close(found.groups.mean, torch.stack(means).mean(0), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(found.groups.var, torch.stack(means).var(0), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.variances.mean, torch.stack(variances).mean(0))


def test_a_short_last_batch_counts_for_the_population_alone() -> None:
    x = torch.randn(20, 2, 3, generator=torch.Generator().manual_seed(2))
    found = accumulated(x, 8)
    assert found.samples.count == 20
    assert found.groups.count == 2


def test_the_expected_variance_is_the_mean_over_all_pairs_of_samples() -> None:
    x = torch.randn(9, 2, 4, generator=torch.Generator().manual_seed(3)).double()
    x = x + 2 * torch.randn(9, 2, 1, generator=torch.Generator().manual_seed(4)).double()
    pairs = [torch.cat([x[i], x[j]], 1) for i, j in product(range(9), repeat=2)]
    truth = torch.stack([pair.var(1, correction=1) for pair in pairs]).mean(0)
    torch.testing.assert_close(accumulated(x, 9).expected_variance(2), truth)


def test_samples_without_positions_have_no_variance_within() -> None:
    mean, var, positions = of_samples(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    assert mean.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert not var.any()
    assert positions == 1


def test_a_spread_of_one_row_is_not_known() -> None:
    spread = Spread()
    spread.add(torch.ones(1, 2))
    assert spread.var.isnan().all()


def pair(mean: torch.Tensor, var: torch.Tensor, moments: Moments) -> Pair:
    return Pair("norm", mean, var, moments, 1e-5)


def test_the_scatter_of_a_running_average_is_that_of_the_closed_form() -> None:
    """Averages of independent batches are off by (1 - d) / (1 + d) of one batch's variance."""
    x = torch.randn(4096, 64, generator=torch.Generator().manual_seed(5))
    moments = accumulated(x, 16)
    for momentum in (0.1, 0.9):
        norm = nn.BatchNorm1d(64, momentum=momentum)
        for part in x.split(16)[:100]:
            norm(part)
        stored = pair(norm.running_mean.double(), norm.running_var.double(), moments)
        wanted = ema_noise(1 - momentum)
        assert 0.6 * wanted < stored.in_spreads() < 1.5 * wanted
        assert 0.6 * wanted < stored.variances_in_spreads() < 1.5 * wanted


def test_few_batches_tell_no_scatter() -> None:
    x = torch.randn(28, 4, generator=torch.Generator().manual_seed(6))
    few = accumulated(x, 4)
    stored = pair(torch.zeros(4).double(), torch.ones(4).double(), few)
    assert stored.in_spreads() != stored.in_spreads()


def test_distance_and_what_explains_it() -> None:
    x, _ = signals(64, 0)
    moments = accumulated(x.expand(-1, 3, -1), 8)
    found = moments.statistics()
    at = pair(found.mean, found.var, moments)
    assert at.far() == 0
    off = pair(found.mean + found.var.sqrt(), 4 * found.var, moments)
    torch.testing.assert_close(
        off.distance(), torch.full((3,), 1 / 4 + 0.5 * torch.tensor(4.0).log() ** 2).double(),
        rtol=1e-3, atol=0,
    )  # fmt: skip
    law = {"norm": (found.mean + found.var.sqrt(), 4 * found.var)}
    assert explained({"norm": off}, law) > 0.999
    assert explained({"norm": off}, {"norm": (found.mean, found.var)}) == 0


def test_channels_that_cannot_be_compared_are_left_out() -> None:
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(7))
    x[:, 0] = 1.0  # constant
    stored = pair(
        torch.zeros(3).double(), torch.tensor([1.0, -1.0, 1.0]).double(), accumulated(x, 8)
    )
    assert stored.mask.tolist() == [False, False, True]


def test_the_noise_of_an_average_is_told_from_a_shift() -> None:
    """Every channel follows one direction, so the error is one normal draw's: 4 deviations of an
    average (1/19 of a batch's variance) and of the precise mean (1/32)."""
    one = torch.randn(256, 1, generator=torch.Generator().manual_seed(8))
    x = one * torch.linspace(1, 2, 6)
    seen = accumulated(x, 8)
    deviation = seen.groups.var.sqrt()
    precise = seen.statistics()
    limit = 4 * (1 / 19 + 1 / 32) ** 0.5
    for off, beyond in ((0.9 * limit, False), (1.1 * limit, True)):
        # What the precise mean itself is off is taken out.
        stored = pair(precise.mean + (off**2 + 1 / 32) ** 0.5 * deviation, precise.var, seen)
        assert stored.beyond_noise() is beyond
