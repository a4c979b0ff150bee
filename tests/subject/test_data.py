"""Every kind of data, against the pixels themselves; the same batches in every pass."""

import io
import sys
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from normlab.subject import load_batches

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])  # ImageNet's


def pictures(number=10, side=6):
    return np.random.default_rng(0).integers(0, 256, (number, side, side, 3), dtype=np.uint8)


def png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def normalized(pixels):
    """(N, H, W, 3) uint8 as a network gets it, (N, 3, H, W), in float64."""
    return ((pixels / 255 - MEAN) / STD).transpose(0, 3, 1, 2)


def folder(at, pixels):
    """Image i in class i % 2, whose names do not sort as numbers do."""
    for i, image in enumerate(pixels):
        place = at / "folder" / ("cats", "dogs")[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{i}.png").write_bytes(png(image))
    return at / "folder"


def flat(at, pixels):
    (at / "flat").mkdir()
    for i, image in enumerate(pixels):
        (at / "flat" / f"{i}.PNG").write_bytes(png(image))
    return at / "flat"


def parquet(at, pixels, label="label", shards=3):
    for shard in range(shards):
        rows = range(shard, len(pixels), shards)
        images = [{"bytes": png(pixels[i]), "path": None} for i in rows]
        table = pa.table({"image": images, label: [i % 2 for i in rows]})
        pq.write_table(table, at / f"train-{shard}.parquet", row_group_size=3)
    return at / "train-*.parquet"


def unlabelled_parquet(at, pixels):
    return parquet(at, pixels, label="caption_number")


def npz(at, pixels):
    np.savez(at / "a.npz", images=pixels, labels=np.arange(len(pixels), dtype=np.uint8) % 2)
    return at / "a.npz"


def npy(at, pixels):
    np.save(at / "a.npy", pixels.transpose(0, 3, 1, 2))
    return at / "a.npy"


KINDS = {folder: True, flat: False, parquet: True, unlabelled_parquet: False, npz: True, npy: False}


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_image_comes_once_with_its_label_in_every_pass_alike(tmp_path, kind):
    pixels = pictures()
    batches = load_batches(str(kind(tmp_path, pixels)), batch_size=4)
    assert (len(batches), batches.samples, batches.labelled) == (3, 10, KINDS[kind])
    passes = [list(batches) for _ in range(2)]
    for (x, y), (again, y_again) in zip(*passes, strict=True):
        assert torch.equal(x, again)
        assert (y is None and y_again is None) or torch.equal(y, y_again)
    assert [len(x) for x, _ in passes[0]] == [4, 4, 2]
    found = np.concatenate([x.double().numpy() for x, _ in passes[0]])
    assert found.shape == (10, 3, 6, 6)
    distances = np.abs(found[:, None] - normalized(pixels)[None]).reshape(10, 10, -1).max(2)
    which = distances.argmin(1)
    assert sorted(which) == list(range(10))
    assert distances.min(1).max() < 1e-5
    assert list(which) != list(range(10))  # shuffled
    if KINDS[kind]:
        assert [int(label) for _, y in passes[0] for label in y] == [i % 2 for i in which]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_some_samples_are_a_random_draw(tmp_path, kind):
    spec = str(kind(tmp_path, pictures()))
    draws = [load_batches(spec, batch_size=2, samples=3, seed=seed) for seed in range(4)]
    assert {(draw.samples, len(draw)) for draw in draws} == {(3, 2)}
    together = [torch.cat([x for x, _ in draw]) for draw in draws]
    assert not all(torch.equal(together[0], other) for other in together)
    assert load_batches(spec, batch_size=2, samples=99).samples == 10


def test_a_part_of_sorted_parquet_has_rows_of_all_its_row_groups(tmp_path):
    pixels = pictures(64, side=2)
    pixels[:, 0, 0, 0] = np.arange(64)
    images = [{"bytes": png(image), "path": None} for image in pixels]
    table = pa.table({"img": images, "label": [i // 8 for i in range(64)]})
    pq.write_table(table, tmp_path / "sorted.parquet", row_group_size=8)
    batches = load_batches(str(tmp_path / "sorted.parquet"), batch_size=16, samples=32)
    labels = [set(y.tolist()) for _, y in batches]
    assert set().union(*labels) == set(range(8))
    assert min(map(len, labels)) >= 4  # and each batch is mixed


def test_the_buffer_of_parquet_is_bounded_and_loses_no_row(tmp_path, monkeypatch):
    from normlab.subject import _parquet

    pixels = pictures(40)
    spec = str(parquet(tmp_path, pixels))
    monkeypatch.setattr(_parquet, "BUFFER", 5 * len(png(pixels[0])))
    found = np.concatenate([x.double().numpy() for x, _ in load_batches(spec, batch_size=8)])
    expected = normalized(pixels)
    order = np.lexsort(found.reshape(40, -1).T), np.lexsort(expected.reshape(40, -1).T)
    np.testing.assert_allclose(found[order[0]], expected[order[1]], atol=1e-5)


def test_images_are_resized_and_cropped_as_torchvisions_reference_does(tmp_path):
    """A step in the middle stays in the middle; 8 of 256/224 * 8 = 9 pixels are kept."""
    from torchvision.transforms import v2

    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    (tmp_path / "a.png").write_bytes(png(pixels))
    [(x, _)] = load_batches(str(tmp_path), batch_size=1, size=8, mean=[0], std=[1])
    reference = v2.Compose([v2.Resize(9), v2.CenterCrop(8), v2.PILToTensor()])
    expected = reference(Image.fromarray(pixels))
    assert torch.equal((x[0] * 255).round().byte(), expected)
    # what has the size already is left alone
    (tmp_path / "a.png").write_bytes(png(pixels[:8, :8]))
    [(x, _)] = load_batches(str(tmp_path), batch_size=1, size=8, mean=[0], std=[1])
    assert torch.equal((x[0] * 255).round().byte().permute(1, 2, 0), torch.tensor(pixels[:8, :8]))


def test_arrays_that_are_no_images_are_taken_as_they_are(tmp_path):
    x = np.random.default_rng(0).standard_normal((5, 2, 7))
    np.savez(tmp_path / "a.npz", x=x, y=np.linspace(0, 1, 5))
    [(found, y)] = load_batches(str(tmp_path / "a.npz"), batch_size=8)
    order = [int(np.abs(x[:, 0, 0] - float(row[0, 0])).argmin()) for row in found]
    assert sorted(order) == list(range(5))
    np.testing.assert_allclose(found.numpy(), x[order], rtol=1e-6)
    np.testing.assert_allclose(y.numpy(), np.linspace(0, 1, 5)[order], rtol=1e-6)
    [(shifted, _)] = load_batches(
        str(tmp_path / "a.npz"), batch_size=8, mean=[1, -1], std=[2, 4]
    )  # fmt: skip
    expected = (x - np.array([1, -1])[:, None]) / np.array([2, 4])[:, None]
    np.testing.assert_allclose(shifted.numpy(), expected[order], rtol=1e-5, atol=1e-6)


def test_grey_images_are_scaled_alone(tmp_path):
    pixels = pictures()[..., 0]
    np.save(tmp_path / "a.npy", pixels)
    [(x, y)] = load_batches(str(tmp_path / "a.npy"), batch_size=10)
    assert x.shape == (10, 1, 6, 6)
    assert y is None
    np.testing.assert_allclose(np.sort(x.flatten()), np.sort(pixels.ravel() / 255), rtol=1e-6)


def test_threads_change_nothing(tmp_path):
    spec = str(folder(tmp_path, pictures()))
    alone, helped = (list(load_batches(spec, batch_size=3, workers=n)) for n in (0, 3))
    assert all(
        torch.equal(a, b) for one, other in zip(alone, helped, strict=True)
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip


def test_ranks_share_the_batches_of_one_process(tmp_path):
    batches = load_batches(str(npz(tmp_path, pictures())), batch_size=2)
    shares = [batches.of_rank(rank, 3) for rank in range(3)]
    assert [len(share) for share in shares] == [2, 2, 1]
    alone = list(batches)
    for rank, share in enumerate(shares):
        for (x, y), (expected, labels) in zip(share, alone[rank::3], strict=True):
            assert torch.equal(x, expected)
            assert torch.equal(y, labels)


def test_a_shorter_last_batch_can_be_left_out(tmp_path):
    batches = load_batches(str(npz(tmp_path, pictures())), batch_size=4)
    whole = batches.whole()
    assert [len(x) for x, _ in whole] == [4, 4]
    assert (len(whole), whole.samples) == (2, 8)
    assert [len(list(whole.of_rank(rank, 2))) for rank in range(2)] == [1, 1]


CODE = """
import torch
calls = []

def make_batches():
    calls.append(1)
    for n in (4, 4, 4):
        yield {"image": torch.full((n, 2), float(len(calls))), "boxes": [torch.zeros(1, 4)] * n}

def sized(batch_size):
    return [torch.zeros(batch_size, 2)] * 3

def fails():
    yield torch.zeros(2, 2)
    raise KeyError("colour")
"""


@pytest.fixture
def code(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "batches_of_mine.py").write_text(CODE)
    yield tmp_path / "batches_of_mine.py"
    sys.modules.pop("batches_of_mine", None)


def test_a_users_function_is_called_anew_for_each_pass(code):
    batches = load_batches(f"{code}:make_batches", batch_size=64, samples=5)
    first, second = list(batches), list(batches)
    assert [len(batch["boxes"]) for batch in first] == [4, 4]  # 5 samples are in two batches
    assert float(second[0]["image"][0, 0]) == float(first[0]["image"][0, 0]) + 1
    assert (batches.samples, batches.batch_size) == (None, None)
    with pytest.raises(TypeError):
        len(batches)
    told = load_batches(f"{code}:sized", batch_size=7)
    assert [len(batch) for batch in told] == [7, 7, 7]
    assert told.batch_size == 7
    with pytest.raises(ValueError, match=r"fails failed at .*:15: KeyError: 'colour'"):
        list(load_batches(f"{code}:fails", batch_size=1))


def test_memory_does_not_grow_with_the_number_of_batches(tmp_path):
    """What 48 more images take is a list of their names."""
    pixels = pictures(64, side=64)

    def peak(number):
        (tmp_path / str(number)).mkdir()
        batches = load_batches(str(flat(tmp_path / str(number), pixels[:number])), batch_size=4)
        next(iter(batches))  # imports
        tracemalloc.start()
        for _ in batches:
            pass
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    assert peak(64) - peak(16) < 48 * pixels[0].nbytes / 10


@pytest.mark.parametrize(
    ("spec", "options", "said"),
    [
        ("nowhere", {}, "data is a folder of images, .*, not 'HERE/nowhere'; there is no folder"),
        ("a.txt", {}, "data is a folder of images, .*, not 'HERE/a.txt'"),
        ("a.npz", {"batch_size": 0}, "a batch has at least one sample, not 0"),
        ("a.npz", {"samples": 0}, "samples must be at least 1, not 0"),
        ("a.npz", {"size": 8}, "holds samples of 6x6, which are not resized to 8"),
        ("a.npz", {"mean": [1, 2]}, "mean has 2 values, and the data 3 channels"),
        ("a.npz", {"std": [0.0]}, "std must be above 0"),
        ("b.npz", {}, "cannot be read as arrays: it has no array x or images, but"),
        ("c.npz", {}, "holds 10 samples and 9 labels"),
        ("d.npy", {}, "cannot be read as arrays: .*Python objects"),
        ("e.npz", {}, "cannot be read as arrays"),
        ("none.npz", {}, "there is no file"),
        ("none-*.parquet", {}, "there is no file .*none-"),
        ("e.parquet", {}, "cannot be read as Parquet"),
        ("f.parquet", {}, r"has no column img or image: \['text'\]"),
        ("g.parquet", {}, "row 0 of group 0: not an image that can be decoded"),
        ("h.parquet", {}, "row 0 of group 0: column 'label' holds no number of a class"),
        ("empty", {}, "holds no images; name its files, as in HERE/empty/a.parquet"),
        ("sizes", {}, "b.png has 3x2 pixels and .*a.png 2x2: --image-size makes them alike"),
        ("broken", {}, "a.png is not an image that can be decoded"),
        ("mixed", {}, "has images side by side and in sub-folders"),
    ],
)
def test_what_cannot_be_read_is_refused_in_a_line(tmp_path, spec, options, said):
    pixels = pictures()
    np.savez(tmp_path / "a.npz", x=pixels, y=np.zeros(10, dtype=int))
    np.savez(tmp_path / "b.npz", z=pixels)
    np.savez(tmp_path / "c.npz", x=pixels, y=np.zeros(9, dtype=int))
    np.save(tmp_path / "d.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    for name in ("a.txt", "e.npz", "e.parquet"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "f.parquet")
    damaged = [{"bytes": b"no image", "path": None}]
    pq.write_table(pa.table({"image": damaged}), tmp_path / "g.parquet")
    named = [{"bytes": png(pixels[0]), "path": None}]
    pq.write_table(pa.table({"image": named, "label": ["cat"]}), tmp_path / "h.parquet")
    for place in ("empty", "sizes", "broken", "mixed/in"):
        (tmp_path / place).mkdir(parents=True)
    (tmp_path / "empty" / "a.parquet").touch()
    (tmp_path / "sizes" / "a.png").write_bytes(png(pixels[0, :2, :2]))
    (tmp_path / "sizes" / "b.png").write_bytes(png(pixels[0, :2, :3]))
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    for place in ("mixed/a.png", "mixed/in/a.png"):
        (tmp_path / place).write_bytes(png(pixels[0]))
    here = str(tmp_path)
    with pytest.raises(ValueError, match=said.replace("HERE", here)) as refused:
        read_in_some_orders(f"{here}/{spec}", **{"batch_size": 64, **options})
    assert len(str(refused.value).splitlines()) == 1


def read_in_some_orders(spec, **options):
    """Of two images, either may come first."""
    for seed in range(4):
        list(load_batches(spec, seed=seed, **options))
