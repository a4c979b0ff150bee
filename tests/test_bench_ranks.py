"""The rows of synchronized batch norm measure what they say, and leave no process behind."""

import csv
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
import torch
from ranks import Ranks
from torch import Tensor, nn

from normlab.bench import layers, main, peers, rank_training, rank_write, ranks, training
from normlab.bench.measure import Spread, Together

ALL = 4
"""The ranks of the tests' pool."""


# -- the rewritten peer ---------------------------------------------------------------------------


def _with_gradients(layer: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    x = x.clone().requires_grad_()
    y = layer(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *layer.parameters()], dy)]


def _inputs() -> list[Tensor]:
    """x and dy of all ranks, which differ in mean and scale; weight and bias."""
    torch.manual_seed(0)
    factors = torch.arange(1.0, ALL + 1).double().view(ALL, 1, 1, 1, 1)
    x = (factors * torch.randn(ALL, 5, 3, 4, 4).double() + factors).flatten(0, 1)
    return [x, torch.randn(x.shape).double(), torch.rand(3).double() + 0.5, torch.randn(3).double()]


def _made(layer: nn.Module, weight: Tensor, bias: Tensor) -> nn.Module:
    layer = layer.double()
    layer.load_state_dict({"weight": weight, "bias": bias}, strict=False)
    return layer


def contestants_on_rank(rank: int) -> dict[str, Any]:
    """Per contestant its output, gradients, buffers, and the exchanges of a step."""
    x, dy, weight, bias = _inputs()
    found = {}
    for name, norm in ranks.NORMS.items():
        layer = _made(norm(3), weight, bias)
        own = x.chunk(ALL)[rank], dy.chunk(ALL)[rank]
        results: list[Tensor] = []
        exchanges = ranks.collectives(lambda: results.extend(_with_gradients(layer, *own)))  # noqa: B023
        found[name] = results, (layer.running_mean, layer.running_var), exchanges
    counts = ranks.Rank().answer("make", ranks.NETWORK, [2, 3, 8, 8], "channels_last")
    return found | {"network": counts}


def test_ours_and_the_peer_are_the_batch_norm_of_all_ranks_and_native_is_not(
    ranks: Ranks,
) -> None:
    x, dy, weight, bias = _inputs()
    whole = _made(nn.BatchNorm2d(3), weight, bias)
    expected = _with_gradients(whole, x, dy)
    answers = ranks.run(contestants_on_rank)
    for name, same in (("ours", True), ("peer", True), ("native", False)):
        y, dx, *affine = zip(*(answer[name][0] for answer in answers), strict=True)
        got = [torch.cat(y), torch.cat(dx), *(sum(parts) for parts in affine)]
        near = [
            torch.allclose(a, b, rtol=1e-9, atol=1e-9) for a, b in zip(got, expected, strict=True)
        ]
        assert near == [same] * 3 + [True], name  # dbias is sum(dy), whatever the statistics
    assert [answers[0][name][2] for name in ("ours", "peer", "native")] == [2, 2, 0]
    assert answers[0]["network"] == {"ours": 42, "peer": 42, "native": 0}  # 21 layers, 2 each
    for answer in answers:  # the running variance of the peer is the biased one
        mean, var = answer["peer"][1]
        torch.testing.assert_close(mean, whole.running_mean)
        elements = x.numel() // 3
        unbiased = whole.running_var - 0.9
        torch.testing.assert_close(var - 0.9, unbiased * (elements - 1) / elements)


def test_the_peer_alone_and_in_evaluation_is_torchs_batch_norm() -> None:
    x, dy, weight, bias = _inputs()
    for trains in (True, False):
        both = [
            _with_gradients(_made(kind(3), weight, bias).train(trains), x, dy)
            for kind in (peers.NaiveSyncBatchNorm, nn.BatchNorm2d)
        ]
        assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


# -- processes ------------------------------------------------------------------------------------

ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"
DEAF = "import sys, time\nfor line in sys.stdin: time.sleep(60)"


def _gone(together: Together) -> bool:
    """No process is left, not even an unreaped one."""
    for process in together.processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, 0)
            return False
    return len(together.processes) == 2


def test_processes_answer_together_and_end_with_their_context() -> None:
    with Together([ECHO, ECHO]) as together:
        assert together.ask(["turn", 1]) == [["turn", 1]] * 2
        assert together.ask(2) == [2, 2]
    assert _gone(together)
    assert [process.returncode for process in together.processes] == [0, 0]  # by themselves


@pytest.mark.parametrize(
    ("other", "patience", "told"),
    [("raise SystemExit(1)", 60.0, "ended early"), (DEAF, 0.2, "no answer .* in 0.2 s")],
)
def test_where_one_process_fails_none_is_left(other: str, patience: float, told: str) -> None:
    started = time.monotonic()
    with (
        pytest.raises(RuntimeError, match=told),
        Together([DEAF, other], patience=patience) as together,
    ):
        together.ask("turn")
    assert _gone(together)
    assert time.monotonic() - started < 30  # nobody waits for the one that sleeps


def test_an_interrupt_leaves_no_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found: list[Together] = []

    class Noted(Together):
        def __enter__(self) -> Self:
            found.append(self)
            return super().__enter__()

    def interrupt(_: ranks.RankRow) -> str:
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "Together", Noted)
    monkeypatch.setattr(ranks, "_code", lambda *_: ECHO)
    monkeypatch.setattr(ranks, "row", lambda *_, **__: _made_up())
    monkeypatch.setattr(rank_write, "line", interrupt)
    with pytest.raises(KeyboardInterrupt) as error:
        main(["ranks"])
    assert error  # whose traceback holds the frames, and what they hold
    assert _gone(found[0])


# -- rows -----------------------------------------------------------------------------------------


class InOne:
    """Stands in for the two processes: one rank, alone, in this one."""

    def __init__(self, codes: list[str]) -> None:
        assert len(codes) == ranks.RANKS
        self.rank = ranks.Rank()
        self.asked: list[Any] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None: ...

    def ask(self, what: list[Any]) -> list[Any]:
        return [self.rank.answer(*what)] * ranks.RANKS


def test_every_cell_has_a_row_within_its_rounds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ranks, "Together", InOne)
    monkeypatch.setattr(ranks, "IMAGES", (4, 3, 8, 8))
    monkeypatch.setattr(layers, "SHAPES", ((8, 4, 4, 4), (4, 8, 2, 2)))
    monkeypatch.setattr(layers, "REPEAT", 0.0)
    monkeypatch.setattr(rank_training, "rows", lambda **_: (_trained() for _ in range(1)))
    assert len(list(ranks.rows(quick=True))) == 2  # the first shape, in both formats
    assert main(["ranks"]) == 0
    assert capsys.readouterr().out.count("x detectron2's, limit 0.90 ") == 6
    found = list(csv.DictReader((tmp_path / "results/bench/ranks.csv").open()))
    cells = [(row["what"], row["shape"], row["format"]) for row in found]
    assert cells == [
        (what, shape, format)
        for what, shape in (
            ("layer", "4x4x4x4"), ("layer", "2x8x2x2"), ("ResNet-20", "2x3x8x8"),
        )
        for format in ("NCHW", "channels_last")
    ]  # fmt: skip
    assert all(3 <= int(row["rounds"]) <= 12 and float(row["ratio_median"]) > 0 for row in found)


TURNS = {
    "ours": [(0.8, 1.0), (8.0, 20.0), (0.9, 3.0)],
    "peer": [(1.0, 1.0), (10.0, 10.0), (1.0, 1.0)],
    "native": [(0.5, 1.0), (5.0, 1.0), (0.5, 1.0)],
}


def _trained(exchanges: int = 43) -> rank_training.TrainingRow:
    seconds = {"sync": [1.0, 1.0, 2.0], "alone": [1.0, 2.0, 4.0]}
    return rank_training.row("sync", seconds, 100, synchronized=21, exchanges=exchanges)


def _made_up(ours: float = 1.0) -> ranks.RankRow:
    turns = TURNS | {"ours": [(ours * cpu, elapsed) for cpu, elapsed in TURNS["ours"]]}
    return ranks._row("layer", "2x3x4x4", "NCHW", turns, {"ours": 2, "peer": 3, "native": 0})


def test_ratios_are_taken_within_a_round_and_judged_by_cpu_time() -> None:
    row = _made_up()
    assert row.ratio.median == pytest.approx(0.8)  # though the rounds differ tenfold
    assert row.over_native.median == pytest.approx(1.6)
    assert row.peer_over_native.median == pytest.approx(2.0)
    assert row.elapsed == Spread(2.0, 1.5, 2.5)
    assert (row.ours.median, row.peer.median, row.native.median) == (900, 1000, 500)
    assert (row.collectives, row.peer_collectives, row.rounds) == (2, 3, 3)
    assert row.met
    assert not _made_up(1.13).met  # 0.904


def test_the_page_says_what_was_missed_and_on_what_machine(tmp_path: Path) -> None:
    table, training, page = rank_write.results(
        [_made_up(), _made_up(2.0)], [_trained()], tmp_path / "bench"
    )
    first, second = csv.DictReader(table.open())
    assert (first["ratio_median"], first["met"], second["met"]) == ("0.8", "True", "False")
    assert first["cores"] == str(os.cpu_count())
    text = page.read_text()
    assert "| 0.80 [0.80, 0.85] | 0.90 | 2.00 [1.50, 2.50] | 2, 3 | 3 |" in text
    assert "**1.60 [1.60, 1.70]**" in text
    assert "Limits met: 1 of 2." in text
    assert platform.node() not in text + table.read_text()
    assert "MISSED" in rank_write.line(_made_up(2.0))
    assert "| sync | 100 | 50 | 2.00 [1.50, 2.00] | 21 | 43 | 3 |" in text
    (row,) = csv.DictReader(training.open())
    assert (row["exchanges"], row["met"]) == ("43", "True")
    assert "| **44** |" in rank_write._page([_made_up()], [_trained(44)])
    assert "MORE THAN 43" in rank_write.training_line(_trained(44))


def trained_on_rank(_rank: int, folder: str) -> list[dict[str, int]]:
    """What both norms exchange in a step, of batches that all ranks share."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "BATCH", 8)
        contestant = rank_training.Trained(Path(folder))
        made = [contestant.answer("make", norm, 1) for norm in rank_training.NORMS]
        assert contestant.answer("turn", "sync") > 0
    return made


def test_a_training_step_exchanges_gradients_once_and_each_layer_both_ways(
    ranks: Ranks, tmp_path: Path
) -> None:
    for plain, sync in ranks.run(trained_on_rank, str(tmp_path)):
        assert plain == {"synchronized": 0, "exchanges": 1}
        assert sync == {"synchronized": 21, "exchanges": 43}


class Said:
    """Stands in for processes: notes what it is asked, and has the seconds of each turn ready."""

    def __init__(self, answers: list[float]) -> None:
        self.answers, self.asked = answers, []

    def ask(self, what: list[Any]) -> list[Any]:
        self.asked.append(what[:2])
        if what[0] == "make":
            return [{"synchronized": 0, "exchanges": 1}] * len(self.answers)
        return self.answers


def test_two_ranks_and_one_train_in_turns_and_the_slower_rank_counts() -> None:
    together, alone = Said([1.0, 2.0]), Said([4.0])
    rows = rank_training.measured(together, alone, rounds=3, steps=2)
    assert [(row.norm, row.rounds, row.exchanges) for row in rows] == [("bn", 3, 1), ("sync", 3, 1)]
    assert rows[0].rate.median == 2 * training.BATCH / 2.0
    assert rows[0].alone.median == 2 * training.BATCH / 4.0
    assert rows[0].ratio.median == 2.0
    assert alone.asked == [["make", "bn"], *[["turn", "bn"]] * 4]
    both = [["turn", "bn"], ["turn", "sync"]]
    assert together.asked[2:] == [*reversed(both), *both] * 2


@pytest.mark.slow  # two processes that import torch
def test_two_processes_of_their_own_measure_a_cell(tmp_path: Path) -> None:
    codes = [ranks._code(rank, tmp_path / "meeting") for rank in range(ranks.RANKS)]
    with Together(codes) as processes:
        row = ranks.row(processes, "layer", (8, 4, 4, 4), "NCHW", rounds=1, seconds=0)
    assert (row.collectives, row.peer_collectives, row.rounds) == (2, 2, 1)
    assert row.ratio.median > 0
    assert [process.returncode for process in processes.processes] == [0, 0]
