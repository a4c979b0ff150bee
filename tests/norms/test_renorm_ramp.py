"""The limits of batch renorm's correction, as they grow over a training."""

import copy
import math

import pytest
import torch

from normlab import build
from normlab.config import compose
from normlab.norms import BatchNorm, BatchRenorm
from normlab.norms.base import normalization, population_layers

from .test_renorm import FREE, NOW, moved


class TestRamp:
    def test_defaults_are_the_papers(self):
        """Ioffe 2017: batch norm for 5k steps, r_max 3 at 40k, d_max 5 at 25k."""
        layer = BatchRenorm(3)
        expected = {
            0: (1, 0), 5_000: (1, 0), 15_000: (1 + 2 * 10 / 35, 2.5), 25_000: (1 + 2 * 20 / 35, 5),
            40_000: (3, 5), 100_000: (3, 5),
        }  # fmt: skip
        for n, limits in expected.items():
            assert layer.limits(n) == pytest.approx(limits)

    @pytest.mark.parametrize("options", [{}, NOW, FREE, {"r_max": math.inf, "d_end": 0.04}])
    def test_numbers_and_tensors_agree(self, options):
        """A GPU computes the limits without being waited for."""
        layer = BatchRenorm(3, forwards=100, **options)
        for n in (0, 3, 4, 5, 17, 20, 21, 32, 33, 1000):
            on_device = [float(v) for v in layer.limits(torch.tensor(n))]
            assert on_device == pytest.approx(layer.limits(n))

    def test_counts_the_forwards_that_update(self):
        """Every micro-batch counts; evaluations and forwards without update do not."""
        x = torch.randn(8, 3, 4, 4) * 2 + 1
        layer = moved(BatchRenorm(3, forwards=4, start=0.5, r_end=0.75, d_end=0.75))
        plain = BatchNorm(3)
        layer.eval()(x)
        layer.train()
        with normalization(layer, update=False):
            layer(x)
        for corrected in (False, False, False, True):
            assert torch.allclose(layer(x), plain(x), atol=1e-5) is not corrected
        assert layer.num_batches_tracked == 4

    def test_goes_on_from_a_checkpoint(self):
        torch.manual_seed(0)
        steps = torch.randn(10, 8, 3, 4, 4)
        options = {"forwards": 10, "start": 0.2, "r_end": 0.8, "d_end": 0.6, "nbs": 4}
        whole, first, second = (BatchRenorm(3, **options) for _ in range(3))
        expected = [whole(x) for x in steps]
        for x in steps[:5]:
            first(x)
        second.load_state_dict(first.state_dict())
        for x, y in zip(steps[5:], expected[5:], strict=True):
            assert torch.equal(second(x), y)


def test_a_ramp_compiles_without_graph_breaks():
    """P73: limits that move do not form the graph anew."""
    torch.manual_seed(0)
    layer = moved(BatchRenorm(3, nbs=4, forwards=4, start=0, r_end=0.5, d_end=0.5))
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        x = torch.randn(8, 3, 4, 4)
        torch.testing.assert_close(compiled(x), twin(x))
    torch.testing.assert_close(layer.running_var, twin.running_var)
    assert layer.num_batches_tracked == 3


def test_a_run_fills_in_its_own_number_of_forwards():
    """Accumulated micro-batches count each: the ramp is a share of the whole training."""
    sizes = ["norm=renorm", "data=digits", "model=tiny", "batch_size=64", "nbs=8", "epochs=3"]
    config = compose([*sizes, "micro_batch=16"])
    dataset = build.data(config)
    layers = population_layers(build.model(config, dataset)).values()
    assert {layer.forwards for layer in layers} == {3 * (dataset.size("train") // 64) * 4}
    with pytest.raises(ValueError, match=r"norm\.forwards: norm=renorm has no such option"):
        build.norm(compose([*sizes, "+norm.forwards=7"]), dataset)
