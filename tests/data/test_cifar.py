"""CIFAR from Parquet, from torchvision's folder, and from nowhere."""

import os
import pickle
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision.datasets

from normlab import data
from normlab.data import cifar, parquet
from normlab.data.memory import InMemory, average_pool, pack, unpack

from .conftest import write_cifar, write_parquet

PIXELS = np.random.default_rng(4).integers(0, 256, (400, 32, 32, 3), dtype=np.uint8)
LABELS = [c for c in range(10) for _ in range(40)]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NORMLAB_CACHE", str(tmp_path / "cache"))


def stored(dataset: InMemory, split: str) -> np.ndarray:
    part = dataset._splits[split]
    return unpack(part.words[part.indices])


def load(root: Path, **options: object) -> InMemory:
    loaded = data.find("cifar10")(str(root), **({"seed": 0} | options))
    assert isinstance(loaded, InMemory)
    return loaded


def test_lossless_images_arrive_unchanged_from_shards(tmp_path: Path) -> None:
    folder = tmp_path / "cifar10"
    for split, pixels in (("train", 255 - PIXELS), ("test", PIXELS)):
        for shard in range(2):
            part = slice(shard * 200, shard * 200 + 200)
            file = folder / f"{split}-0000{shard}-of-00002.parquet"
            write_parquet(file, pixels[part], LABELS[part], kind="PNG", image_column="image")
    dataset = load(tmp_path)
    assert dataset.note == ""
    assert np.array_equal(stored(dataset, "test"), PIXELS)
    assert np.array_equal(dataset._splits["train"].words, pack(255 - PIXELS))
    assert [dataset.size(s) for s in ("train", "val", "test")] == [360, 40, 400]
    for split, per_class in (("val", 4), ("train", 36)):
        labels = torch.cat([y for _, y in dataset.eval_batches(split, batch_size=9, order=None)])
        assert torch.bincount(labels).tolist() == [per_class] * 10


def test_a_lossy_copy_is_noted(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    assert load(tmp_path).note == "JPEG copy of CIFAR-10 (lossy)"


def test_cifar100_takes_the_fine_labels(tmp_path: Path) -> None:
    for split, per_class in (("train", 10), ("test", 1)):
        labels = [c for c in range(100) for _ in range(per_class)]
        pixels = np.resize(PIXELS, (len(labels), 32, 32, 3))
        file = tmp_path / "cifar100" / f"{split}.parquet"
        write_parquet(file, pixels, labels, label_column="fine_label")
    dataset = data.find("cifar100")(str(tmp_path), seed=0, subset=300)
    assert dataset.num_classes == 100
    assert [dataset.size(s) for s in ("train", "val", "test")] == [300, 100, 100]


def test_pooled_images_and_subsets(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    whole, small = load(tmp_path), load(tmp_path, size=8, subset=50, seed=1)
    assert small.shape == (3, 8, 8)
    assert small.digest == whole.digest
    assert np.array_equal(stored(small, "test"), average_pool(stored(whole, "test"), 8))
    labels = torch.cat([y for _, y in small.eval_batches("train", batch_size=50, order=None)])
    assert torch.bincount(labels).tolist() == [5] * 10
    other = load(tmp_path, size=8, subset=50, seed=2)
    assert not np.array_equal(stored(small, "train"), stored(other, "train"))


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"size": 12}, "data.size=12: it must divide 32"),
        ({"size": 0}, "data.size=0"),
        ({"size": 64}, "data.size=64"),
        ({"subset": 15}, "multiple of the 10 classes and at most 360"),
        ({"subset": 370}, "at most 360"),
        ({"augment": "mixup"}, "data.augment=mixup: one of none, crop, flip, crop_flip"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    tmp_path: Path, option: dict[str, object], message: str
) -> None:
    write_cifar(tmp_path)
    with pytest.raises(ValueError, match=message):
        load(tmp_path, **option)


LOADER = """
import sys
from normlab.data import find
print("ready", flush=True); sys.stdin.readline()
d = find("cifar10")(sys.argv[1], seed=0)
x, y = next(d.eval_batches("train", batch_size=360, order=0))
print(d.digest, float(x.double().square().sum()), y.tolist())
"""


def test_two_processes_decode_at_once_and_agree(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", LOADER, str(tmp_path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(2)
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    answers = [racer.communicate()[0] for racer in racers]
    assert [racer.returncode for racer in racers] == [0, 0]
    assert answers[0] == answers[1] != ""
    left = {p.suffix for p in (tmp_path / "cache").iterdir()}
    assert left == {".npy", ".txt", ".lock"}


def test_damaged_parquet_is_one_line(tmp_path: Path) -> None:
    write_cifar(tmp_path)
    file = tmp_path / "cifar10" / "test.parquet"
    file.write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(ValueError, match=r"test\.parquet cannot be read as Parquet") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    assert "[" not in str(caught.value)


@pytest.mark.parametrize("cells", [[b"bare bytes"], [{"path": "0.jpg"}], [None], ["text"]])
def test_another_layout_of_parquet_is_refused_in_one_line(
    tmp_path: Path, cells: list[object]
) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": cells, "label": [0]}), file)
    for read in (parquet.is_jpeg, lambda file: parquet.images([file], 32)):
        with pytest.raises(ValueError, match=r"x\.parquet, row 0: no struct whose `bytes`"):
            read(file)


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    pq.write_table(pa.table({"img": pa.array([], pa.binary()), "label": []}), file)
    with pytest.raises(ValueError, match="it holds no row"):
        parquet.is_jpeg(file)


def test_bad_contents_of_parquet_are_named(tmp_path: Path) -> None:
    file = tmp_path / "x.parquet"
    write_parquet(file, PIXELS[:2, :16, :16], [0, 10])
    with pytest.raises(ValueError, match=r"row 0: image of 16x16, not 32x32"):
        parquet.images([file], 32)
    with pytest.raises(ValueError, match=r"whole numbers 0 \.\. 9"):
        parquet.labels([file], ("label",), 10)
    with pytest.raises(ValueError, match="no column fine_label"):
        parquet.labels([file], ("fine_label",), 100)


@pytest.fixture
def silent_server() -> Iterator[str]:
    """A server that takes the connection and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}/cifar.tar.gz"


def refused(root: Path) -> str:
    with pytest.raises(ValueError, match="data_root=") as caught:
        load(root)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_without_data_and_network_it_says_so_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", "http://127.0.0.1:9/cifar.tar.gz")
    message = refused(tmp_path / "data")
    for part in ("cifar-10-batches-py/", "train.parquet", "NORMLAB_DATA", str(tmp_path / "data")):
        assert part in message
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_never_answers_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, silent_server: str
) -> None:
    monkeypatch.setattr(cifar, "PROBE_SECONDS", 0.2)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "url", silent_server)
    message = refused(tmp_path / "data")
    assert "no answer" in message or "timed out" in message
    assert list(tmp_path.iterdir()) == []


def test_a_download_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Breaks:
        url = "http://127.0.0.1:9/"

        def __init__(self, root: str, **_: bool) -> None:
            (Path(root) / "cifar-10-python.tar.gz").write_bytes(b"half")
            raise RuntimeError("File not found or corrupted.")

    monkeypatch.setattr(cifar, "_probe", lambda _: None)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Breaks)
    assert "File not found or corrupted" in refused(tmp_path / "data")
    assert list(tmp_path.iterdir()) == []


def write_original(folder: Path) -> None:
    """Files in the layout of the original Python version of CIFAR-10, 400 + 400 images."""
    folder.mkdir(parents=True)
    flat = PIXELS.transpose(0, 3, 1, 2).reshape(400, -1)
    for name in [f"data_batch_{k}" for k in range(1, 6)] + ["test_batch"]:
        k = 0 if name == "test_batch" else int(name[-1]) - 1
        part = slice(None) if name == "test_batch" else slice(80 * k, 80 * k + 80)
        content = {"data": flat[part], "labels": LABELS[part]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))


def test_the_original_is_preferred_wherever_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The tiny files have other check sums than the published ones.
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda _: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    write_cifar(tmp_path / "a")
    write_original(tmp_path / "a" / "cifar10" / "cifar-10-batches-py")
    write_original(tmp_path / "b" / "cifar-10-batches-py")
    (tmp_path / "b" / "cifar-10-batches-py" / ".DS_Store").write_text("not part of the data")
    one, other = load(tmp_path / "a"), load(tmp_path / "b")
    assert one.note == ""
    assert one.digest == other.digest
    assert np.array_equal(stored(one, "test"), PIXELS)
    assert one.size("train") == 360


def test_a_download_is_moved_into_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fetches(torchvision.datasets.CIFAR10):
        def download(self) -> None:
            write_original(Path(self.root) / self.base_folder)

        def _check_integrity(self) -> bool:
            return True

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    monkeypatch.setattr(cifar, "_probe", lambda _: None)
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fetches)
    assert np.array_equal(stored(load(tmp_path / "data"), "test"), PIXELS)
    left = [f.name for f in (tmp_path / "data" / "cifar10").iterdir()]
    assert left == ["cifar-10-batches-py"]


def test_a_damaged_original_is_named(tmp_path: Path) -> None:
    write_original(tmp_path / "cifar-10-batches-py")
    with pytest.raises(ValueError, match="incomplete or damaged"):
        load(tmp_path)


@pytest.mark.slow
@pytest.mark.skipif("NORMLAB_DATA" not in os.environ, reason="needs the real CIFAR-10")
def test_the_real_thing() -> None:
    dataset = load(Path(os.environ["NORMLAB_DATA"]))
    assert [dataset.size(s) for s in ("train", "val", "test")] == [45_000, 5_000, 10_000]
    labels = torch.cat([y for _, y in dataset.eval_batches("val", batch_size=500, order=None)])
    assert torch.bincount(labels).tolist() == [500] * 10
