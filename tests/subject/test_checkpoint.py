"""Checkpoints as people have them: the state is found in them, and all else is kept."""

import os
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from torch import nn

from normlab.subject import Checkpoint

safetensors = pytest.importorskip("safetensors.torch")


def network(width=3):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width), nn.Linear(width, 2))


def state():
    return network().state_dict()


def sgd():
    return torch.optim.SGD(network().parameters(), 0.1, momentum=0.9).state_dict()


def beneath(prefix, tensors):
    return OrderedDict((prefix + name, value) for name, value in tensors.items())


def assert_same(found, expected):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


FORMS = {
    "bare": lambda: state(),
    "state_dict": lambda: {"state_dict": state(), "epoch": 3, "args": Namespace(lr=0.1)},
    "own": lambda: {
        "model": state(), "optimizer": sgd(), "rng": {"cpu": torch.get_rng_state(), "cuda": []},
        "running": {"loss": torch.zeros(()), "wrong": torch.zeros(())}, "ema_bank": None,
    },
    "nested": lambda: {"nets": {"student": state()}, "best": 0.5},
    "parallel": lambda: {"model_state_dict": beneath("module.", state())},
    "compiled": lambda: beneath("_orig_mod.module.", state()),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_the_state_is_found_and_loaded(tmp_path, form):
    torch.save(FORMS[form](), tmp_path / "a.pth")
    found = Checkpoint.read(tmp_path / "a.pth")
    assert_same(found.state, state())
    other = network(3)
    nn.init.zeros_(other[0].weight)
    found.load_into(other)
    assert_same(other.state_dict(), state())
    assert (found.optimizer is not None) == (form == "own")


def test_several_states_are_refused_until_one_is_named(tmp_path):
    file = tmp_path / "a.pt"
    average = {name: value + 1 for name, value in state().items()}
    torch.save({"state_dict": state(), "state_dict_ema": average, "deep": {"one": average}}, file)
    with pytest.raises(
        ValueError, match=r"--state-key says which of state_dict, state_dict_ema, deep\.one"
    ):
        Checkpoint.read(file)
    assert_same(Checkpoint.read(file, key="state_dict_ema").state, average)
    assert_same(Checkpoint.read(file, key="deep.one").state, average)
    with pytest.raises(ValueError, match="no state under 'ema'; it has: state_dict, state"):
        Checkpoint.read(file, key="ema")


def test_a_prefix_that_stands_for_more_than_the_model_is_named(tmp_path):
    """Lightning's: the module around the model has tensors of its own."""
    file = tmp_path / "a.ckpt"
    torch.save({"state_dict": {**beneath("model.", state()), "loss.scale": torch.ones(1)}}, file)
    with pytest.raises(ValueError, match=r"--state-prefix model\. takes"):
        Checkpoint.read(file).load_into(network())
    found = Checkpoint.read(file, prefix="model.")
    assert_same(found.state, state())
    found.write(tmp_path / "b.ckpt", {"0.bias": torch.zeros(3)})
    written = torch.load(tmp_path / "b.ckpt")["state_dict"]
    assert_same(written, torch.load(file)["state_dict"] | {"model.0.bias": torch.zeros(3)})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("1.running_mean"), "it lacks '1.running_mean'$"),
        (lambda s: s.update(extra=torch.ones(1)), "it has 'extra', which the model has not$"),
        (lambda s: s.update({"0.bias": torch.ones(4)}),
         r"0.bias is \(4,\) in the file and \(3,\) in the model$"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_in_a_line(tmp_path, change, said):
    tensors = state()
    change(tensors)
    torch.save(tensors, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        Checkpoint.read(tmp_path / "a.pt").load_into(network())


def test_a_state_without_counts_of_batches_fits(tmp_path):
    tensors = state()
    del tensors["1.num_batches_tracked"]
    torch.save(dict(tensors), tmp_path / "a.pt")
    found = Checkpoint.read(tmp_path / "a.pt")
    found.load_into(network())
    assert "1.num_batches_tracked" not in found.state


class Runs:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (lambda at: {"model": state(), "more": Runs(at)}, "cannot be read with weights_only=True"),
        (lambda _: network(), "cannot be read with weights_only=True"),
        (lambda _: {"epoch": 3}, "holds no tensors by name"),
    ],
)
def test_files_that_hold_no_plain_state_are_refused_and_nothing_in_them_runs(
    tmp_path, content, said
):
    torch.save(content(tmp_path / "ran"), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said) as refused:
        Checkpoint.read(tmp_path / "a.pt")
    assert len(str(refused.value).splitlines()) == 1
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_absent_and_damaged_files_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match="there is no checkpoint"):
        Checkpoint.read(tmp_path / name)
    (tmp_path / name).write_bytes(b"not a checkpoint at all")
    with pytest.raises(ValueError, match="cannot be read"):
        Checkpoint.read(tmp_path / name)


def test_all_else_in_the_file_is_kept(tmp_path):
    """Entries, prefixes, the versions of the modules, types and ties."""
    tensors = beneath("module.", state())
    tensors._metadata = state()._metadata
    tensors["module.2.weight"] = tensors["module.2.weight"].bfloat16()
    tensors["module.tied"] = tensors["module.2.weight"]
    torch.save({"model": tensors, "optimizer": sgd(), "epoch": 7}, tmp_path / "a.pt")
    found = Checkpoint.read(tmp_path / "a.pt")
    weight = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    found.write(
        tmp_path / "b.pt", {"2.weight": weight, "tied": weight, "1.running_mean": torch.ones(3)}
    )
    written, before = torch.load(tmp_path / "b.pt"), torch.load(tmp_path / "a.pt")
    assert list(written) == list(before)
    assert written["epoch"] == 7
    assert written["optimizer"] == before["optimizer"]
    assert written["model"]._metadata == before["model"]._metadata
    third = weight.bfloat16()
    changed = {"module.1.running_mean": torch.ones(3), "module.2.weight": third}
    assert_same(written["model"], before["model"] | changed | {"module.tied": third})
    pointers = {written["model"][n].data_ptr() for n in ("module.2.weight", "module.tied")}
    assert len(pointers) == 1
    assert_same(found.state, Checkpoint.read(tmp_path / "a.pt").state)  # itself as it was


def test_safetensors_are_read_and_written_with_their_metadata(tmp_path):
    file, out = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors.save_file(dict(state()), file, metadata={"format": "pt", "by": "me"})
    found = Checkpoint.read(file)
    assert_same(dict(sorted(found.state.items())), dict(sorted(state().items())))
    found.write(out, {"1.running_var": torch.full((3,), 2.0)})
    from safetensors import safe_open

    with safe_open(out, framework="pt") as written:
        assert written.metadata() == {"format": "pt", "by": "me"}
    expected = state() | {"1.running_var": torch.full((3,), 2.0)}
    assert_same(dict(sorted(safetensors.load_file(out).items())), dict(sorted(expected.items())))


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("a.pt", "a checkpoint to read, which is never written over"),
        ("link.pt", "a checkpoint to read, which is never written over"),
        ("b.safetensors", r"another kind of file than .*a\.pt, .*: name it \*\.pt"),
        ("none/b.pt", "there is no directory"),
    ],
)
def test_places_that_are_never_written_to(tmp_path, out, said):
    torch.save(state(), tmp_path / "a.pt")
    (tmp_path / "link.pt").symlink_to(tmp_path / "a.pt")
    before = (tmp_path / "a.pt").read_bytes()
    with pytest.raises(ValueError, match=said):
        Checkpoint.read(tmp_path / "a.pt").write(tmp_path / out, {}, overwrite=True)
    assert (tmp_path / "a.pt").read_bytes() == before


def test_an_existing_file_is_replaced_only_when_told(tmp_path):
    torch.save(state(), tmp_path / "a.pt")
    (tmp_path / "b.pt").write_text("precious")
    found = Checkpoint.read(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"b\.pt exists; --overwrite replaces it"):
        found.write(tmp_path / "b.pt", {})
    assert (tmp_path / "b.pt").read_text() == "precious"
    found.write(tmp_path / "b.pt", {}, overwrite=True)
    assert_same(torch.load(tmp_path / "b.pt"), state())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt", "b.pt"]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"7.weight": torch.ones(1)}, "has no tensor '7.weight'"),
        ({"0.bias": torch.ones(4)}, r"'0.bias' is \(3,\) in .*, and \(4,\) here"),
        ({"0.bias": torch.full((3,), 1e6)}, "'0.bias' does not fit into float16, its type in"),
    ],
)
def test_tensors_that_have_no_place_are_refused(tmp_path, tensors, said):
    half = {name: v.half() if v.is_floating_point() else v for name, v in state().items()}
    torch.save(half, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=said):
        Checkpoint.read(tmp_path / "a.pt").write(tmp_path / "b.pt", tensors)
    assert not (tmp_path / "b.pt").exists()
