"""The loop against a loop written by hand, micro-batches against ghost batches, and divergence."""

import math
from itertools import chain, count, islice

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from normlab import adversarial, build, checkpoint, config, data, worker
from normlab.norms import forward_with
from normlab.orders import Order
from normlab.train import Diverged, Trainer


def resolved(*overrides):
    return config.compose(
        ["scale=demo", "device=cpu", "threads=1", "epochs=2", "batch_size=64", "seed=3", *overrides]
    )


def trainer(cfg, tmp_path):
    job = worker.construct(cfg)
    return Trainer(
        model=job.model, optimizer=job.optimizer, data=job.data, plan=job.plan, steps=job.steps,
        settings=build.settings(cfg), path=tmp_path / "c.pt", stop=checkpoint.Stop(), bank=job.bank,
        forward=build.compiled(cfg, job.model),
        adversary=adversarial.adversary(job.model, build.domains(cfg), job.data),
    )  # fmt: skip


def by_hand(cfg, *, micro=None):
    """The same run without the trainer: torch's optimizer, the schedule's formula, one loop."""
    dataset = build.data(cfg)
    model = build.model(cfg, dataset)
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1]
    others = [p for n, p in model.named_parameters() if p.ndim == 1]
    recipe = cfg["recipe"]
    optimizer = torch.optim.SGD(
        [{"params": decayed, "weight_decay": recipe["weight_decay"]}, {"params": others}],
        lr=0.1, momentum=recipe["momentum"], nesterov=recipe["nesterov"],
    )  # fmt: skip
    size = cfg["batch_size"]
    total = cfg["epochs"] * (dataset.size("train") // size)
    warm = round(recipe["warmup"] * total)
    step, rows = 0, []
    for epoch in range(cfg["epochs"]):
        loss_sum, wrong, seen = 0.0, 0, 0
        for x, y in dataset.train_batches(batch_size=size, seed=cfg["seed"], epoch=epoch):
            lr = cfg["lr"] * (
                (step + 1) / warm
                if step < warm
                else (1 + math.cos(math.pi * (step - warm) / (total - warm))) / 2
            )
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.zero_grad()
            for xs, ys in zip(x.split(micro or size), y.split(micro or size), strict=True):
                logits = model(xs)
                loss = F.cross_entropy(logits, ys)
                (loss * (len(ys) / size)).backward()
                loss_sum += loss.item() * len(ys)
                wrong += int((logits.argmax(1) != ys).sum())
            optimizer.step()
            step, seen = step + 1, seen + size
        rows.append((loss_sum / seen, 100 * wrong / seen))
    return model, rows


@pytest.mark.parametrize("norm", [["norm=bn"], ["norm=ghost", "nbs=8"], ["norm=gn"]])
def test_the_loop_is_the_loop_written_by_hand(tmp_path, norm):
    cfg = resolved(*norm)
    ours = trainer(cfg, tmp_path)
    for _ in range(2):
        ours.train_epoch()
    model, rows = by_hand(cfg)
    for (name, a), b in zip(
        ours.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    for row, (loss, error) in zip(ours.history, rows, strict=True):
        assert row["train_loss"] == pytest.approx(loss, rel=1e-6)
        assert row["train_error"] == pytest.approx(error)


def test_micro_batches_are_taken_as_planned(tmp_path):
    cfg = resolved("norm=bn", "nbs=16")
    ours = trainer(cfg, tmp_path)
    ours.train_epoch()
    ours.train_epoch()
    model, _ = by_hand(cfg, micro=16)
    for (name, a), b in zip(
        ours.model.state_dict().items(), model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name


def test_accumulation_and_ghost_give_the_same_gradient(tmp_path):
    """E21: k micro-batches of NBS samples are k ghost chunks, up to rounding; float64 shows it."""
    weights = []
    for norm in (["norm=bn", "nbs=16"], ["norm=ghost", "nbs=16"]):
        ours = trainer(resolved(*norm), tmp_path)
        ours.model.double()
        x, y = next(iter(ours.data.train_batches(batch_size=64, seed=3, epoch=0)))
        ours._train_step(x.double(), y)
        weights.append([p.detach() for p in ours.model.parameters()])
    for a, b in zip(*weights, strict=True):
        assert (a - b).abs().max() < 1e-12


def test_weight_decay_reaches_what_the_recipe_says():
    def decayed(*overrides):
        cfg = resolved("norm=bn", "model=resnet8", *overrides)
        model = build.model(cfg, build.data(cfg))
        groups = build.optimizer(cfg, model).param_groups
        by_id = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
        return {name: by_id[id(p)] for name, p in model.named_parameters()}, model

    plain, model = decayed("recipe.weight_decay=0.01")
    norm_names = {
        f"{m}.{p}"
        for m, layer in model.named_modules()
        if type(layer).__name__ == "BatchNorm"
        for p in ("weight", "bias")
    }
    assert norm_names <= plain.keys()
    for name, value in plain.items():
        expected = 0.0 if name in norm_names or name.endswith("bias") else 0.01
        assert value == expected, name
    everything, _ = decayed(
        "recipe.weight_decay=0.01", "recipe.decay_norm=true", "recipe.decay_bias=true"
    )
    assert set(everything.values()) == {0.01}


def test_gradient_clipping_bounds_the_step(tmp_path):
    plain_sgd = ["recipe.momentum=0", "recipe.nesterov=false", "recipe.weight_decay=0"]
    ours = trainer(resolved("norm=bn", "recipe.clip_norm=0.001", *plain_sgd), tmp_path)
    before = [p.detach().clone() for p in ours.model.parameters()]
    x, y = next(iter(ours.data.train_batches(batch_size=64, seed=3, epoch=0)))
    lr = ours.lr
    ours._train_step(x, y)
    moved = math.sqrt(
        sum(
            (a - b).square().sum().item()
            for a, b in zip(before, ours.model.parameters(), strict=True)
        )
    )
    assert moved == pytest.approx(lr * 0.001, rel=1e-3)


def test_a_run_that_explodes_is_diverged_not_failed(tmp_path):
    ours = trainer(resolved("norm=none", "lr=1e30"), tmp_path)
    with pytest.raises(Diverged, match="epoch 1"):
        ours.train_epoch()


def test_virtual_extra_images_run_beside_each_micro_batch(tmp_path):
    """The plan's forward-only images, others in every forward, change the statistics alone."""
    cfg = resolved("norm=virtual", "nbs=80", "micro_batch=32")
    ours, twin = trainer(cfg, tmp_path), trainer(cfg, tmp_path)
    assert (ours.plan.virtual_extra, ours.plan.accumulation) == (48, 2)
    x, y = next(iter(ours.data.train_batches(batch_size=64, seed=3, epoch=0)))
    order = {"batch_size": 96, "seed": 3 + 2**31, "epoch": 0}
    extra, _ = next(iter(ours.data.train_batches(**order)))
    for part in range(2):
        rows = slice(32 * part, 32 * part + 32)
        logits = forward_with(twin.model, x[rows], extra[48 * part : 48 * part + 48])
        (F.cross_entropy(logits, y[rows]) / 2).backward()
    found = next(ours._extra_images())
    assert torch.equal(found, extra)
    ours._train_step(x, y, found)
    for mine, theirs in zip(ours.model.parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
    for mine, theirs in zip(ours.model.buffers(), twin.model.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_extra_images_go_on_over_passes_and_epochs(tmp_path):
    cfg = resolved("norm=virtual", "nbs=300")
    ours = trainer(cfg, tmp_path)
    size = ours.plan.virtual_extra
    passing = ours.data.size("train") // size
    assert passing < ours.steps  # more than one pass in an epoch
    passes = (
        ours.data.train_batches(batch_size=size, seed=3 + 2**31, epoch=epoch) for epoch in count()
    )
    expected = [x for x, _ in islice(chain.from_iterable(passes), 2 * ours.steps)]
    for epoch, step in ((0, 0), (0, passing + 1), (1, 2)):
        ours.epoch, ours.step = epoch, step
        at = epoch * ours.steps + step
        for image, wanted in zip(ours._extra_images(), expected[at:], strict=False):
            assert torch.equal(image, wanted)
    assert not torch.equal(expected[0], expected[passing])


def test_too_few_images_to_run_forward_only_are_refused():
    with pytest.raises(ValueError, match="nbs=2048: a step needs 1984 forward-only images") as said:
        worker.construct(resolved("norm=virtual", "nbs=2048"))
    assert "\n" not in str(said.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+norm.reference=2", "norm.reference: norm=virtual has no such option"),
        ("+norm.extra=2", "norm.extra: norm=virtual has no such option"),
    ],
)
def test_what_the_loop_cannot_feed_is_refused(override, message):
    with pytest.raises(ValueError, match=message):
        worker.construct(resolved("norm=virtual", "nbs=128", override))


@pytest.mark.parametrize(
    ("stop_at", "norm"),
    [
        *(
            (at, norm)
            for at in (1, 7, 15)
            for norm in (("norm=ghost", "nbs=8"), ("norm=virtual", "nbs=300"))
        ),
        (7, ("norm=ghost", "nbs=8", "order=sorted")),
        (7, ("norm=ghost", "nbs=8", "order=4x2")),
        (7, ("norm=separate", "norm.num_domains=2", "domains=[none,pgd-4]", "evals=[val:ema]")),
    ],
)
def test_a_state_restored_anywhere_continues_bit_for_bit(tmp_path, stop_at, norm):
    cfg = resolved(*norm, "ema_bank=[0.5]")
    whole = trainer(cfg, tmp_path)
    parted = trainer(cfg, tmp_path)

    class Enough(Exception):
        pass

    def stop_there():
        if parted.step == stop_at:
            parted.save()
            raise Enough

    parted._save_if_due = stop_there
    with pytest.raises(Enough):
        parted.train_epoch()
    torch.manual_seed(999)  # whatever happened to the global generator in between
    resumed = trainer(cfg, tmp_path)
    resumed.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    for run in (whole, resumed):
        while run.epoch < 2:
            run.train_epoch()
    assert whole.history == resumed.history
    for a, b in zip(
        whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b)
    for name, value in whole.bank.population(0.5).items():
        assert torch.equal(value.var, resumed.bank.population(0.5)[name].var)


@pytest.mark.parametrize("order", ["sorted", "4x2"])
def test_the_loop_takes_the_order_and_its_own_number_of_steps(tmp_path, order):
    cfg = resolved("norm=renorm", "nbs=16", "model.width=4", "epochs=1", f"order={order}")
    seen = []
    ours = trainer(cfg, tmp_path)
    step = ours._train_step
    ours._train_step = lambda x, y, extra: (seen.append(y), step(x, y, extra))
    ours.train_epoch()
    named = Order.parse(order)
    labels = ours.data.labels("train")
    batches = data.epoch_batches(labels, named, batch_size=64, seed=3, epoch=0)
    assert [y.tolist() for y in seen] == labels[batches].tolist()
    used = ours.data.train_size(named)
    assert len(seen) == ours.steps == used // 64
    job = worker.construct(cfg)
    assert (job.steps, job.dropped) == (ours.steps, ours.data.size("train") - 64 * ours.steps)
    (forwards,) = {layer.forwards for layer in job.model.modules() if hasattr(layer, "forwards")}
    assert forwards == ours.steps  # the schedule of a layer ends with the training


def test_bf16_keeps_weights_and_statistics_in_float32(tmp_path):
    ours = trainer(resolved("norm=ghost", "nbs=8", "precision=bf16"), tmp_path)
    ours.train_epoch()
    assert {v.dtype for v in ours.model.state_dict().values()} == {torch.float32, torch.int64}
    assert math.isfinite(ours.history[0]["train_loss"])


def test_channels_last_changes_only_rounding(tmp_path):
    rows = []
    for layout in ("false", "true"):
        ours = trainer(resolved("norm=bn", f"channels_last={layout}"), tmp_path)
        ours.train_epoch()
        rows.append(ours.history[0]["train_loss"])
    assert rows[0] == pytest.approx(rows[1], rel=1e-2)


def test_the_data_of_an_epoch_is_every_image_once():
    dataset = data.find("digits")("data", seed=0)
    seen = sum(len(y) for _, y in dataset.train_batches(batch_size=1, seed=0, epoch=0))
    assert seen == dataset.size("train")
    assert isinstance(build.norm(resolved("norm=none"))(3), nn.Module)


@pytest.mark.slow  # the compiler works for most of a minute
def test_a_compiled_network_learns_the_same_and_resumes(tmp_path):
    def run(compiled, epochs=2):
        ours = trainer(resolved("norm=ghost", "nbs=8", "epochs=2"), tmp_path)
        ours.forward = torch.compile(ours.model) if compiled else None
        for _ in range(epochs):
            ours.train_epoch()
        ours.save()
        return ours

    eager, compiled = run(False), run(True)
    for ours, theirs in zip(compiled.history, eager.history, strict=True):
        assert ours["train_loss"] == pytest.approx(theirs["train_loss"], rel=0.05)
    assert compiled.model.state_dict().keys() == eager.model.state_dict().keys()

    run(True, epochs=1)
    resumed = trainer(resolved("norm=ghost", "nbs=8", "epochs=2"), tmp_path)
    resumed.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    resumed.forward = torch.compile(resumed.model)
    resumed.train_epoch()
    assert resumed.history == compiled.history
