"""Statistics as a value: `using`, `apply`, and adapting to another domain with them."""

import copy
from contextlib import nullcontext

import pytest
import torch
from populations import ESTIMATORS, assert_unchanged, everything, network

from normlab import convert
from normlab.norms import BatchNorm
from normlab.population import Statistics, apply, estimate, using


class TestUsing:
    def population(self, model):
        return estimate(model, [torch.randn(8, 2, 9, 9)], estimator="pooled")

    def test_evaluates_with_the_values_and_restores(self):
        model = network().eval()
        population = self.population(model)
        before = everything(model)
        with using(model, population):
            torch.testing.assert_close(
                model[1].running_mean, population["1"].mean.float(), rtol=0, atol=0
            )
            assert torch.equal(model[5].running_var, population["5"].var.float())
        assert_unchanged(model, before)
        with pytest.raises(KeyError), using(model, population):
            raise KeyError
        assert_unchanged(model, before)

    def test_restores_a_model_that_was_moved_meanwhile(self):
        """Moving a model gives it other tensors than those that were filled."""
        model = network()
        before = everything(model)
        with using(model, self.population(model)):
            model.double().float()
            assert not torch.equal(model[1].running_mean, before[3]["1.running_mean"])
        assert_unchanged(model, before)

    @pytest.mark.parametrize("fails", [True, False])
    @pytest.mark.parametrize(
        "change",
        [
            lambda model: model.double(),
            lambda model: model.load_state_dict(network().double().state_dict(), assign=True),
            lambda model: convert(model, "bn"),
        ],
        ids=["cast", "assigned", "converted"],
    )
    def test_restores_what_was_replaced_meanwhile(self, change, fails):
        model = network()
        model[1].running_mean.add_(0.1)
        before = everything(model)[3]
        with (
            pytest.raises(KeyError) if fails else nullcontext(),
            using(model, self.population(model)),
        ):
            change(model)
            if fails:
                raise KeyError
        for name, value in model.state_dict().items():
            if "running" in name:
                assert torch.equal(value, before[name].to(value.dtype))

    @pytest.mark.parametrize("fails", [True, False])
    def test_a_layer_that_is_gone_is_named(self, fails):
        model = network()
        before = model[1].running_mean.clone()

        def lose():
            with using(model, self.population(model)):
                model[5] = torch.nn.Identity()
                if fails:
                    raise KeyError

        with pytest.raises(KeyError if fails else RuntimeError) as raised:
            lose()
        said = raised.value.__notes__[0] if fails else str(raised.value)
        assert said.startswith("'5' held other population statistics")
        assert torch.equal(model[1].running_mean, before)

    def test_any_name_of_a_shared_layer_will_do(self):
        model = torch.nn.Sequential(BatchNorm(2))
        model.add_module("z", model[0])
        values = Statistics(torch.ones(2).double(), torch.ones(2).double(), 1)
        with using(model, {"z": values}):
            assert (model[0].running_mean == 1).all()
        assert (model[0].running_mean == 0).all()
        with pytest.raises(ValueError, match="'0' and 'z' are one layer"):
            apply(model, {"0": values, "z": values})

    def test_layers_that_are_not_named_stay(self):
        model = network()
        before = copy.deepcopy(model[5].state_dict())
        with using(model, {"1": self.population(model)["1"]}):
            assert all(torch.equal(v, model[5].state_dict()[k]) for k, v in before.items())

    @pytest.mark.parametrize(
        ("name", "channels", "message"),
        [("7", 4, "is called '7'"), ("0", 4, "is called '0'"), ("5", 4, "has 3 channels")],
    )
    def test_refuses_before_any_change(self, name, channels, message):
        model = network()
        before = everything(model)
        values = Statistics(torch.ones(channels).double(), torch.ones(channels).double(), 1)
        population = {"1": Statistics(torch.ones(4).double(), torch.ones(4).double(), 1)}
        with pytest.raises(ValueError, match=message), using(model, {**population, name: values}):
            pass
        assert_unchanged(model, before)


class TestApply:
    def test_it_is_using_for_good(self):
        """P43: a checkpoint written after it holds what an evaluation `using` it has used."""
        model = network().eval()
        population = estimate(model, [torch.randn(8, 2, 9, 9)], estimator="pooled")
        x = torch.randn(4, 2, 9, 9)
        with using(model, population):
            used, output = copy.deepcopy(model.state_dict()), model(x)
        apply(model, population)
        assert all(torch.equal(value, used[name]) for name, value in model.state_dict().items())
        assert torch.equal(model(x), output)
        assert model[1].num_batches_tracked == 0

    def test_layers_that_are_not_named_stay(self):
        model = network()
        population = estimate(model, [torch.randn(8, 2, 9, 9)], estimator="pooled")
        before = copy.deepcopy(model[5].state_dict())
        apply(model, {"1": population["1"]})
        assert all(torch.equal(value, before[k]) for k, value in model[5].state_dict().items())
        assert model[1].running_mean.abs().sum() > 0

    @pytest.mark.parametrize(("name", "message"), [("7", "is called '7'"), ("5", "has 3 channels")])
    def test_refuses_before_any_change(self, name, message):
        model = network()
        before = everything(model)
        values = Statistics(torch.ones(4).double(), torch.ones(4).double(), 1)
        with pytest.raises(ValueError, match=message):
            apply(model, {"1": values, name: values})
        assert_unchanged(model, before)


class Unlabelled(list):
    """A batch of images whose labels must not be read."""

    def __getitem__(self, index):
        assert index == 0, "a label was read"
        return super().__getitem__(index)

    def __iter__(self):
        raise AssertionError("a label was read")


@pytest.mark.parametrize("estimator", ESTIMATORS)
class TestAdaptive:
    """K6: Adaptive BN is an estimate on the target's images."""

    def test_no_label_is_read_and_no_parameter_changes(self, estimator):
        model = network()
        before = everything(model)
        images = torch.randn(12, 2, 9, 9)
        target = [Unlabelled([x, None]) for x in images.split(4)]
        adapted = estimate(model, target, estimator=estimator)
        assert_unchanged(model, before)
        apply(model, adapted)
        for name, value in model.named_parameters():
            assert torch.equal(value, before[3][name])
        with pytest.raises(AssertionError, match="label"):
            target[0][1]

    def test_a_target_that_is_the_source_changes_nothing(self, estimator):
        """K6: then it is the source's own statistics, to the bit."""
        model, x = network(), torch.randn(12, 2, 9, 9)
        apply(model, estimate(model, x.split(4), estimator=estimator))
        before = everything(model)
        apply(model, estimate(model, x.clone().split(4), estimator=estimator))
        assert_unchanged(model, before)

    def test_adapting_again_is_adapting_once_and_leaves_no_memory(self, estimator):
        """P46: adapt(A), adapt(B) is adapt(B)."""
        a, b = torch.randn(8, 2, 9, 9) + 2, torch.randn(8, 2, 9, 9)
        model, fresh = network(), network()
        apply(model, estimate(model, [a], estimator=estimator))
        for _ in range(2):
            apply(model, estimate(model, [b], estimator=estimator))
        apply(fresh, estimate(fresh, [b], estimator=estimator))
        assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in model.state_dict().items())
