"""The data set that tests of other rooms stand on."""

import pytest

from normlab import data

load = data.find("synthetic")


def test_sizes_and_shape() -> None:
    made = load("", seed=0, n=100, classes=5, size=6, channels=1)
    assert [made.size(s) for s in ("train", "val", "test")] == [100, 25, 25]
    assert made.shape == (1, 6, 6)
    assert made.num_classes == 5


def test_the_digest_follows_the_options_not_the_seed() -> None:
    assert load("", seed=0).digest == load("", seed=1).digest
    assert load("", seed=0).digest != load("", seed=0, n=516).digest


@pytest.mark.parametrize("wrong", [{"channels": 2}, {"size": 0}, {"classes": 1}, {"n": 39}])
def test_impossible_sizes_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"data\.{next(iter(wrong))}="):
        load("", seed=0, **wrong)
