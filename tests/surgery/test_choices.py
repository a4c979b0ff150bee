"""Choices on the way through `convert`: the owner's, and none that contradict each other."""

import pytest
from torch import nn

from normlab.norms import BatchNorm, normalization
from normlab.surgery import convert


def test_within_a_context_a_layer_hands_over_what_its_owner_chose():
    """The context ends for the old layer alone."""
    net = nn.Sequential(BatchNorm(4, update=False))
    with normalization(net, statistics="population", group_size=2):
        convert(net, "ghost", nbs=4)
    assert net[0].own == (None, False, None)
    assert not net[0].frozen


@pytest.mark.parametrize(
    ("old", "options", "message"),
    [
        (nn.BatchNorm2d(4, track_running_stats=False), {"update": True}, "update=True moves them"),
        (BatchNorm(4, update=True), {"statistics": "population"}, "update=True needs statistics="),
    ],
)
def test_choices_that_contradict_the_old_layer_are_refused(old, options, message):
    """P50: also where they come from two sides."""
    with pytest.raises(ValueError, match=message):
        convert(nn.Sequential(old), "bn", **options)
