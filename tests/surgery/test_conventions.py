import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.conventions import Caffe, Keras
from torch import nn

from normlab.surgery import NormState, read, translate, with_eps, write
from normlab.surgery.conventions import CONVENTIONS

COUNT = 8 * 3 * 2
CHANNELS = 4


def batches(number=5):
    generator = torch.Generator().manual_seed(0)
    shape = (number, 8, CHANNELS, 3, 2)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * 2 + 1


def torch_layer(state, **options):
    """torch's layer with the state that `write` gives."""
    tensors, settings = write("torch", state, **options)
    layer = nn.BatchNorm2d(CHANNELS, affine="weight" in tensors, **settings).double()
    layer.load_state_dict(tensors)
    return layer


@pytest.mark.parametrize("framework", [Keras, Caffe])
def test_the_same_function_in_torch(framework):
    """E25: a checkpoint ported with its eps and its scale factor computes what it computed."""
    theirs = framework(CHANNELS)
    for x in batches():
        theirs.train(x)
    state = read(framework.__name__.lower(), theirs.tensors())
    ours = torch_layer(state, variance=state.variance).eval()
    x = batches()[0]
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-12, atol=1e-12)


def test_what_an_unconverted_checkpoint_costs():
    """E25, P1: without n/(n-1) and with torch's eps the outputs are off by a computable factor."""
    theirs = Keras(CHANNELS)
    for x in batches():
        theirs.train(x)
    naive = nn.BatchNorm2d(CHANNELS, affine=False).double().eval()
    naive.running_mean.copy_(theirs.moving_mean)
    naive.running_var.copy_(theirs.moving_variance)
    x = batches()[0]
    factor = ((theirs.moving_variance + 1e-3) / (theirs.moving_variance + 1e-5)).sqrt()
    torch.testing.assert_close(naive(x), theirs(x) * factor.view(1, -1, 1, 1))
    state = read("keras", theirs.tensors())
    torch.testing.assert_close(
        write("torch", state, count=2)[0]["running_var"], 2 * theirs.moving_variance
    )


@pytest.mark.parametrize("decay", [0.9, 0.5])
def test_training_goes_on_as_it_would_have(decay):
    """P1, P2: momentum turned round, variance made unbiased: from the same statistics and the same
    batches, Keras, Caffe and torch arrive at the same statistics."""
    x = batches()
    ours = nn.BatchNorm2d(CHANNELS, momentum=round(1 - decay, 12), affine=False).double()
    ours(x[0])
    ours.num_batches_tracked.fill_(1)
    state = read("torch", ours.state_dict(), momentum=1 - decay)
    tensors, settings = write("keras", state, count=COUNT)
    keras = Keras(CHANNELS, settings["momentum"], settings["epsilon"])
    keras.moving_mean, keras.moving_variance = tensors["moving_mean"], tensors["moving_variance"]
    tensors, settings = write("caffe", state)
    caffe = Caffe(CHANNELS, settings["moving_average_fraction"], settings["eps"])
    caffe.blobs = [tensors[name] for name in ("mean", "variance", "scale_factor")]
    for batch in x[1:]:
        for layer in (ours, keras.train, caffe.train):
            layer(batch)
    assert (keras.momentum, caffe.fraction) == (decay, decay)
    for framework, layer in (("keras", keras), ("caffe", caffe)):
        after = read(framework, layer.tensors(), momentum=decay, eps=1e-5)
        written, _ = write("torch", after, count=COUNT)
        torch.testing.assert_close(written["running_mean"], ours.running_mean)
        torch.testing.assert_close(written["running_var"], ours.running_var)


def test_caffes_scale_factor():
    """Sums, not averages: a factor of 1 (an average stored as such) and of 999.98 are read alike;
    0 is a layer that never trained, which Caffe reads as mean 0 and variance 0."""
    mean, var = torch.randn(CHANNELS).double(), torch.rand(CHANNELS).double() + 0.5
    for factor in (1.0, 999.98):
        tensors = {"mean": mean * factor, "variance": var * factor}
        state = read("caffe", {**tensors, "scale_factor": torch.tensor([factor]).double()})
        torch.testing.assert_close(state.mean, mean)
        torch.testing.assert_close(state.var, var)
        written, _ = write("caffe", state, scale_factor=factor)
        torch.testing.assert_close(written["mean"], tensors["mean"])
        assert written["scale_factor"].tolist() == [factor]
    blobs = {"mean": mean, "variance": var, "scale_factor": torch.zeros(1)}
    assert not read("caffe", blobs).mean.any()
    fresh = Caffe(CHANNELS)
    state = read("caffe", fresh.tensors())
    assert not state.var.any()
    x = batches()[0]
    torch.testing.assert_close(torch_layer(state).eval()(x), fresh(x))
    torch.testing.assert_close(
        write("caffe", state)[0]["scale_factor"], torch.tensor([1000.0]).double()
    )


@given(
    source=st.sampled_from(sorted(CONVENTIONS)),
    target=st.sampled_from(sorted(CONVENTIONS)),
    decay=st.floats(0, 0.9999),
    eps=st.floats(1e-8, 1),
    count=st.integers(2, 1000),
    affine=st.booleans(),
)
def test_there_and_back(source, target, decay, eps, count, affine):
    """Every pair of frameworks: one state, through one and the other."""
    values = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64)
    weight, bias = (values, -values) if affine else (None, None)
    kind = CONVENTIONS[source].variance
    state = NormState(weight, bias, values - 1, values**2, kind, eps, decay)
    for framework in (target, source):
        tensors, settings = write(framework, state, count=count)
        words = CONVENTIONS[framework]
        eps_, constant = settings[words.epsilon], settings[words.constant]
        state = read(framework, tensors, eps=eps_, momentum=constant)
    assert state.eps == eps
    assert state.decay == pytest.approx(decay, abs=1e-11)
    assert (state.weight is None) == (not affine)
    torch.testing.assert_close(state.mean, values - 1)
    torch.testing.assert_close(state.var, values**2)
    assert state.variance == kind


def test_names_and_defaults():
    """P2, P3: the same number means opposite things, and is never passed on as it is."""
    values = {"moving_mean": torch.zeros(2), "moving_variance": torch.ones(2)}
    state = read("keras", {**values, "gamma": torch.ones(2) * 3, "beta": torch.ones(2)})
    assert (state.eps, state.decay, state.variance) == (1e-3, 0.99, "biased")
    tensors, settings = write("torch", state, count=10)
    assert settings == {"eps": 1e-3, "momentum": 0.01}
    assert list(tensors) == list(nn.BatchNorm2d(2).state_dict())
    assert tensors["weight"].tolist() == [3, 3]
    state = read("torch", nn.BatchNorm2d(2).state_dict())
    assert (state.eps, state.decay, state.variance) == (1e-5, 0.9, "unbiased")
    assert write("keras", state, variance="unbiased")[1] == {"epsilon": 1e-5, "momentum": 0.9}
    assert write("caffe", state)[1] == {"eps": 1e-5, "moving_average_fraction": 0.9}
    cumulative = read("torch", nn.BatchNorm2d(2).state_dict(), momentum="cumulative")
    assert write("torch", cumulative)[1] == {"eps": 1e-5, "momentum": None}
    with pytest.raises(ValueError, match="keras has no cumulative average"):
        write("keras", cumulative, count=10)
    with pytest.raises(ValueError, match="only torch has a cumulative average"):
        read("keras", values, momentum="cumulative")


@pytest.mark.parametrize("given", ["gamma", "beta"])
def test_a_keras_layer_without_scale_or_center(given):
    """torch's layer loads what Keras has as scale=False or center=False, and is that function."""
    keras = Keras(CHANNELS)
    keras.train(batches()[0])
    values = torch.linspace(0.5, 2, CHANNELS, dtype=torch.float64)
    state = read("keras", {**keras.tensors(), given: values})
    assert (state.weight is None) == (given == "beta")
    x, per_channel = batches()[1], values.view(1, -1, 1, 1)
    expected = keras(x) * per_channel if given == "gamma" else keras(x) + per_channel
    ours = torch_layer(state, count=COUNT, variance="biased").eval()
    torch.testing.assert_close(ours(x), expected, rtol=1e-12, atol=1e-12)
    caffe, _ = write("caffe", state, count=COUNT)
    assert caffe[given].tolist() == values.tolist()
    assert caffe["beta" if given == "gamma" else "gamma"].unique().item() == (given == "beta")
    assert write("keras", state)[0].keys() == {*keras.tensors(), given}


def test_another_eps():
    """C29: eps goes with the layer; where it cannot, the variance takes the difference."""
    state = read("keras", {"moving_mean": torch.ones(2), "moving_variance": torch.ones(2) * 0.5})
    other = with_eps(state, 1e-5)
    torch.testing.assert_close(other.var + other.eps, state.var + state.eps)
    assert other.eps == 1e-5
    with pytest.raises(ValueError, match=r"eps=1.0 is 0.999 more than 0.001, .* variance is 0.5"):
        with_eps(state, 1.0)


def test_a_checkpoint():
    """Every norm by name, whatever the separator; all else untouched and in its place."""
    kernel = torch.randn(3, 3, 2, 2)
    checkpoint = {
        "stem/conv/kernel:0": kernel,
        "stem/bn/gamma:0": torch.ones(2),
        "stem/bn/beta:0": torch.zeros(2),
        "stem/bn/moving_mean:0": torch.ones(2),
        "stem/bn/moving_variance:0": torch.ones(2) * 3,
        "moving_mean": torch.zeros(2),
        "moving_variance": torch.ones(2),
        "ln/gamma": torch.ones(2),
    }
    done = translate(checkpoint, "keras", "torch", count={"stem/bn": 4, "": 2})
    assert list(done) == [
        "stem/conv/kernel:0",
        *(f"stem/bn.{name}" for name in nn.BatchNorm2d(2).state_dict()),
        "running_mean", "running_var", "num_batches_tracked", "ln/gamma",
    ]  # fmt: skip
    assert done["stem/conv/kernel:0"] is kernel
    assert done["stem/bn.running_var"].tolist() == [4, 4]
    assert done["running_var"].tolist() == [2, 2]
    with pytest.raises(ValueError, match=r"stem/bn: the variance is biased .* needs count"):
        translate(checkpoint, "keras", "torch")
    with pytest.raises(ValueError, match="stem/bn: the variance is biased"):
        translate(checkpoint, "keras", "torch", count={"": 2})
    kept = translate(checkpoint, "keras", "torch", variance="unbiased")
    assert kept["stem/bn.running_var"].tolist() == [3, 3]


def test_a_model_of_torch_to_caffe_and_back():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3, affine=False))
    model(torch.randn(4, 2, 3, 3))
    there = translate(model.state_dict(), "torch", "caffe")
    assert [name for name in there if name.startswith("1/")] == [
        "1/gamma", "1/beta", "1/mean", "1/variance", "1/scale_factor",
    ]  # fmt: skip
    back = translate(there, "caffe", "torch")
    assert list(back) == list(model.state_dict())
    for name, value in model.state_dict().items():
        if "num_batches" not in name:
            torch.testing.assert_close(back[name], value)


@pytest.mark.parametrize(
    ("call", "line"),
    [
        (lambda t: read("mxnet", t), "framework is one of torch, keras, caffe, not 'mxnet'"),
        (lambda _: read("torch", {}), "missing: running_mean, running_var"),
        (lambda t: read("torch", {**t, "gamma": t["running_mean"]}), "unknown: gamma"),
        (lambda _: read("caffe", {"mean": torch.ones(2)}), "missing: variance, scale_factor"),
        (lambda t: read("torch", t, variance="sample"), "biased, unbiased, not 'sample'"),
        (lambda t: read("torch", t, eps=0), "must be above 0"),
        (lambda t: read("torch", t, momentum=0), r"momentum=0 leaves 1 of the old .* in \[0, 1\)"),
        (lambda t: read("torch", t, momentum=1.5), r"in \[0, 1\)"),
        (lambda t: read("torch", {**t, "running_var": -torch.ones(2)}), "negative"),
        (lambda t: write("keras", read("torch", t)), "needs count"),
        (lambda t: write("keras", read("torch", t), count=1), "at least 2, not 1"),
        (lambda t: write("torch", read("torch", t), scale_factor=2), "no scale_factor; Caffe has"),
        (lambda t: write("caffe", read("torch", t), scale_factor=0), "must be above 0"),
    ],
)
def test_bad_requests(call, line):
    """P4: a momentum that never moves the statistics is refused, like all that would be guessed."""
    with pytest.raises(ValueError, match=line):
        call(nn.BatchNorm2d(2).state_dict())
