"""Benchmarks measure what they say; how fast anything is, no test says."""

import csv
import math
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from normlab import allocator, norms
from normlab.bench import (
    layer_write,
    layers,
    loading,
    main,
    peers,
    precise,
    precise_rows,
    starting,
    training,
    write,
)
from normlab.bench.images import dataset
from normlab.bench.layers import LayerRow
from normlab.bench.measure import Process, Row, Spread, limit_row, rate_row
from normlab.norms import conv
from normlab.turns import take_turns


def test_spread_is_the_median_and_the_quartiles() -> None:
    assert Spread.of([5.0, 1.0, 2.0, 3.0, 4.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([7.0]) == Spread(7.0, 7.0, 7.0)


def test_a_ratio_above_one_is_faster_and_taken_within_a_round() -> None:
    row = rate_row("a", "b", [1.0, 10.0], [2.0, 20.0], unit="img/s", amount=100, bar=2.0)
    assert row.ratio == Spread(2.0, 2.0, 2.0)  # though the rounds differ tenfold
    assert row.ours.median == 55.0
    assert row.met
    slower = rate_row("a", "b", [2.0], [1.0], unit="img/s", amount=100, bar=0.97)
    assert not slower.met


def test_a_limit_is_met_below_it() -> None:
    assert limit_row("a", [0.1, 0.12], limit=0.15, clock="").met
    assert not limit_row("a", [0.2, 0.3], limit=0.15, clock="").met


def test_turns_alternate_in_order_and_the_first_round_does_not_count() -> None:
    order: list[str] = []
    seconds = take_turns({name: lambda name=name: order.append(name) for name in "ab"}, 2)
    assert order == ["b", "a", "a", "b", "b", "a"]
    assert {name: len(values) for name, values in seconds.items()} == {"a": 2, "b": 2}


def test_no_round_begins_when_the_time_is_over_but_a_median_has_its_rounds() -> None:
    assert len(take_turns({"a": lambda: None}, 10, seconds=0)["a"]) == 3
    assert len(take_turns({"a": lambda: None}, 2, seconds=0)["a"]) == 2
    ticks = iter(range(100))
    seconds = take_turns({"a": lambda: None}, 2, clock=lambda: float(next(ticks)))
    assert seconds == {"a": [1.0, 1.0]}


def test_a_process_runs_when_told_and_a_dead_one_is_noticed() -> None:
    code = "from normlab.bench.measure import serve; serve(lambda: sum(range(200_000)))"
    with Process(code) as process:
        assert process() > 0
        assert process() > 0
    with Process("raise SystemExit(0)") as process, pytest.raises(RuntimeError, match="early"):
        process()


def test_topics_that_start_quickly_yield_their_rows() -> None:
    rows = [starting.help_row(rounds=1), loading.row(rounds=1, batches=1)]
    assert all(row.ours.median > 0 and row.ratio.median > 0 for row in rows)
    assert [row.bar for row in rows] == [1.0, 4.0]


@pytest.mark.slow  # five processes that import torch
def test_topics_that_train_yield_their_rows() -> None:
    rows = [starting.second_run_row(rounds=1), *training.rows(rounds=1, steps=1)]
    assert all(row.ours.median > 0 and row.ratio.median > 0 for row in rows)
    assert [row.bar for row in rows] == [1.0, 0.97, 1.35]


@pytest.mark.parametrize("channels_last", [False, True])
def test_precise_statistics_are_compared_with_fvcores(channels_last: bool) -> None:
    assert precise.row(rounds=1, images=200, channels_last=channels_last).ratio.median > 0


def test_precise_statistics_are_measured_in_both_layouts_with_memory_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    done: list[object] = []
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: done.append("kept"))
    monkeypatch.setattr(precise, "row", lambda **given: done.append(given) or ROW)
    assert precise_rows(rounds=1, images=5) == [ROW, ROW]
    each = {"rounds": 1, "images": 5}
    assert done == ["kept", each | {"channels_last": False}, each | {"channels_last": True}]


def test_both_sides_of_the_data_path_deliver_the_same_amount() -> None:
    assert dataset(256).size("train") == len(loading.PerSample(256))
    x, y = loading.PerSample(3)[0]
    assert tuple(x.shape) == dataset(3).shape
    assert 0 <= y < 10


ROW = Row("a", "b", "img/s", "CPU", Spread(4, 3, 5), Spread(2, 1, 3), Spread(2, 1, 3), 1.5, 9)


def test_the_files_say_on_what_they_were_measured_but_not_whose_it_is(tmp_path: Path) -> None:
    table, figure = write.results([ROW, ROW], tmp_path / "bench")
    first, _ = csv.DictReader(table.open())
    assert (first["ratio_median"], first["ratio_low"], first["met"]) == ("2", "1", "True")
    assert first["cores"] == str(os.cpu_count())
    assert platform.node() not in table.read_text()
    before = figure.read_bytes()
    write.results([ROW, ROW], tmp_path / "bench")
    assert figure.read_bytes() == before


def test_a_row_without_its_peer_is_left_out_and_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    def absent(**_: int) -> Row:
        raise ImportError("No module named 'fvcore'")

    for module, name in ((starting, "help_row"), (starting, "second_run_row"), (loading, "row")):
        monkeypatch.setattr(module, name, lambda **_: ROW)
    monkeypatch.setattr(training, "rows", lambda **_: [ROW])
    monkeypatch.setattr(precise, "row", absent)
    assert main(["runs", "--quick"]) == 0
    said = capsys.readouterr().out
    assert "left out: No module named 'fvcore'" in said
    assert said.count("target 1.50x met") == 4
    assert _written() == ["bench.csv", "bench.svg"]


# -- the layers -----------------------------------------------------------------------------------

CPU = torch.device("cpu")
SMALL = ((32, 8, 4, 4), (8, 4, 3, 3))
"""Of a norm's input, and of a convolution's weight."""


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, shape in zip(("SHAPES", "FILTERS"), SMALL, strict=True):
        monkeypatch.setattr(layers, name, (shape, (0, 0, 0, 0)))  # quick leaves the last one out
    monkeypatch.setattr(layers, "REPEAT", 0.0)
    monkeypatch.setattr(allocator, "keep_freed_memory", lambda: True)


@pytest.mark.usefixtures("small")
def test_every_layer_has_a_row_in_every_cell(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measured: list[LayerRow] = []
    row = layers.row

    def once(*cell: Any, **given: Any) -> LayerRow:
        measured.append(row(*cell, **given | {"rounds": 1}))
        return measured[-1]

    monkeypatch.setattr(layers, "row", once)
    monkeypatch.setattr(layer_write, "_figure", lambda _: b"")  # seconds; it has a test below
    monkeypatch.chdir(tmp_path)
    assert main(["layers", "--quick"]) == 0
    kinds = {layer.kind for layer in layers.layers(0)}
    assert kinds >= {norms.find(name) for name in norms.names()}
    assert kinds >= {conv.find(name) for name in conv.names()}
    cells = {(row.layer, row.variant): [] for row in measured}
    for one in measured:
        cells[one.layer, one.variant].append((one.format, one.dtype))
        assert 0 < one.ours.median < math.inf
        assert one.ratio.median > 0
        assert set(one.refused) <= {"torch LocalResponseNorm"}, one.refused
        assert bool(one.peer) == bool(one.peers)
    assert all(len(set(of)) == len(of) == 4 for of in cells.values())
    for nbs in (2, 4, 8, 16, 32):
        assert ("ghost", f"nbs={nbs}") in cells
    alone = {name for name, row in zip(cells, measured, strict=False) if not row.peers}
    assert alone == {("none", ""), ("cwn", ""), *(("renorm", f"nbs={nbs}") for nbs in (2, 8, 32))}
    assert torch.nn.functional.conv2d is CONV2D
    said = capsys.readouterr().out
    assert f"{len(measured)} rows; limits met" in said
    assert _written() == ["layers.csv", "layers.md", "layers.svg"]


CONV2D = torch.nn.functional.conv2d


def _written() -> list[str]:
    return sorted(path.name for path in Path("results/bench").iterdir())


def _layer(name: str, **options: Any) -> layers.Layer:
    """One of ours for a small shape, by its name and some of its options."""
    return next(
        layer
        for layer in layers.layers(0)
        if layer.name == name and options.items() <= layer.options.items()
    )


def _both(ours: nn.Module, theirs: nn.Module, x: Tensor, dy: Tensor) -> list[list[Tensor]]:
    """Output and gradients of each."""
    results = []
    for layer in (ours, theirs):
        copy = x.clone().requires_grad_()
        y = layer(copy)
        found = [t for t in (copy, *layer.parameters()) if t.requires_grad]
        gradients = torch.autograd.grad(y, found, dy, allow_unused=True)
        results.append([y, *(g for g in gradients if g is not None)])
    return results


SAME = [
    ("bn", {}), ("sync", {}), ("frozen", {"affine": "frozen"}), ("frozen", {"affine": "trainable"}),
    ("ghost", {"nbs": 8, "grouping": "contiguous"}),
    ("ghost", {"nbs": 8, "grouping": "interleaved"}),
    ("gn", {}), ("ln", {}), ("ln_channels", {}), ("ln_elementwise", {}), ("in", {}), ("lrn", {}),
    ("l1", {}), ("separate", {}), ("ws", {}), ("wn", {}),
]  # fmt: skip


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("name", "options"), SAME, ids=str)
def test_peers_compute_what_our_layer_does(name: str, options: dict[str, Any]) -> None:
    layer = _layer(name, **options)
    torch.manual_seed(1)
    x, dy = 2 * torch.randn(2, *layer.shape) + 0.5
    if layer.conv:
        x = torch.randn(5, layer.shape[1], 6, 6)
        dy = torch.randn(5, layer.shape[0], 4, 4)
    others = peers.of(name, layer.options, layer.shape)
    if name == "ghost":  # the two form different groups
        other = "composer" if layer.options["grouping"] == "contiguous" else "cifar10-fast"
        others = {peer: make for peer, make in others.items() if peer.startswith(other)}
    assert others
    for peer, make in others.items():
        torch.manual_seed(2)
        ours = layer.make()
        torch.manual_seed(2)
        theirs = make()
        if name == "frozen":
            state = {"running_mean": torch.randn(8), "running_var": torch.rand(8) + 0.5}
            ours.load_state_dict(state, strict=False)
            getattr(theirs, "layer", theirs).load_state_dict(state, strict=False)
        labels = torch.arange(2).repeat_interleave(16)
        with norms.domains(ours, labels):
            mine, other_ones = _both(ours, theirs, x, dy)
        for got, expected in zip(other_ones[:2], mine[:2], strict=True):
            assert (got - expected).abs().max() < 3e-4, peer
        if name not in ("separate", "wn"):  # parameters of their own, in an order of their own
            torch.testing.assert_close(other_ones[2:], mine[2:], rtol=1e-3, atol=1e-3)


def test_rewritten_peers_move_their_statistics_as_described() -> None:
    x = torch.randn(8, 3, 2, 2, generator=torch.manual_seed(0))
    ours = norms.find("ghost")(3, nbs=2, population="sequential")  # type: ignore[call-arg]
    theirs = peers.ChunkedBatchNorm(3, nbs=2)
    _both(ours, theirs, x, x)
    torch.testing.assert_close(theirs.running_mean, ours.running_mean)
    torch.testing.assert_close(theirs.running_var, ours.running_var)
    strided = peers.ViewBatchNorm(3, groups=4)
    strided(x)
    torch.testing.assert_close(strided.means[3:6], 0.1 * x[1::4].mean((0, 2, 3)))


def test_the_rewritten_renorm_and_virtual_batch_norm_follow_their_formulas() -> None:
    torch.manual_seed(0)
    x, dy = torch.randn(2, 12, 3, 2, 2)
    state = {"running_mean": torch.randn(3), "running_var": torch.rand(3) + 0.5}
    final: Any = norms.find("renorm")
    ours = final(3, start=0.0, r_end=0.0, d_end=0.0)
    theirs = peers.RenormWrittenOut(3)
    for layer in (ours, theirs):
        layer.load_state_dict(state, strict=False)
    mine, other_ones = _both(ours, theirs, x + 3, dy)
    torch.testing.assert_close(other_ones, mine, rtol=1e-4, atol=1e-4)
    virtual: Any = norms.find("virtual")
    mine, other_ones = _both(
        virtual(3, reference=4, gradient="all"), peers.BlendedBatchNorm(3, 4), x, dy
    )
    torch.testing.assert_close(other_ones, mine, rtol=1e-3, atol=1e-3)


def test_an_output_in_another_memory_format_is_charged_for_its_copy() -> None:
    x = torch.randn(8, 3, 2, 2).to(memory_format=torch.channels_last).requires_grad_()
    layer = peers.ViewBatchNorm(3, groups=4)
    assert layer(x).is_contiguous()
    step = layers.Step(layer, x, torch.channels_last)
    assert step.dy.is_contiguous(memory_format=torch.channels_last)
    assert not step.dy.is_contiguous()


def test_what_is_kept_for_the_backward_pass_is_counted() -> None:
    x = torch.randn(64, 4, 8, 8).requires_grad_()
    kept = [
        layers.Step(layer, x, torch.contiguous_format).saved
        for layer in (
            nn.BatchNorm2d(4),
            nn.Identity(),
            nn.Sequential(nn.Sigmoid(), nn.SiLU()),
            Twice(),
        )
    ]
    assert kept == [pytest.approx(1, abs=0.01), 0, 1, 1]  # what is kept twice counts once


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x.sigmoid()
        return y * y


def _made_up(ours: list[float], other: list[float], **changes: Any) -> LayerRow:
    layer = layers.Layer("ghost", nn.Identity, {"nbs": 2}, "nbs=2", (128, 16, 32, 32), False)
    times = {"ours": ours, "native": [2.0, 20.0, 4.0], "slow": [9.0, 90.0, 18.0], "quick": other}
    made = layers._row(layer, "NCHW", "float32", times, saved=1.0, refused={}, clock="CPU")
    return replace(made, **changes)


def test_limits_and_peers_are_judged_within_a_round() -> None:
    at = _made_up([2.0, 20.0, 4.0], [2.0, 20.0, 4.0])
    assert (at.ratio, at.bar, at.met) == (Spread(1, 1, 1), 1.0, True)
    assert (at.peer, at.to_peer, at.level) == ("quick", Spread(1, 1, 1), True)
    assert at.peers == {"slow": 4.5, "quick": 1.0}
    over = _made_up([2.1, 21.0, 4.2], [1.9, 19.0, 3.8])
    assert (over.met, over.level) == (False, False)  # 1.05 of the batch norm, 1.105 of the peer
    assert _made_up([2.1, 21.0, 4.2], [1.91, 19.1, 3.82]).level is True
    assert _made_up([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], bar=None, to_peer=None).met is None


@pytest.mark.parametrize(
    ("name", "options", "format", "limit"),
    [
        ("ghost", {"nbs": 2}, "NCHW", 1.0),
        ("ghost", {"nbs": 2}, "channels_last", None),
        ("frozen", {"affine": "frozen"}, "channels_last", 0.45),
        ("frozen", {"affine": "trainable"}, "NCHW", None),
        ("renorm", {}, "channels_last", 1.35),
        ("renorm", {"nbs": 8}, "NCHW", None),
        ("bn", {}, "NCHW", None),
    ],
)
def test_limits_are_the_declared_ones(
    name: str, options: dict[str, Any], format: str, limit: float | None
) -> None:
    assert layers.bar(name, options, format) == limit


def test_a_page_says_what_was_missed(tmp_path: Path) -> None:
    rows = [
        _made_up([2.1, 21.0, 4.2], [1.9, 19.0, 3.8]),
        _made_up([1.0, 10.0, 2.0], [2.0, 20.0, 4.0], dtype="bfloat16",
                 refused={"a": "no bfloat16"}),
        _made_up([1.0, 1.0, 1.0], [1.0, 1.0, 1.0], layer="wn", shape="16x16x3x3", peer="",
                 peers={}, to_peer=None, bar=None),
    ]  # fmt: skip
    table, page, figure = layer_write.results(rows, tmp_path)
    first, _, last = csv.DictReader(table.open())
    assert (first["ratio_median"], first["met"], first["level"]) == ("1.05", "False", "False")
    assert first["peers"] == "slow 4.5; quick 0.95"
    assert (last["to_peer_median"], last["met"], last["bar"]) == ("", "", "")
    text = page.read_text()
    assert "| ghost nbs=2 | **1.05 (1.11)** | 0.50 (0.50) |" in text
    assert "1.05x BatchNorm2d [1.05, 1.05], limit 1.00 MISSED" in text
    assert "1.11x quick [1.11, 1.11] SLOWER" in text
    assert "a left out of 128x16x32x32 NCHW bfloat16: no bfloat16" in text
    assert platform.node() not in text + table.read_text()
    assert figure.read_text().count("over BatchNorm2d") == 2  # norms and convolutions apart
