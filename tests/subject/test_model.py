"""Models by name, and code of the user's own."""

import sys

import pytest
import torch
import torchvision

from normlab.subject import load_model
from normlab.subject.code import named

MINE = """
from dataclasses import dataclass
from torch import nn
from parts_of_mine import layer

@dataclass
class Settings:
    width: int = 2

def make_model(width=2, bias=True, name="plain", sizes=()):
    assert isinstance(width, int) and isinstance(name, str) and isinstance(sizes, tuple)
    if width < 0:
        raise RuntimeError("a negative width\\nand more")
    return nn.Sequential(layer(width, bias), nn.BatchNorm1d(width))

def make_nothing():
    return 3
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "parts_of_mine.py").write_text(
        "from torch import nn\ndef layer(width, bias): return nn.Linear(2, width, bias=bias)\n"
    )
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    yield file
    sys.modules.pop("parts_of_mine", None)
    sys.modules.pop("mine", None)


@pytest.fixture
def offline(monkeypatch):
    def download(*_, **__):
        raise AssertionError("nothing is downloaded unasked")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", download)
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", download)


@pytest.mark.usefixtures("offline")
def test_torchvisions_models_come_without_weights():
    model = load_model("torchvision:mobilenet_v3_small", {"num_classes": "7"})
    assert model.classifier[-1].out_features == 7
    # its backbone's weights would be downloaded by default
    assert load_model("torchvision:lraspp_mobilenet_v3_large").backbone
    with pytest.raises(ValueError, match="nothing is downloaded unasked"):
        load_model("torchvision:mobilenet_v3_small", {"weights": "DEFAULT"})


def test_timms_models_come_without_weights():
    pytest.importorskip("timm")
    model = load_model("timm:mobilenetv3_small_050", {"num_classes": "7"})
    assert model.classifier.out_features == 7


def test_a_users_function_gets_its_options_as_literals(mine):
    spec = f"{mine}:make_model"
    options = {"width": "5", "bias": "False", "name": "wide", "sizes": "(3, 4)"}
    model = load_model(spec, options)
    assert (model[0].out_features, model[0].bias) == (5, None)
    assert named(spec) is named(spec)  # the file has run once


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("resnet18", {}, "a model is torchvision:NAME, timm:NAME or path/to/file.py:FUNCTION"),
        ("torchvision:resnet19", {}, "torchvision has no model 'resnet19'; did you mean"),
        ("timm:resnet19d", {}, "timm has no model 'resnet19d'; did you mean"),
        ("torchvision:resnet18", {"classes": "7"}, "resnet18 failed: TypeError: .*'classes'"),
        ("HERE/none.py:make_model", {}, "there is no file .*none.py"),
        ("HERE/mine.py:make_modl", {}, "has no function 'make_modl'; did you mean 'make_model'"),
        ("HERE/mine.py:make_nothing", {}, "returned a int, not a torch.nn.Module"),
        ("HERE/mine.py:make_model", {"width": "-1"},
         r"make_model failed at .*mine\.py:13: RuntimeError: a negative width$"),
        ("HERE/broken.py:make_model", {}, r"broken\.py failed.*: ModuleNotFoundError"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_is_refused_in_a_line(mine, spec, options, said):
    (mine.parent / "broken.py").write_text("import there_is_no_such_module\n")
    with pytest.raises(ValueError, match=said) as refused:
        load_model(spec.replace("HERE", str(mine.parent)), options)
    assert len(str(refused.value).splitlines()) == 1
