import inspect
import subprocess
import sys
from importlib.metadata import EntryPoint, EntryPoints

import pytest
import torch
from torch import nn

from normlab import norms
from normlab.norms import bn

OPTIONS = {
    "ghost": {"nbs": 2},
    "gn": {"groups": 2},
    "ln_elementwise": {"shape": (3, 3)},
    "separate": {"num_domains": 1},
}


def test_names_are_the_layers():
    assert {"bn", "ghost", "gn", "ln", "instance", "none"} <= set(norms.names())
    assert "base" not in norms.names()
    assert norms.names() == sorted(norms.names())


@pytest.mark.parametrize("name", norms.names())
def test_every_layer_follows_the_common_signature(name):
    cls = norms.find(name)
    assert issubclass(cls, nn.Module)
    assert cls.__doc__
    first, *options = inspect.signature(cls).parameters.values()
    assert first.name == "num_features"
    assert all(option.kind is option.KEYWORD_ONLY for option in options)
    assert all(option.annotation is not option.empty for option in options)
    layer = cls(4, **OPTIONS.get(name, {}))
    x = torch.randn(8, 4, 3, 3)
    assert layer(x).shape == x.shape


def test_classes_are_exported():
    assert norms.BatchNorm is bn.BatchNorm
    assert norms.find("bn") is bn.BatchNorm
    with pytest.raises(AttributeError, match="no attribute 'BachNorm'"):
        norms.BachNorm  # noqa: B018
    with pytest.raises(ImportError):
        exec("from normlab.norms import BachNorm")


@pytest.mark.parametrize("name", ["nope", "base", "_grouped", "os", "bn.BatchNorm", ""])
def test_unknown_names_are_refused(name):
    with pytest.raises(ValueError, match=r"no norm .*there are: bn, "):
        norms.find(name)


def test_entry_points_add_layers(monkeypatch):
    installed = EntryPoints(
        [
            EntryPoint("mine", "torch.nn:BatchNorm1d", norms.ENTRY_POINTS),
            EntryPoint("broken", "torch.nn:functional", norms.ENTRY_POINTS),
        ]
    )
    monkeypatch.setattr(norms, "entry_points", lambda **wanted: installed.select(**wanted))
    assert "mine" in norms.names()
    assert norms.find("mine") is nn.BatchNorm1d
    with pytest.raises(ValueError, match="a class is needed"):
        norms.find("broken")


def test_listing_does_not_import_torch():
    code = "import sys, normlab.norms as n; n.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
