"""The populations of a separate batch norm: checkpoints, estimates, observers, the four choices."""

import copy
from itertools import product

import pytest
import torch
from torch import nn

from normlab.norms import BatchNorm, domains, normalization
from normlab.population import EmaBank, estimate, using

from .inputs import random_affine
from .test_separate import LABELS, SWITCHES, same, separate, state


class TestStateDict:
    @pytest.mark.parametrize("switches", SWITCHES)
    def test_a_batch_norm_fills_every_domain(self, switches):
        """P15: any batch norm's checkpoint loads, strictly."""
        torch.manual_seed(0)
        plain = nn.BatchNorm2d(3)
        random_affine(plain)
        plain(torch.randn(8, 3, 2, 2))
        layer, stored = separate(3, 2, switches), plain.state_dict()
        before = copy.deepcopy(stored)
        layer.load_state_dict(stored, strict=True)
        assert all(torch.equal(stored[k], before[k]) for k in before)
        x = torch.randn(4, 3, 2, 2)
        with domains(layer.eval(), [0, 1, 1, 0]):
            torch.testing.assert_close(layer(x), plain.eval()(x))
        with torch.no_grad():  # no two domains share memory
            layer.running_mean.view(-1)[0] += 1
        assert (layer.running_mean.view(-1)[1:] == before["running_mean"].repeat(2)[1:6][
            : layer.running_mean.numel() - 1]).all()  # fmt: skip

    @pytest.mark.parametrize("switches", SWITCHES)
    def test_round_trip(self, switches):
        layer, other = separate(3, 3, switches), separate(3, 3, switches)
        with domains(layer, LABELS):
            layer(torch.randn(8, 3, 2))
        other.load_state_dict(layer.state_dict(), strict=True)
        assert same(state(layer), state(other))

    def test_shared_ones_have_torch_s_layout(self):
        shapes = {k: v.shape for k, v in nn.BatchNorm2d(3).state_dict().items()}
        layer = separate(3, 2, (False, True, True))
        assert {k: v.shape for k, v in layer.state_dict().items()} == shapes
        specific = {
            k: v.shape for k, v in separate(3, 2, (True, False, False)).state_dict().items()
        }
        assert specific == {name: (2, *shape) for name, shape in shapes.items()}

    def test_domains_do_not_load_into_one(self):
        with pytest.raises(RuntimeError, match="running_mean"):
            BatchNorm(3).load_state_dict(separate(3).state_dict())
        with pytest.raises(RuntimeError, match="running_mean"):
            separate(3, 2).load_state_dict(separate(3, 3).state_dict())


class TestPopulation:
    def batches(self):
        generator = torch.Generator().manual_seed(1)
        for labels in ([0, 0, 2, 2], [2, 0, 2, 0], [2, 2, 2, 2]):
            labels = torch.tensor(labels)
            noise = torch.randn(4, 3, 5, generator=generator, dtype=torch.float64)
            yield noise * 2 + labels[:, None, None] * 7, labels

    @staticmethod
    def forward(model, batch):
        with domains(model, batch[1]):
            return model(batch[0])

    @pytest.mark.parametrize("shared_statistics", [False, True])
    def test_estimate_is_per_domain(self, shared_statistics):
        """P57: each domain's population is that of its samples; an unseen domain has none."""
        model = nn.Sequential(separate(3, 3, (shared_statistics, False, True)).double())
        before = state(model)
        found = estimate(model, self.batches(), estimator="pooled", forward=self.forward)
        assert found.keys() == {"0[0]", "0[2]"}
        x, labels = (torch.cat(parts) for parts in zip(*self.batches(), strict=True))
        for d in (0, 2):
            mine = x[labels == d]
            assert found[f"0[{d}]"].count == mine.numel() // 3
            torch.testing.assert_close(found[f"0[{d}]"].mean, mine.mean((0, 2)))
            torch.testing.assert_close(found[f"0[{d}]"].var, mine.var((0, 2), correction=0))
        assert same(state(model), before)
        with using(model, found):
            assert torch.equal(model[0].running_var[2], found["0[2]"].var)
            assert torch.equal(model[0].running_mean[1], before["0.running_mean"][1])
        assert same(state(model), before)

    def test_estimate_of_a_shared_population_pools_the_domains(self):
        model = nn.Sequential(separate(3, 3, (False, True, True)).double())
        found = estimate(model, self.batches(), estimator="pooled", forward=self.forward)
        x = torch.cat([batch for batch, _ in self.batches()])
        assert found.keys() == {"0"}
        torch.testing.assert_close(found["0"].mean, x.mean((0, 2)))
        torch.testing.assert_close(found["0"].var, x.var((0, 2), correction=0))

    def test_layerwise_is_refused(self):
        model = nn.Sequential(separate(3, 3))
        with pytest.raises(ValueError, match=r"layerwise: .*0.* has several populations"):
            estimate(model, list(self.batches()), estimator="layerwise", forward=self.forward)

    @pytest.mark.parametrize("switches", [s for s in SWITCHES if s[2]])
    def test_a_bank_with_the_layer_s_decay_follows_its_buffers(self, switches):
        model = nn.Sequential(separate(3, 3, switches).double())
        bank = EmaBank(model, [0.9, 0.5])
        for batch in self.batches():
            self.forward(model, batch)
        found = bank.population(0.9)
        named = {f"0{key}": row for key, row in model[0].populations().items()}
        assert found.keys() == ({"0"} if switches[1] else {"0[0]", "0[2]"})
        for name, values in found.items():
            torch.testing.assert_close(values.mean, named[name][0])
            torch.testing.assert_close(values.var, named[name][1])
        other = EmaBank(model, [0.9, 0.5])
        other.load_state_dict(bank.state_dict())
        assert torch.equal(other.population(0.5)[name].mean, bank.population(0.5)[name].mean)


class TestChoices:
    @pytest.mark.parametrize("switches", SWITCHES)
    def test_the_four_choices(self, switches):
        """P50: every legal combination runs a step, the illegal one is refused by name."""
        sources, updates = (None, "batch", "population"), (None, False, True)
        for source, update, training in product(sources, updates, (True, False)):
            layer = separate(3, 3, switches).train(training)
            layer.statistics, layer.update = source, update
            uses_batch = source == "batch" or (source is None and training)
            asked = f"{source=} {update=} {training=}"
            before = state(layer)
            x = torch.randn(8, 3, 2)
            with domains(layer, LABELS):
                if update and not uses_batch:
                    with pytest.raises(ValueError, match="update=True needs statistics='batch'"):
                        layer(x)
                    assert same(state(layer), before), asked
                    continue
                layer(x).sum().backward()
            moved = uses_batch and (training if update is None else update)
            assert same(state(layer), before) != moved, asked

    def test_group_size_is_of_the_batch_and_each_domain_in_it(self):
        torch.manual_seed(0)
        layer = separate(3).double()
        x = torch.randn(8, 3, 4, dtype=torch.float64)
        with domains(layer, LABELS), normalization(layer, group_size=4, update=False):
            y = layer(x)
        for rows in ([0, 2, 3], [1], [4, 6], [5, 7]):
            expected = BatchNorm(3).double()(x[rows])
            torch.testing.assert_close(y[rows], expected)
        layer.group_size = 3
        with pytest.raises(ValueError, match="group_size=3"), domains(layer, LABELS):
            layer(x)


@pytest.mark.parametrize("update", [True, False])
def test_observers_get_what_a_batch_norm_s_would(update):
    """To the bit, by the route that updates and the one that does not; variances below eps."""
    torch.manual_seed(0)
    layer, plain, x = separate(3), BatchNorm(3), torch.randn(8, 3, 4, 4) * 1e-4
    seen = {}
    for norm in (layer, plain):
        norm.update, seen[norm] = update, []
        norm.observers.append(seen[norm].append)
    with domains(layer, LABELS):
        layer(x)
    for d in (0, 2):
        plain(x[torch.tensor(LABELS) == d])
    assert [batch.population for batch in seen[layer]] == ["[0]", "[2]"]
    for one, other in zip(seen[layer], seen[plain], strict=True):
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.var, other.var)
        assert one.count == other.count
