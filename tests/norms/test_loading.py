"""P15, P55: state_dicts of torch, of older versions and of other libraries load strictly."""

import copy

import pytest
import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from .zoo import FAMILY, data, make


def trained(old):
    """A torch layer of 6 channels with a state of its own, and no counter where it is `old`."""
    layer = FrozenBatchNorm2d(6) if old == "frozen" else nn.BatchNorm2d(6)
    for seed, value in enumerate(v for v in layer.state_dict().values() if v.is_floating_point()):
        value.copy_(data(seed, value.shape).abs() + 0.5)
    state = layer.state_dict()
    if old:
        state.pop("num_batches_tracked", None)
    if old == "torch 0.4.0":
        state._metadata[""]["version"] = 1
    elif old == "values alone":
        state = dict(state)
    elif old == "detectron2":
        state._metadata[""]["version"] = 3  # of its frozen layer
    return state


OLD = ["torch 0.4.0", "values alone", "frozen", "detectron2"]


@pytest.mark.parametrize("old", [None, *OLD])
@pytest.mark.parametrize("variant", FAMILY)
def test_a_state_without_a_counter_loads(variant, old):
    layer, state = make(variant), trained(old)
    layer.num_batches_tracked.fill_(5)
    model, given = nn.Sequential(nn.ReLU(), layer), dict(state)
    state_of_model = {f"1.{name}": value for name, value in state.items()}
    if hasattr(state, "_metadata"):
        state_of_model = type(state)(state_of_model)
        state_of_model._metadata = {"": {"version": 1}, "1": state._metadata[""]}
    model.load_state_dict(state_of_model, strict=True)
    for name, value in given.items():
        expected = value.expand(layer.state_dict()[name].shape)
        assert torch.equal(layer.state_dict()[name], expected), name
    assert (layer.num_batches_tracked == (5 if old else 0)).all()
    assert len(state) == len(given)  # the caller's dictionary is as it was


@pytest.mark.parametrize("variant", FAMILY)
def test_what_is_missing_else_is_told(variant):
    """A state of today's layers without the counter is incomplete, to torch too."""
    layer = make(variant)
    for kind, name in (
        (None, "num_batches_tracked"), ("values alone", "running_var"), ("frozen", "running_mean")
    ):  # fmt: skip
        state = trained(kind)
        state.pop(name)
        with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
            layer.load_state_dict(state, strict=True)


@pytest.mark.parametrize("variant", FAMILY)
def test_ours_loads_into_torchs(variant):
    layer = make(variant)
    state = copy.deepcopy(layer.state_dict())
    assert state._metadata[""]["version"] == nn.BatchNorm2d(6).state_dict()._metadata[""]["version"]
    nn.BatchNorm2d(6).load_state_dict(state, strict=True)


@pytest.mark.parametrize("variant", FAMILY)
def test_a_layer_without_memory_gets_all_of_an_old_state(variant):
    layer = make(variant).to("meta")
    layer.load_state_dict(trained("values alone"), strict=True, assign=True)
    assert not layer.num_batches_tracked.is_meta
    assert (layer.num_batches_tracked == 0).all()
    assert layer.running_var.shape == (6,)
