"""`population.EmaBank`: running averages with further decays."""

import copy

import pytest
import torch
from oracles.population import ema
from populations import assert_statistics, network
from torch import nn
from torch.utils.checkpoint import checkpoint

from normlab import convert
from normlab.norms import BatchNorm, GhostBatchNorm, normalization, population_layers
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
        for decay in (0.5, 0.99):
            expected, actual = bank.population(decay), resumed.population(decay)
            for name in expected:
                assert torch.equal(actual[name].mean, expected[name].mean)
                assert torch.equal(actual[name].var, expected[name].var)
                assert actual[name].count == expected[name].count

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
