"""`population.EmaBank`: running averages with further decays."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from oracles.population import ema, ema_weights
from populations import assert_statistics, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab import convert
from normlab.norms import (
    BatchNorm,
    GhostBatchNorm,
    SeparateBatchNorm,
    domains,
    normalization,
    population_layers,
)
from normlab.population import EmaBank, estimate


def train(model, batches, optimizer=None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1) if optimizer is None else optimizer
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


class TestEmaBank:
    def test_closed_form(self):
        """P2: decay is the share that stays, torch's 1 - momentum."""
        x = torch.randn(5, 8, 3, dtype=torch.float64)
        layer = BatchNorm(3).double()
        bank = EmaBank(layer, [0.5, 0.99])
        for batch in x:
            layer(batch)
        for decay in (0.5, 0.99):
            mean, var = ema(0, x.mean(1), decay), ema(1, x.var(1), decay)
            assert_statistics(bank.population(decay)[""], mean, var, rtol=1e-10)
        assert bank.population(0.5)[""].count == 40

    @pytest.mark.parametrize("rule", ["mean", "pooled", "first", "sequential"])
    @pytest.mark.parametrize("decay", [0.9, 0.6])
    def test_the_layers_own_decay_gives_their_buffers(self, rule, decay):
        model = nn.Sequential(
            nn.Conv2d(2, 4, 3),
            BatchNorm(4, decay=decay),
            nn.ReLU(),
            GhostBatchNorm(4, nbs=2, population=rule, decay=decay),
        )
        bank = EmaBank(model, [decay])
        train(model, torch.randn(6, 8, 2, 7, 7))
        population = bank.population(decay)
        assert list(population) == ["1", "3"]
        for name in population:
            layer = model.get_submodule(name)
            assert_statistics(
                population[name],
                layer.running_mean.numpy(),
                layer.running_var.numpy(),
                rtol=1e-5,
                atol=1e-6,
            )

    def test_watching_changes_no_bit_of_the_training(self):
        batches = torch.randn(4, 8, 2, 9, 9)
        watched, alone = network(), network()
        EmaBank(watched, [0.5, 0.9])
        for model in (watched, alone):
            torch.manual_seed(7)
            train(model, batches)
        assert all(
            torch.equal(value, alone.state_dict()[name])
            for name, value in watched.state_dict().items()
        )

    def test_recomputed_activations_are_not_followed_twice(self):
        """P18"""
        batches = torch.randn(3, 8, 2, 9, 9)
        populations = []
        for recompute in (False, True):
            model = network()
            bank = EmaBank(model, [0.9])
            for x in batches:
                y = checkpoint(model, x, use_reentrant=False) if recompute else model(x)
                y.square().mean().backward()
            populations.append(bank.population(0.9))
        once, twice = populations
        for name in once:
            assert torch.equal(once[name].mean, twice[name].mean)
            assert once[name].count == twice[name].count

    def test_follows_training_only(self):
        """P53: neither an evaluation nor an estimate moves an average."""
        model = network()
        bank = EmaBank(model, [0.9])
        estimate(model, [torch.randn(8, 2, 9, 9)], estimator="pooled")
        assert bank.population(0.9) == {}
        model.eval()
        for layer in (model[1], model[5]):
            layer.statistics = "batch"
        model(torch.randn(8, 2, 9, 9))
        assert bank.population(0.9) == {}

    def test_a_layer_that_is_frozen_keeps_its_constants(self):
        """P44: an evaluation with the averages must not put others in their place."""
        model = network()
        bank = EmaBank(model, [0.9])
        train(model, torch.randn(2, 8, 2, 9, 9))
        assert list(bank.population(0.9)) == ["1", "5"]
        model[1].statistics = "population"
        assert list(bank.population(0.9)) == ["5"]

    def test_follows_the_layer_that_convert_put_there(self):
        """Its mode, not that of the one before: an evaluation with batch statistics is no step."""
        model = network()
        bank = EmaBank(model, [0.9])
        convert(model, "ghost", nbs=4, population="pooled", decay=0.9)
        train(model, torch.randn(2, 8, 2, 9, 9))
        followed = bank.population(0.9)
        for name in ("1", "5"):
            buffer = model.get_submodule(name).running_var.double()
            torch.testing.assert_close(followed[name].var, buffer, rtol=1e-5, atol=1e-6)
        model.eval()
        with normalization(model, statistics="batch"):
            model(torch.randn(8, 2, 9, 9))
        assert torch.equal(bank.population(0.9)["1"].var, followed["1"].var)
        bank.detach()
        assert all(layer.observers == [] for layer in population_layers(model).values())
        convert(model, "gn", groups=1, lossy=True)
        with pytest.raises(ValueError, match="1 no longer is the batch norm that it was"):
            bank.population(0.9)

    def test_resumed_equals_uninterrupted(self, tmp_path):
        batches = torch.randn(6, 8, 2, 9, 9)
        model = network()
        model[3].p = 0
        bank = EmaBank(model, [0.5, 0.99])
        train(model, batches)

        first = network()
        first[3].p = 0
        half = EmaBank(first, [0.5, 0.99])
        train(first, batches[:3])
        state = {"model": copy.deepcopy(first.state_dict()), "bank": half.state_dict()}
        train(first, batches[3:])  # a state is a value: it must not follow
        torch.save(state, tmp_path / "c.pt")
        saved = torch.load(tmp_path / "c.pt", weights_only=True)
        second = network()
        second[3].p = 0
        second.load_state_dict(saved["model"])
        resumed = EmaBank(second, [0.5, 0.99])
        resumed.load_state_dict(saved["bank"])
        train(second, batches[3:])
        for decay, corrected in product((0.5, 0.99), (False, True)):
            expected = bank.population(decay, corrected=corrected)
            actual = resumed.population(decay, corrected=corrected)
            assert list(expected) == ["1", "5"]
            for name in expected:
                assert torch.equal(actual[name].mean, expected[name].mean)
                assert torch.equal(actual[name].var, expected[name].var)
                assert actual[name].count == expected[name].count

    def test_a_state_that_cannot_be_corrected_is_refused(self):
        """That of a version before averages were corrected."""
        bank = EmaBank(BatchNorm(3), [0.9])
        older = bank.state_dict()
        for values in older["layers"].values():
            del values["left"], values["initial"]
        with pytest.raises(ValueError, match=r"older version.*: train the run anew") as said:
            bank.load_state_dict(older)
        assert "\n" not in str(said.value)

    def test_a_population_is_a_value(self):
        """P43: what was taken for an evaluation does not move on with the training."""
        layer = BatchNorm(3)
        bank = EmaBank(layer, [0.9])
        layer(torch.randn(8, 3))
        taken = bank.population(0.9)[""]
        before = taken.mean.clone()
        layer(torch.randn(8, 3))
        assert torch.equal(taken.mean, before)

    def test_detach_stops_watching(self):
        layer = BatchNorm(3)
        other = [].append
        layer.observers.append(other)
        bank = EmaBank(layer, [0.9])
        layer(torch.randn(8, 3))
        before = bank.population(0.9)[""].mean
        bank.detach()
        bank.detach()
        layer(torch.randn(8, 3))
        assert torch.equal(bank.population(0.9)[""].mean, before)
        assert layer.observers == [other]

    def test_a_copied_model_is_not_followed(self):
        model = network()
        bank = EmaBank(model, [0.9])
        copied = copy.deepcopy(model)
        assert all(layer.observers == [] for layer in population_layers(copied).values())
        train(copied, torch.randn(2, 8, 2, 9, 9))
        copy.copy(next(iter(population_layers(model).values()))).train()(torch.randn(8, 4, 9, 9))
        assert bank.population(0.9) == {}

    @pytest.mark.parametrize("decays", [[1.0], [0.9, -0.1], [1.5], [float("nan")], [0.9, 0.9]])
    def test_bad_decays_are_refused_and_nothing_watches(self, decays):
        layer = BatchNorm(3)
        with pytest.raises(ValueError, match="ema_bank"):
            EmaBank(layer, decays)
        assert layer.observers == []

    def test_an_unknown_decay_is_refused(self):
        with pytest.raises(ValueError, match=r"decays \[0\.9\], not 0\.5"):
            EmaBank(BatchNorm(3), [0.9]).population(0.5)

    def test_another_bank_s_state_is_refused(self):
        bank = EmaBank(network(), [0.9])
        with pytest.raises(ValueError, match="decays"):
            bank.load_state_dict(EmaBank(network(), [0.8]).state_dict())
        wider = network()
        wider[5] = BatchNorm(4)
        for other in (BatchNorm(4), wider):
            with pytest.raises(ValueError, match="other layers"):
                bank.load_state_dict(EmaBank(other, [0.9]).state_dict())


DECAYS = [0.0, 0.5, 0.9, 0.999]
"""The layers' own, 0.9, among them."""


def started(layer):
    """In float64, from other statistics than 0 and 1."""
    layer = layer.double()
    with torch.no_grad():
        layer.running_mean.uniform_(2, 3)
        layer.running_var.uniform_(4, 5)
    return layer


def assert_corrected(bank, name, means, variances):
    """Against sum_t (1 - d) d^(T - t) b_t / (1 - d^T) of the updates b_1 .. b_T."""
    for decay in DECAYS:
        weights = ema_weights(decay, len(means))[1:] / (1 - decay ** len(means))
        expected = (np.tensordot(weights, values, 1) for values in (means, variances))
        assert_statistics(bank.population(decay, corrected=True)[name], *expected, rtol=1e-11)


class TestCorrected:
    """Without the initial value, an average holds the batches alone (K5)."""

    def test_closed_form(self):
        layer = started(BatchNorm(3))
        bank = EmaBank(layer, DECAYS)
        x = torch.randn(7, 8, 3, dtype=torch.float64)
        for batch in x:
            layer(batch)
        assert_corrected(bank, "", x.mean(1).numpy(), x.var(1).numpy())
        last = bank.population(0.0)[""]
        assert torch.equal(bank.population(0.0, corrected=True)[""].var, last.var)

    def test_closed_form_of_chunks(self):
        layer = started(GhostBatchNorm(3, nbs=4))
        bank = EmaBank(layer, DECAYS)
        x = torch.randn(5, 2, 4, 3, dtype=torch.float64)
        for batch in x:
            layer(batch.flatten(0, 1))
        assert_corrected(bank, "", x.mean((1, 2)).numpy(), x.var(2).mean(1).numpy())

    def test_closed_form_of_domains_that_come_and_go(self):
        """Each has had updates of its own, and one none at all."""
        layer = started(SeparateBatchNorm(3, num_domains=3))
        bank = EmaBank(layer, DECAYS)
        seen = {0: [], 1: []}
        for present in ([0], [0, 1], [0], [1], [0, 1], [0]):
            x = torch.randn(len(present), 4, 3, dtype=torch.float64)
            with domains(layer, torch.tensor(present).repeat_interleave(4)):
                layer(x.flatten(0, 1))
            for domain, part in zip(present, x, strict=True):
                seen[domain].append(part)
        assert [len(parts) for parts in seen.values()] == [5, 3]
        for domain, parts in seen.items():
            x = torch.stack(parts)
            assert_corrected(bank, f"[{domain}]", x.mean(1).numpy(), x.var(1).numpy())
        assert "[2]" not in bank.population(0.5, corrected=True)

    @pytest.mark.parametrize("rule", ["mean", "pooled", "first", "sequential"])
    def test_by_every_rule_nothing_is_left_of_the_start(self, rule):
        """Also where an update keeps more of an average than its decay."""
        layer = GhostBatchNorm(3, nbs=2, population=rule).double()
        banks = []
        for _ in range(2):
            started(layer)
            banks.append(EmaBank(layer, DECAYS))
        batches = torch.randn(3, 8, 3, dtype=torch.float64)
        for x in batches:
            layer(x)
        for decay in DECAYS:
            one, other = (bank.population(decay, corrected=True)[""] for bank in banks)
            assert_statistics(one, other.mean, other.var, rtol=1e-11)
        equal = EmaBank(started(layer), [0.9])
        for _ in range(3):
            layer(batches[0])
        mean = equal.population(0.9, corrected=True)[""].mean
        wanted = batches[0][:2] if rule == "first" else batches[0]
        if rule != "sequential":  # which weighs the chunks of a batch unequally
            np.testing.assert_allclose(mean, wanted.mean(0), rtol=1e-11)

    def test_the_layers_own_decay_gives_their_corrected_buffers(self):
        layer = started(BatchNorm(3))
        start = layer.running_mean.clone()
        bank = EmaBank(layer, [0.9])
        for x in torch.randn(4, 8, 3, dtype=torch.float64):
            layer(x)
        expected = (layer.running_mean - 0.9**4 * start) / (1 - 0.9**4)
        mean = bank.population(0.9, corrected=True)[""].mean
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=0)

    def test_a_variance_of_nothing_is_not_below_zero(self):
        """A channel that is constant: r_T is d^T r_0 up to rounding, on either side."""
        layer = BatchNorm(99).double()
        with torch.no_grad():
            layer.running_var.copy_(torch.arange(1, 100) / 7)
        bank = EmaBank(layer, [0.9])
        for _ in range(20):
            layer(torch.ones(4, 99, dtype=torch.float64))
        var = bank.population(0.9, corrected=True)[""].var
        assert 0 <= var.min() <= var.max() < 1e-14


def averaged_over_ranks(rank):
    """The bank of a rank that has had as many updates more as its number says, before and after."""
    torch.manual_seed(rank)
    layer = BatchNorm(3).double()
    with torch.no_grad():
        layer.running_mean.fill_(5.0)
    bank = EmaBank(layer, [0.9])
    for x in torch.randn(1 + rank, 8, 3, dtype=torch.float64):
        layer(x)
    own = bank.population(0.9)[""].mean
    bank.average("mean")
    return own, bank.population(0.9, corrected=True)[""].mean


def test_an_average_over_ranks_is_corrected_by_what_is_left_in_all(ranks):
    """Ranks that have had different numbers of updates, of different domains say."""
    found = ranks.run(averaged_over_ranks)
    left = sum(0.9**updates for updates in (1, 2, 3, 4)) / 4
    expected = (sum(own for own, _ in found) / 4 - left * 5) / (1 - left)
    for _, corrected in found:
        torch.testing.assert_close(corrected, expected, rtol=1e-12, atol=1e-14)
