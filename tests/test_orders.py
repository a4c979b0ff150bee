"""Orders of training by name: what they mean, and what is refused."""

import pytest

from normlab.orders import SHUFFLED, Order


@pytest.mark.parametrize(
    ("spec", "order", "group"),
    [
        ("shuffled", SHUFFLED, 1),
        ("sorted", Order("sorted"), 1),
        ("16x2", Order("16x2", 16, 2), 32),
        ("1x8", Order("1x8", 1, 8), 8),
    ],
)
def test_an_order_is_read_and_written(spec, order, group):
    assert Order.parse(spec) == order
    assert (str(order), order.group, order.patterned) == (spec, group, group > 1)


@pytest.mark.parametrize(
    "spec",
    ["", "random", "Sorted", "x2", "4x", "4x2x2", "0x4", "4x0", "-4x2", "04x2", "4 x 2", "4X2",
     "4x2 ", "4x2\n", "٤x٢", "1x1", "9999999999x1"],
)  # fmt: skip
def test_anything_else_is_refused_with_what_is_allowed(spec):
    with pytest.raises(ValueError, match="order must be shuffled, sorted or <labels>x<samples"):
        Order.parse(spec)
