"""`normlab recalibrate`: from files into a new file, which loads, and is nothing else's."""

import copy
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from normlab.cli import main
from normlab.data import digits

safetensors = pytest.importorskip("safetensors.torch")

CODE = """
import torch
from torch import nn

def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10),
    )

def frozen():
    from torchvision.ops.misc import FrozenBatchNorm2d
    return nn.Sequential(FrozenBatchNorm2d(1), nn.Flatten(), nn.Linear(64, 10))

def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

def evo():
    from timm.layers import EvoNorm2dB0
    return nn.Sequential(nn.BatchNorm2d(1), EvoNorm2dB0(1), nn.Flatten(), nn.Linear(64, 10))

def three_channels():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
"""


def images(split):
    data = digits.load("", seed=0)
    batches = data.eval_batches(
        split, batch_size=500, order=None, device=torch.device("cpu"), channels_last=False
    )
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def train(model, x, y, *, steps, seed, lr):
    """The momentum buffers come back with it."""
    generator = torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    model.train()
    for _ in range(steps):
        rows = torch.randint(0, len(x), (64,), generator=generator)
        sgd.zero_grad()
        nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
        sgd.step()
    return sgd.state_dict()


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three trainings from one start, their checkpoints, and the digits."""
    here = tmp_path_factory.mktemp("made")
    (here / "code_of_mine.py").write_text(CODE)
    scope = {}
    exec(CODE, scope)
    torch.set_num_threads(1)
    for split in ("train", "test"):
        x, y = images(split)
        np.savez(here / f"{split}.npz", x=x, y=y)
        np.savez(here / f"dark-{split}.npz", x=x - 2, y=y)
    x, y = images("train")
    start = scope["make_model"]()
    train(start, x, y, steps=40, seed=0, lr=0.2)
    for seed in (1, 2, 3):
        model = copy.deepcopy(start)
        optimizer = train(model, x, y, steps=80, seed=seed, lr=1.0)
        content = {"model": model.state_dict(), "optimizer": optimizer, "epoch": 40 + seed}
        torch.save(content, here / f"{seed}.pt")
    for name in ("frozen", "plain", "evo", "three_channels"):
        torch.save(scope[name]().state_dict(), here / f"{name}.pt")
    safetensors.save_file(dict(model.state_dict()), here / "3.safetensors", {"format": "pt"})
    yield here
    sys.modules.pop("code_of_mine", None)


@pytest.fixture
def recalibrate(made, tmp_path):
    """The command with what it always needs; words replace what they name again."""

    def run(*words, checkpoint="1.pt", model="make_model", out="new.pt"):
        given = ["--model", f"{made}/code_of_mine.py:{model}", "--out", str(tmp_path / out)]
        if checkpoint:
            given += ["--checkpoint", f"{made}/{checkpoint}"]
        if "--data" not in words and "--adapt" not in words:
            given += ["--data", f"{made}/train.npz"]
        return main(["recalibrate", *given, *(word.replace("MADE", str(made)) for word in words)])

    return run


def load(path):
    return torch.load(path, weights_only=True)


STATISTICS = ("running_mean", "running_var")


def assert_same_but_statistics(new, old):
    assert list(new) == list(old)
    for name, value in old.items():
        assert new[name].dtype == value.dtype
        assert torch.equal(new[name], value) != name.endswith(STATISTICS), name


def moments(x):
    """Mean and biased variance per channel, in float64."""
    x = x.double().transpose(0, 1).flatten(1)
    return x.mean(1), ((x - x.mean(1, keepdim=True)) ** 2).mean(1)


def test_a_new_file_has_the_estimate_and_all_else(made, tmp_path, recalibrate, capsys):
    before = (made / "1.pt").read_bytes()
    assert recalibrate("--test", "MADE/test.npz", "--batch-size", "997") == 0
    assert (made / "1.pt").read_bytes() == before
    new, old = load(tmp_path / "new.pt"), load(made / "1.pt")
    assert (new["epoch"], list(new)) == (41, ["model", "optimizer", "epoch"])
    momenta = new["optimizer"]["state"], old["optimizer"]["state"]
    for number, values in momenta[1].items():
        assert torch.equal(momenta[0][number]["momentum_buffer"], values["momentum_buffer"])
    assert_same_but_statistics(new["model"], old["model"])
    x, _ = images("train")
    first = nn.functional.conv2d(x, old["model"]["0.weight"], old["model"]["0.bias"])
    mean, var = moments(first)
    torch.testing.assert_close(new["model"]["1.running_mean"].double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(new["model"]["1.running_var"].double(), var, rtol=1e-5, atol=1e-5)
    told = capsys.readouterr().out
    assert "2 batch norms: statistics of 997 samples, pooled, in batches of 997" in told
    assert "on 500 samples of test data" in told
    assert f"new.pt is written: its weights are bit for bit those of {made}/1.pt" in told


def errors_told(told):
    """Of the stored statistics, and of those estimated anew."""
    rows = [line.split() for line in told.splitlines()]
    return [float(row[2]) for row in rows if row[:1] in (["stored"], ["estimated"])]


def error(state):
    x, y = images("test")
    scope = {}
    exec(CODE, scope)
    model = scope["make_model"]()
    model.load_state_dict(state)
    return 100 * model.eval()(x).argmax(1).ne(y).double().mean().item()


def test_averaged_weights_need_statistics_of_their_own(made, tmp_path, recalibrate, capsys):
    """The case in which users of SWA lose accuracy: P5's copied buffers."""
    files = [f"MADE/{seed}.pt" for seed in (1, 2, 3)]
    assert recalibrate("--average", *files, "--test", "MADE/test.npz", checkpoint=None) == 0
    new, olds = load(tmp_path / "new.pt"), [load(made / f"{seed}.pt") for seed in (1, 2, 3)]
    copied = dict(olds[0]["model"])
    for name in copied:
        if name.endswith(("weight", "bias")):
            values = torch.stack([old["model"][name].double() for old in olds])
            copied[name] = (values.sum(0) / 3).float()
            torch.testing.assert_close(new["model"][name], copied[name], rtol=1e-7, atol=0)
    assert new["model"]["1.num_batches_tracked"] == olds[0]["model"]["1.num_batches_tracked"]
    assert new["epoch"] == 41
    before, after = errors_told(capsys.readouterr().out)
    singly = [error(old["model"]) for old in olds]
    assert before == pytest.approx(error(copied), abs=0.01)
    assert after == pytest.approx(error(new["model"]), abs=0.01)
    assert before > 30
    assert after < 10
    assert after <= min(singly) + 1


def test_adapted_statistics_are_those_of_the_target(tmp_path, recalibrate, capsys):
    """Images darker by a constant: in the first layer's mean, that is all there is to it."""
    words = ("--target", "MADE/dark-train.npz", "--adapt", "--test", "MADE/dark-test.npz")
    assert recalibrate(*words) == 0
    before, after = errors_told(capsys.readouterr().out)
    assert after < 20 < 50 < before
    assert recalibrate("--test", "MADE/test.npz", out="own.pt") == 0
    own, adapted = (load(tmp_path / name)["model"] for name in ("own.pt", "new.pt"))
    shift = -2 * own["0.weight"].sum((1, 2, 3))
    difference = adapted["1.running_mean"] - own["1.running_mean"]
    torch.testing.assert_close(difference, shift, rtol=1e-3, atol=1e-3)


def test_safetensors_stay_safetensors(made, tmp_path, recalibrate):
    assert recalibrate(checkpoint="3.safetensors", out="new.safetensors") == 0
    new, old = (safetensors.load_file(f) for f in (
        tmp_path / "new.safetensors", made / "3.safetensors"))  # fmt: skip
    assert_same_but_statistics(dict(sorted(new.items())), dict(sorted(old.items())))
    assert recalibrate(checkpoint="3.pt") == 0
    for name, value in load(tmp_path / "new.pt")["model"].items():
        assert torch.equal(new[name], value)


def test_what_is_half_in_the_file_stays_half(made, tmp_path, recalibrate):
    old = {n: v.bfloat16() if v.is_floating_point() else v
           for n, v in load(made / "1.pt")["model"].items()}  # fmt: skip
    torch.save(old, made / "half.pt")
    assert recalibrate(checkpoint="half.pt") == 0
    new = load(tmp_path / "new.pt")
    assert new["1.running_var"].dtype == torch.bfloat16
    weights = [name for name in old if not name.endswith(STATISTICS)]
    assert all(torch.equal(new[name], old[name]) for name in weights)


def test_layers_that_are_no_known_norms_are_refused_by_name_or_kept(
    made, tmp_path, recalibrate, capsys
):
    pytest.importorskip("timm")
    assert recalibrate(model="evo", checkpoint="evo.pt") == 2
    told = capsys.readouterr().err
    assert "1 is a timm.layers.evo_norm.EvoNorm2dB0" in told
    assert "--unknown keep" in told
    assert not (tmp_path / "new.pt").exists()
    assert recalibrate("--unknown", "keep", model="evo", checkpoint="evo.pt") == 0
    assert "left as they were: 1 (a EvoNorm2dB0)" in capsys.readouterr().out
    new, old = load(tmp_path / "new.pt"), load(made / "evo.pt")
    changed = [name for name, value in old.items() if not torch.equal(value, new[name])]
    assert changed == ["0.running_mean", "0.running_var"]


@pytest.mark.parametrize(
    ("words", "options", "said"),
    [
        ((), {"model": "plain", "checkpoint": "plain.pt"}, "no batch norm whose statistics"),
        ((), {"model": "frozen", "checkpoint": "frozen.pt"}, "all 1 are frozen"),
        ((), {"model": "three_channels", "checkpoint": "three_channels.pt"},
         "the model and a batch of MADE/train.npz: RuntimeError: "),
        ((), {"model": "plain"}, "1.pt does not fit the model: it has '0.weight' and 13 more"),
        ((), {"out": "old.pt"}, "old.pt exists; --overwrite replaces it"),
        ((), {"out": "new.safetensors"}, "another kind of file"),
        ((), {"checkpoint": None}, "give one --checkpoint FILE, or --average FILE FILE ..."),
        (("--average", "MADE/1.pt", "MADE/2.pt"), {}, "give one --checkpoint FILE, or --average"),
        (("--average", "MADE/1.pt"), {"checkpoint": None}, "--average is of two files at least"),
        (("--average", "MADE/1.pt", "MADE/plain.pt"), {"checkpoint": None},
         "1.pt and MADE/plain.pt are not of one model: '0.bias' is not in both"),
        (("--checkpoint", "MADE/1.pt", "MADE/2.pt"), {}, "--checkpoint is one file here, not 2"),
        (("--adapt",), {}, "--adapt and --target SPEC go together"),
        (("--target", "MADE/train.npz"), {}, "--adapt and --target SPEC go together"),
        (("--samples", "40"), {}, "MADE/train.npz offers 40 samples, fewer than a batch of 64"),
        (("--nbs", "48"), {}, "batches of 64 samples are not a multiple of nbs=48"),
        (("--model-arg", "width"), {}, "--model-arg is NAME=VALUE"),
        (("--estimator", "cheap"), {}, "invalid choice: 'cheap'"),
        (("--bach-size", "3"), {}, "did you mean '--batch-size'?"),
        (("--device", "abacus"), {}, "--device is cpu, cuda or cuda:N, not 'abacus'"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_is_estimated(
    made, tmp_path, recalibrate, capsys, monkeypatch, words, options, said
):
    from normlab.recalibrate import estimation

    def never(*_, **__):
        raise AssertionError("something was estimated")

    for name in ("estimate", "measure"):
        monkeypatch.setattr(estimation, name, never)
    (tmp_path / "old.pt").write_text("precious")
    assert recalibrate(*words, **options) == 2
    told = capsys.readouterr().err
    assert said.replace("MADE", str(made)) in told
    assert len(told.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["old.pt"]
    assert (tmp_path / "old.pt").read_text() == "precious"


@pytest.mark.parametrize("source", ["1.pt", "2.pt"])
def test_no_source_is_written_over_even_when_told(made, recalibrate, capsys, source):
    before = (made / source).read_bytes()
    words = ("--average", "MADE/1.pt", "MADE/2.pt", "--overwrite")
    assert recalibrate(*words, checkpoint=None, out=str(made / source)) == 2
    assert "is a checkpoint to read, which is never written over" in capsys.readouterr().err
    assert (made / source).read_bytes() == before


def test_a_file_that_is_not_what_was_written_is_removed(
    made, tmp_path, recalibrate, capsys, monkeypatch
):
    from normlab.subject import checkpoint

    def damaged(path, content):
        state = load(made / "1.pt")
        state["model"]["0.weight"][0, 0, 0, 0] += 1
        torch.save(state, path)
        del content

    monkeypatch.setattr(checkpoint, "write_atomically", damaged)
    assert recalibrate() == 2
    assert "did not hold what was written to it" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_help_does_not_load_torch():
    code = "import sys; from normlab.cli import main; main(['recalibrate', '--help'])"
    code += "; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--average FILE" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"


@pytest.mark.slow
def test_under_torchrun_the_file_is_that_of_one_process(made, tmp_path, recalibrate):
    words = ["--data", f"{made}/train.npz", "--test", f"{made}/test.npz"]
    assert recalibrate(*words, out="one.pt") == 0
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "normlab",
        "recalibrate", "--model", f"{made}/code_of_mine.py:make_model",
        "--checkpoint", f"{made}/1.pt", "--out", f"{tmp_path}/two.pt", "--device", "cpu", *words,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("2 batch norms: statistics of 960 samples, pooled") == 1
    one, two = (load(tmp_path / name)["model"] for name in ("one.pt", "two.pt"))
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-6, atol=1e-6)
