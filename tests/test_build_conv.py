"""From a config: convolutions, initializations, and the groups of the optimizer they need."""

import pytest
import torch
from torch import nn

from normlab import build
from normlab.config import cell_key, compose, options, run_id, with_later_keys
from normlab.norms import (
    CenteredWeightNormConv2d,
    WeightNormConv2d,
    WeightStandardizedConv2d,
    conv,
)


def built(*overrides: str) -> tuple[nn.Module, dict]:
    config = compose(["device=cpu", *overrides])
    return build.model(config, build.data(config)), config


# -- conv -----------------------------------------------------------------------------------------

KINDS = {
    "ws": WeightStandardizedConv2d, "wn": WeightNormConv2d, "cwn": CenteredWeightNormConv2d
}  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("model", ["tiny", "resnet8"])
def test_every_convolution_is_replaced_and_keeps_its_weight(model: str, name: str) -> None:
    plain, _ = built(f"model={model}", "norm=gn")
    other, _ = built(f"model={model}", "norm=gn", f"conv={name}")
    convolutions = [m for m in other.modules() if isinstance(m, nn.Conv2d)]
    assert {type(m) for m in convolutions} == {KINDS[name]}
    own = other.state_dict()
    for key, value in plain.state_dict().items():
        assert torch.equal(own.pop(key), value)
    assert all(key.endswith("weight_g") for key in own)
    x = torch.randn(2, 1, 8, 8)
    assert torch.allclose(plain(x), other(x), atol=1e-5) is (name == "wn")


def test_every_convolution_can_be_chosen() -> None:
    assert set(options("conv")) == {"plain", *conv.names()}


def test_the_convolutions_options() -> None:
    model, _ = built("conv=ws", "conv.convention=official")
    assert (model[0].convention, model[0].eps) == ("official", 1e-5)
    model, _ = built("conv=ws", "conv.eps=1e-3")
    assert (model[0].convention, model[0].eps) == ("timm", 1e-3)
    with pytest.raises(ValueError, match=r"conv\.convention='keras': conv=ws wants one of timm"):
        built("conv=ws", "conv.convention=keras")
    with pytest.raises(ValueError, match=r"conv\.stride: conv=wn has no such option"):
        built("conv=wn", "+conv.stride=2")


def known_as(*overrides: str) -> str:
    return run_id(compose(overrides), device="cpu", data_digest="0123abcd", kernels=False)


def test_conv_and_init_are_in_the_id_where_they_are_not_the_default() -> None:
    assert known_as("conv=plain", "init=default") == known_as()
    assert known_as("norm=gn", "conv=ws").startswith("tiny-gn-ws-s0-")
    assert known_as("norm=none", "init=fixup", "model=resnet8").startswith("resnet8-none-fixup-s0-")
    assert known_as("nbs=16", "conv=wn").startswith("tiny-bn-wn-nbs16-s0-")
    ids = {known_as("conv=ws", *more) for more in ([], ["conv.convention=official"])}
    assert len({*ids, known_as("conv=wn"), known_as()}) == 4


def test_a_record_from_before_conv_and_init_is_one_with_their_defaults() -> None:
    old = compose()
    del old["conv"], old["init"]
    completed = with_later_keys(old)
    assert completed == compose()
    assert cell_key(completed) == cell_key(old)
    completed["conv"]["name"] = "ws"
    assert with_later_keys(old)["conv"] == {"name": "plain"}


# -- init -----------------------------------------------------------------------------------------


def test_fixup_learns_scalars_at_a_tenth_of_the_rate() -> None:
    model, config = built("model=resnet8", "norm=none", "init=fixup")
    optimizer = build.optimizer(config, model)
    names = {id(p): name for name, p in model.named_parameters()}
    slow = {
        names[id(p)]
        for group in optimizer.param_groups
        if group.get("lr_factor", 1.0) == 0.1
        for p in group["params"]
    }
    assert slow == {n for n in names.values() if n.endswith(("bias", "scale"))}
    assert {"fc.bias", "bias2.bias", "layer1.0.scale.scale"} <= slow
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(names)  # each once


def test_without_fixup_the_optimizer_has_the_two_groups_it_had() -> None:
    model, config = built("conv=wn")
    one, two = build.optimizer(config, model).param_groups
    assert one["weight_decay"] > 0 == two["weight_decay"]
    assert "lr_factor" not in {*one, *two}
    kept = {id(p) for p in two["params"]}
    names = {n for n, p in model.named_parameters() if id(p) in kept}
    decays = {name for name, _ in model.named_parameters()} - names
    # weight_g is a gamma (recipe.decay_norm); 11 is the classifier
    assert decays == {"0.weight", "3.weight", "6.weight", "11.weight"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("model=tiny norm=none", "init=fixup: model=tiny has no such .*module cifar_resnet have"),
        ("model=resnet8 norm=gn", "init=fixup .* needs norm=none, not norm=gn"),
        ("model=resnet8", "init=fixup .* needs norm=none, not norm=bn"),
        ("model=resnet8 norm=none conv=ws", "init=fixup .* needs conv=plain"),
        ("model=resnet8 norm=none model.conv_bias=true", r"model\.conv_bias=true: init=fixup has"),
    ],
)
def test_what_does_not_go_with_fixup_is_refused_by_name(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built("init=fixup", *overrides.split())


def test_init_is_no_option_of_the_model() -> None:
    with pytest.raises(ValueError, match=r"model\.init: model=resnet8 has no such option"):
        built("model=resnet8", "+model.init=fixup")
