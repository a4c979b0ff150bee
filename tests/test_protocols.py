"""Protocol specs: what they mean, that they survive a round trip, and what is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from normlab.domains import Domain
from normlab.protocols import SPLITS, Protocol


@pytest.mark.parametrize(
    ("spec", "protocol"),
    [
        ("train:augmented", Protocol("train", "augmented")),
        ("val:ema", Protocol("val", "ema")),
        ("test:ema/decay:0.99", Protocol("test", "ema", decay=0.99)),
        (
            "test:ema/corrected:true/decay:0.9",
            Protocol("test", "ema", decay=0.9, corrected=True),
        ),
        ("test:batch/batch:8/order:3", Protocol("test", "batch", batch=8, order=3)),
        ("val:batch/pattern:16x2", Protocol("val", "batch", pattern="16x2")),
        ("val:batch/order:2/pattern:sorted", Protocol("val", "batch", order=2, pattern="sorted")),
        ("val:batch/pattern:shuffled", Protocol("val", "batch")),
        ("val:batch/pattern:trained", Protocol("val", "batch", pattern="trained")),
        ("val:ema/shift:contrast-5", Protocol("val", "ema", shift="contrast-5")),
        ("val:batch/batch:8/shift:none", Protocol("val", "batch", batch=8, shift="none")),
        ("val:adapted/shift:jpeg-1", Protocol("val", "adapted", shift="jpeg-1")),
        ("val:adapted/shift:jpeg-1/stats:jpeg-1", Protocol("val", "adapted", shift="jpeg-1")),
        (
            "test:adapted/samples:64/shift:none/stats:tint-2",
            Protocol("test", "adapted", samples=64, shift="none", stats="tint-2"),
        ),
        ("test:precise/stats:blur-2", Protocol("test", "precise", stats="blur-2")),
        ("test:ema/shift:pgd-8", Protocol("test", "ema", shift="pgd-8")),
        (
            "val:precise/shift:each/stats:each",
            Protocol("val", "precise", shift="each", stats="each"),
        ),
        ("val:adapted/shift:each/stats:each", Protocol("val", "adapted", shift="each")),
        (
            "val:precise_mean/samples:100/batch:2",
            Protocol("val", "precise_mean", batch=2, samples=100),
        ),
    ],
)
def test_a_spec_is_read(spec, protocol):
    assert Protocol.parse(spec) == protocol
    assert Protocol.parse(str(protocol)) == protocol


@given(
    split=st.sampled_from(SPLITS),
    statistics=st.sampled_from(["precise", "precise_mean", "precise_layerwise"]),
    batch=st.none() | st.integers(2, 4096),
    samples=st.none() | st.integers(2, 10**6),
    order=st.integers(0, 999),
)
def test_writing_and_reading_agree(split, statistics, batch, samples, order):
    protocol = Protocol(split, statistics, batch=batch, samples=samples, order=order)
    assert Protocol.parse(str(protocol)) == protocol


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("valid:ema", "train, val, test"),
        ("val:moving", "precise"),
        ("val", "split"),
        ("val:augmented", "train:augmented"),
        ("val:ema/batch:2", "allowed, once: decay, corrected, shift"),
        ("val:ema/stats:none", "allowed, once: decay, corrected, shift"),
        ("val:ema/corrected:true", "corrected needs /decay:<d>, which ema_bank tracks"),
        ("val:ema/decay:0.9/corrected:false", "corrected must be true, or left out, got 'false'"),
        ("val:precise/corrected:true", "option 'corrected:true'"),
        ("val:batch/shift:none/stats:none", "option 'stats:none'"),
        ("train:augmented/shift:none", "allowed, once: none"),
        ("val:ema/shift:fog-1", r"val:ema/shift:fog-1': no domain 'fog-1' \(domains: none, contr"),
        ("val:adapted", "adapted needs /shift:<domain>"),
        ("val:adapted/stats:jpeg-1", "adapted needs /shift:<domain>"),
        ("val:adapted/shift:pgd-8", "no statistics of pgd-8"),
        ("val:precise/stats:pgd-1", "no statistics of pgd-1"),
        ("val:precise/shift:none/stats:each", "stats:each is for shift:each"),
        ("val:batch/batch:1", "at least 2"),
        ("val:batch/batch:2/batch:4", "once"),
        ("val:precise/samples:many", "number"),
        ("val:ema/decay:1", "below 1"),
        ("val:ema/decay:-0.5", "at least 0"),
        ("val:ema/decay:nan", "at least 0 and below 1"),
        ("val:batch/order:1000", r"order must be one of 0\.\.999, got order:1000"),
        ("val:precise/order:-1", r"0\.\.999"),
        (
            "val:batch/pattern:4by2",
            "pattern must be trained, shuffled, sorted or .*, got pattern:4by2",
        ),
        ("val:precise/pattern:4x2", "allowed, once: batch, samples, order"),
        ("val:batch/batch:99999999999999999999", r"below 2\*\*31"),
    ],
)
def test_a_wrong_spec_is_refused_in_one_line(spec, says):
    with pytest.raises(ValueError, match=says) as error:
        Protocol.parse(spec)
    assert spec in str(error.value)
    assert "\n" not in str(error.value)


def test_each_stands_for_the_domains_of_a_run():
    two = [Domain(), Domain("tint", 2)]
    shifts = Protocol.parse("val:precise/batch:8/shift:each").of_each(two)
    assert [str(p) for p in shifts] == [
        "val:precise/batch:8/shift:none", "val:precise/batch:8/shift:tint-2",
    ]  # fmt: skip
    own = Protocol.parse("val:precise/shift:each/stats:each").of_each(two)
    assert str(own[1]) == "val:precise/shift:tint-2/stats:tint-2"
    with pytest.raises(ValueError, match="no statistics of pgd-1"):
        Protocol.parse("val:adapted/shift:each").of_each([Domain("pgd", 1)])
