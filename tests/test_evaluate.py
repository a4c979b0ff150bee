"""Evaluation protocols against plain loops, and that evaluating leaves no trace."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from normlab import build, checkpoint, config, evaluate, worker
from normlab.data.patterns import arranged
from normlab.data.streams import Stream, generator
from normlab.evaluate import Evaluator
from normlab.norms.base import population_layers
from normlab.orders import Order
from normlab.population import using
from normlab.protocols import Protocol
from normlab.train import Trainer


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    cfg = config.compose(
        ["scale=demo", "norm=ghost", "nbs=8", "batch_size=64", "epochs=1", "device=cpu",
         "threads=1", "ema_bank=[0.5]", "decay=0.9"]
    )  # fmt: skip
    job = worker.construct(cfg)
    trainer = Trainer(
        model=job.model, optimizer=job.optimizer, data=job.data, plan=job.plan, steps=job.steps,
        settings=build.settings(cfg), path=tmp_path_factory.mktemp("t") / "c.pt",
        stop=checkpoint.Stop(), bank=job.bank,
    )  # fmt: skip
    trainer.train_epoch()
    return job


def evaluator(job, **kwargs):
    return Evaluator(
        job.model, job.data, nbs=8, seed=0, device=torch.device("cpu"), bank=job.bank, **kwargs
    )


def plain(model, batches):
    wrong = n = 0
    loss = 0.0
    with torch.no_grad():
        for x, y in batches:
            logits = model(x)
            wrong += int((logits.argmax(1) != y).sum())
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            n += len(y)
    return {"n": n, "error": 100 * wrong / n, "loss": pytest.approx(loss / n, rel=1e-5)}


def numbers(row):
    return {key: row[key] for key in ("n", "error", "loss")}


def test_ema_is_inference_as_everybody_does_it(trained):
    model = copy.deepcopy(trained.model).eval()
    expected = plain(model, trained.data.eval_batches("val", batch_size=100, order=None))
    assert numbers(evaluator(trained).run(Protocol.parse("val:ema"))) == expected
    assert expected["n"] == trained.data.size("val")


def test_mini_batch_statistics_are_those_of_groups_of_nbs(trained):
    row = evaluator(trained).run(Protocol.parse("val:batch"))
    model = copy.deepcopy(trained.model).train()  # ghost batches of 8: one group per forward
    batches = trained.data.eval_batches("val", batch_size=8, order=0, drop_last=True)
    assert numbers(row) == plain(model, batches)
    assert row["batch"] == 8
    assert row["n"] == trained.data.size("val") // 8 * 8


@pytest.mark.parametrize(("pattern", "within", "n"), [("4x2", 8, 296), ("sorted", 64, 256)])
def test_batches_of_an_evaluation_can_have_a_pattern(trained, pattern, within, n):
    """Of 300 images, 30 of each label: 37 groups of 8, or 4 SGD batches of 64."""
    labels = trained.data.labels("val")
    rng = generator(Stream.EVAL_ORDER, 3)
    batches = arranged(labels, Order.parse(pattern), within, rng)
    (images,) = (x for x, _ in trained.data.eval_batches("val", batch_size=300, order=None))
    groups = ((images[g], torch.from_numpy(labels[g])) for g in batches.reshape(-1, 8))
    expected = plain(copy.deepcopy(trained.model).train(), groups)
    spec = Protocol.parse(f"val:batch/order:3/pattern:{pattern}")
    row = evaluator(trained, batch_size=64).run(spec)
    assert numbers(row) == expected
    assert (row["n"], row["protocol"]) == (n, str(spec))
    assert row["error"] != evaluator(trained).run(Protocol.parse("val:batch/order:3"))["error"]


@pytest.mark.parametrize("order", ["4x2", "sorted", "shuffled"])
def test_batches_of_an_evaluation_can_have_the_order_of_training(trained, order):
    evaluate = evaluator(trained, batch_size=64, order=Order.parse(order))
    evaluate.check(Protocol.parse("val:batch/pattern:trained"))
    row = evaluate.run(Protocol.parse("val:batch/order:3/pattern:trained"))
    same = evaluate.run(Protocol.parse(f"val:batch/order:3/pattern:{order}"))
    assert numbers(row) == numbers(same)
    with pytest.raises(ValueError, match="groups of 8 do not fill batches of 20"):
        evaluator(trained, order=Order.parse("4x2")).check(
            Protocol.parse("val:batch/batch:20/pattern:trained")
        )


def test_the_batch_can_be_another_than_the_runs(trained):
    row = evaluator(trained).run(Protocol.parse("val:batch/batch:20"))
    model = copy.deepcopy(trained.model)
    from normlab.norms.base import normalization

    with normalization(model.eval(), statistics="batch", update=False, group_size=20):
        expected = plain(model, trained.data.eval_batches("val", batch_size=20, order=0))
    assert numbers(row) == expected


def test_precise_statistics_are_those_of_the_whole_training_set_when_one_batch_holds_it(trained):
    n = trained.data.size("train")
    row = evaluator(trained).run(Protocol.parse(f"val:precise/batch:{n}"))
    model = copy.deepcopy(trained.model).double()
    (x, _), *rest = trained.data.eval_batches("train", batch_size=n, order=0, augment=True)
    assert not rest
    layers = [m for m in model.modules() if hasattr(m, "running_mean")]
    inputs = {}
    for layer in layers:
        layer.register_forward_hook(lambda m, args, _: inputs.update({m: args[0]}))
    from normlab.norms.base import normalization

    with (
        normalization(model.eval(), statistics="batch", update=False, group_size=n),
        torch.no_grad(),
    ):
        model(x.double())
    for layer, value in inputs.items():
        flat = value.transpose(0, 1).flatten(1)
        layer.running_mean.copy_(flat.mean(1))
        layer.running_var.copy_(flat.var(1, unbiased=False))
    model.float()
    expected = plain(model, trained.data.eval_batches("val", batch_size=100, order=None))
    assert row["samples"] == n
    assert row["error"] == pytest.approx(expected["error"], abs=0.4)  # one image in 300
    assert row["loss"] == pytest.approx(expected["loss"].expected, rel=1e-3)


def test_layer_by_layer_no_batch_matters_and_it_is_precise_with_all_in_one(trained):
    whole = evaluator(trained).run(Protocol.parse("val:precise/samples:96/batch:96"))
    rows = [
        evaluator(trained).run(Protocol.parse(f"val:precise_layerwise/samples:96/batch:{batch}"))
        for batch in (2, 8, 96)
    ]
    for row in rows:
        assert row["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        assert row["error"] == whole["error"]
        assert row["samples"] == 96
    assert [row["batch"] for row in rows] == [2, 8, 96]
    small = evaluator(trained).run(Protocol.parse("val:precise/samples:96/batch:2"))
    assert small["loss"] != pytest.approx(whole["loss"], rel=2e-4)


@pytest.mark.parametrize("made", [("batch", None), ("batch", True), (None, True), (None, False)])
def test_a_protocol_says_which_statistics_whatever_the_layers_were_made_for(trained, made):
    """Layers made for batch statistics, or to update, do neither in an evaluation by others."""
    expected = evaluator(trained).run(Protocol.parse("val:ema"))
    job = copy.copy(trained)
    job.model = copy.deepcopy(trained.model).eval()
    for layer in population_layers(job.model).values():
        layer.statistics, layer.update = made
    before = copy.deepcopy(job.model.state_dict())
    assert evaluator(job).run(Protocol.parse("val:ema")) == expected
    assert all(torch.equal(v, before[k]) for k, v in job.model.state_dict().items())


def test_torch_s_own_batch_norms_are_refused_beforehand_where_a_protocol_would_pass_them_by(
    trained,
):
    job = copy.copy(trained)
    job.model = torch.nn.Sequential(copy.deepcopy(trained.model), torch.nn.BatchNorm1d(10))
    evaluator(job).check(Protocol.parse("val:ema"))
    for protocol in ("val:batch", "val:precise"):
        with pytest.raises(ValueError, match=f"evals: '{protocol}': 1 is torch's BatchNorm1d"):
            evaluator(job).check(Protocol.parse(protocol))


def test_what_cannot_be_measured_layer_by_layer_is_refused_beforehand():
    cfg = config.compose(["scale=demo", "norm=l1", "device=cpu", "batch_size=64"])
    job = worker.construct(cfg)
    l1 = Evaluator(job.model, job.data, nbs=64, seed=0, device=torch.device("cpu"))
    l1.check(Protocol.parse("val:precise"))
    with pytest.raises(ValueError, match=r"evals: 'val:precise_layerwise': .* is a L1BatchNorm"):
        l1.check(Protocol.parse("val:precise_layerwise"))


def test_a_tracked_decay_equal_to_the_layers_own_gives_the_same_evaluation(trained):
    own = evaluator(trained).run(Protocol.parse("val:ema"))
    other = evaluator(trained).run(Protocol.parse("val:ema/decay:0.5"))
    assert own["loss"] != other["loss"]
    with pytest.raises(ValueError, match="ema_bank"):
        Evaluator(trained.model, trained.data, nbs=8, seed=0, device=torch.device("cpu")).run(
            Protocol.parse("val:ema/decay:0.5")
        )


def test_a_corrected_average_is_tested_with_as_it_is(trained):
    """Without what is left of its start, which after so few steps is not nothing."""
    spec = "val:ema/decay:0.5/corrected:true"
    row = evaluator(trained).run(Protocol.parse(spec))
    assert row["protocol"] == spec
    with using(trained.model, trained.bank.population(0.5, corrected=True)):
        expected = evaluator(trained).run(Protocol.parse("val:ema"))
    assert numbers(row) == numbers(expected)
    assert row["loss"] != evaluator(trained).run(Protocol.parse("val:ema/decay:0.5"))["loss"]


@pytest.mark.parametrize(
    "spec",
    [
        "train:batch",
        "val:ema",
        "val:precise",
        "val:precise_mean/batch:2",
        "val:precise_layerwise/samples:64",
        "val:ema/decay:0.5",
        "val:ema/decay:0.5/corrected:true",
    ],
)
def test_evaluating_leaves_no_trace(trained, spec):
    before = {k: v.clone() for k, v in trained.model.state_dict().items()}
    bank = copy.deepcopy(trained.bank.state_dict())
    modes = [m.training for m in trained.model.modules()]
    rng, np_rng = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = evaluator(trained).run(Protocol.parse(spec))
    assert all(torch.equal(v, before[k]) for k, v in trained.model.state_dict().items())
    assert str(trained.bank.state_dict()) == str(bank)
    assert [m.training for m in trained.model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert (np.random.get_state()[1] == np_rng).all()
    assert evaluator(trained).run(Protocol.parse(spec)) == first


def test_how_many_samples_go_through_at_once_does_not_matter(trained, monkeypatch):
    """P10: only the stated batch of a protocol does."""
    protocols = [Protocol.parse(s) for s in ("val:ema", "val:batch", "val:precise/samples:96")]
    many = [numbers(evaluator(trained).run(p)) for p in protocols]
    monkeypatch.setattr(evaluate, "_BLOCK", 24)
    few = [numbers(evaluator(trained).run(p)) for p in protocols]
    for a, b in zip(many, few, strict=True):
        assert (a["n"], a["error"]) == (b["n"], b["error"])
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)


def test_without_a_population_every_protocol_is_the_plain_forward():
    cfg = config.compose(["scale=demo", "norm=gn", "device=cpu", "batch_size=64"])
    job = worker.construct(cfg)
    gn = Evaluator(job.model, job.data, nbs=None, seed=0, device=torch.device("cpu"))
    rows = [numbers(gn.run(Protocol.parse(f"val:{s}"))) for s in ("batch", "ema", "precise")]
    assert rows[0] == rows[1] == rows[2]
    assert rows[0]["n"] == job.data.size("val")


def test_a_stop_is_honoured_between_batches(trained):
    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        evaluator(trained, tick=stop).run(Protocol.parse("val:precise"))
    assert all(m.statistics is None for m in trained.model.modules() if hasattr(m, "statistics"))


def test_the_images_of_an_estimate_do_not_depend_on_its_batch():
    """Else an error against the estimation batch would also be one against other crops."""
    cfg = config.compose(
        ["scale=demo", "norm=bn", "device=cpu", "batch_size=64", "data.augment=crop"]
    )
    job = worker.construct(cfg)
    bn = Evaluator(job.model, job.data, nbs=64, seed=0, device=torch.device("cpu"))
    seen = [
        torch.cat([x for x, _ in bn._groups("train", batch, 0, samples=900, augment=True)])
        for batch in (2, 100, 900)
    ]
    assert len(seen[0]) == 900
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], seen[2])
    plain = torch.cat([x for x, _ in bn._groups("train", 900, 0, samples=900)])
    assert not torch.equal(seen[0], plain)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("val:batch/batch:400", "val offers 300"),
        ("val:precise/batch:1000", "train offers 997"),
        ("val:precise/samples:10/batch:20", "offers 10"),
        ("val:precise/samples:5000", "train has 997"),
        ("val:batch/pattern:3x2", "val:batch/pattern:3x2': groups of 6 do not fill batches of 8"),
        ("val:batch/pattern:20x2/batch:40", "groups of 20 labels, and there are 10 classes"),
        ("val:batch/pattern:1x40/batch:40", "40 samples of a label, and class 0 has 30"),
        ("val:batch/pattern:sorted/batch:24", "batches of 24 do not fill batch_size=64"),
    ],
)
def test_what_cannot_be_evaluated_is_refused_beforehand(trained, spec, says):
    with pytest.raises(ValueError, match=says):
        evaluator(trained, batch_size=64).check(Protocol.parse(spec))
