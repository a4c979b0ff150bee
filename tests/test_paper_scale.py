"""The papers' protocol at `scale=paper`: what it composes to; and it runs, on tiny images."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from normlab import config, data, experiment
from normlab.batchplan import BatchPlan
from normlab.data.streams import Stream, generator
from normlab.runs import RunDir

CLASSES, TRAIN, VAL = 3, 58, 6
"""Of a class's training images 50 are held apart: 8 are left."""

BATCHES = {  # SGD batches over 8 GPUs, by experiment
    "batch_stats_inference": {1024},
    "ema_decay": {8192},
    "ema_vs_precise": {256, 8192},
    "gn_batch": {16, 32, 64, 128, 256, 1024},
    "gn_groups": {256},
    "nbs": {1024},
    "nbs_forms": {1024},
    "nbs_noise": {1024},
    "norms": {256},
    "precise_batch": {1024},
    "precise_samples": {8192},
    "renorm": {16, 32, 64, 128, 256},
}


def _cell(name: str, axes: dict) -> tuple[dict, BatchPlan]:
    words = [f"{key}={experiment.spelled(value)}" for key, value in axes.items()]
    composed = config.compose([f"experiment={name}", "scale=paper", *words])
    config.check(composed)
    return composed, config.plan_of(composed)


def _assert_protocol(name: str, composed: dict, plan: BatchPlan) -> None:
    """100 epochs over 8 ranks, 0.1 per 256 images, less at 30, 60 and 90, all weights decay."""
    recipe = composed["recipe"]
    assert (plan.world_size, composed["epochs"]) == (8, 100)
    assert plan.batch_size in BATCHES[name]
    assert (composed["lr"], recipe["lr_batch"], recipe["gamma"]) == (0.1, 256, 0.1)
    assert [100 * at for at in recipe["milestones"]] == pytest.approx([30, 60, 90])
    assert (recipe["weight_decay"], recipe["decay_norm"]) == (1e-4, True)
    assert composed["eval_last"] >= 5  # the median of the last five
    assert (composed["data"]["name"], composed["data"]["size"]) == ("imagenet", 224)
    assert (composed["model"]["depth"], composed["model"]["zero_init_last"]) == (50, True)


@pytest.mark.parametrize("name", BATCHES)
def test_each_experiment_has_the_papers_protocol(name: str) -> None:
    _assert_protocol(name, *_cell(name, experiment.load(name).cells("paper")[0].axes))


@pytest.mark.slow  # every cell
@pytest.mark.parametrize("name", BATCHES)
def test_each_cell_has_the_papers_protocol_and_a_plan(name: str) -> None:
    seen = set()
    for cell in experiment.load(name).cells("paper"):
        if cell.axes["seed"] == 100:
            composed, plan = _cell(name, cell.axes)
            _assert_protocol(name, composed, plan)
            assert plan.nbs == cell.at.get("nbs", plan.nbs)
            seen.add(plan.batch_size)
    assert seen == BATCHES[name]


@pytest.mark.parametrize(("nbs", "group"), [(256, 2), (512, 4), (1024, 8)])
def test_gpus_together_form_what_one_cannot_hold(nbs: int, group: int) -> None:
    _, plan = _cell("nbs", {"arm": f"sync-{nbs}", "seed": 100})
    assert (plan.nbs, plan.sync_group, plan.micro_batch, plan.accumulation) == (nbs, group, 128, 1)


# -- a tiny ImageNet ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Digits as PNG files of a few sizes, where ImageNet would lie."""
    digits, root = load_digits(), tmp_path_factory.mktemp("tree")
    for label in range(CLASSES):
        images = digits.images[digits.target == label]
        for split, first, last in (("train", 0, TRAIN), ("val", TRAIN, TRAIN + VAL)):
            folder = root / "imagenet" / split / f"n{label:08}"
            folder.mkdir(parents=True)
            for number in range(first, last):
                pixels = Image.fromarray((images[number] * 15).astype(np.uint8))
                size = (36 + number % 5, 40)
                pixels.resize(size).convert("RGB").save(folder / f"{number}.png")
    return root


def _train(tree: Path, where: Path, *overrides: str) -> subprocess.Popen[str]:
    """`normlab train scale=paper` over two ranks, with what must shrink overridden."""
    shrunk = [
        "world_size=2", "device=cpu", "batch_size=8", "epochs=1", "eval_last=1", "data.size=32",
        "data.workers=1", "evals=[train:augmented,test:ema]", f"data_root={tree}",
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "normlab", "train", "scale=paper", *shrunk, *overrides],
        cwd=where, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        process_group=0, env=os.environ | {"NORMLAB_CACHE": str(where / "cache")},
    )  # fmt: skip


def _assert_done(process: subprocess.Popen[str], where: Path, epochs: int) -> None:
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    (path,) = (where / "runs").glob("resnet50-*")
    run = RunDir(path)
    status = run.status()
    assert (status["status"], status["epoch"]) == ("done", epochs)
    counted = {row["protocol"]: int(row["n"]) for row in run.evals()}
    assert counted == {"train:augmented": 8 * CLASSES, "test:ema": VAL * CLASSES}
    assert len(list((where / "cache").glob("digest-*.txt"))) == 1


def test_it_runs_over_two_ranks_with_workers_of_their_own(tree: Path, tmp_path: Path) -> None:
    """With the shallowest of the ResNets."""
    _assert_done(_train(tree, tmp_path, "model.depth=18"), tmp_path, 1)


@pytest.mark.slow  # ResNet-50, started twice
def test_it_stops_with_its_workers_and_goes_on(tree: Path, tmp_path: Path) -> None:
    options = ("epochs=3", "norm=sync", "data.workers=2")
    process = _train(tree, tmp_path, *options)
    assert process.stdout
    while not list(tmp_path.glob("runs/*/metrics.csv")):
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(60) == 143, process.stdout.read()
    _assert_done(_train(tree, tmp_path, *options), tmp_path, 3)


def test_a_rank_decodes_its_own_images_alone(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank's are gone, and it does not notice; what is missing is named by a worker."""
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))
    root = tmp_path / "copy"
    root.mkdir()
    subprocess.run(["cp", "-r", str(tree / "imagenet"), str(root)], check=True)
    dataset = data.find("imagenet")(str(root), seed=0, size=32, workers=1)
    options = {"batch_size": 8, "seed": 0, "epoch": 0}
    whole = torch.cat([x for x, _ in dataset.train_batches(**options)])
    drawn = generator(Stream.TRAIN_ORDER, 0, 0).permutation(dataset.size("train"))
    others = drawn.reshape(-1, 2, 4)[:, 1].ravel()
    for image in others:
        Path(dataset._samples["train"][image][0]).write_text("gone")
    mine = torch.cat([x for x, _ in dataset.train_batches(**options, places=range(4))])
    assert torch.equal(mine, whole.view(-1, 2, 4, *whole.shape[1:])[:, 0].flatten(0, 1))
    with pytest.raises(ValueError, match=r"\.png is not an image that can be decoded$"):
        list(dataset.train_batches(**options, places=range(4, 8)))
