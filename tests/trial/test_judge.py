"""Counting, keeping and writing verdicts; and that the page says what the committed table does."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SEED, SIZE
from scipy.stats import binomtest

from normlab.diagnose.findings import MEANINGS
from normlab.trial import training, write
from normlab.trial.faults import FAULTS
from normlab.trial.judge import Verdict, alarms, judged, recall, recognized, wilson
from normlab.trial.material import Material
from normlab.trial.networks import FIVE, THIRTY, Network
from normlab.trial.store import Store
from normlab.trial.training import Trained

ROOT = Path(__file__).resolve().parents[2]
COMMITTED = ROOT / "results" / "diagnose" / "trial.csv"
FAULT = FAULTS[0]


def verdict(fault: str = FAULT.name, problems: tuple[str, ...] = (), **others: object) -> Verdict:
    expected = FAULT.expected if fault else ()
    plain = Verdict("a:b", fault, "P2", 100, "x", "0", expected, problems, (), 1.0)
    return replace(plain, **others)  # type: ignore[arg-type]


@pytest.mark.parametrize(("hits", "n"), [(0, 30), (95, 100), (100, 100), (1, 3)])
def test_the_interval_is_wilsons(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(method="wilson")
    assert wilson(hits, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


@pytest.mark.parametrize(("hits", "n"), [(0, 0), (2, 1), (-1, 5)])
def test_no_interval_of_nothing(hits: int, n: int) -> None:
    with pytest.raises(ValueError, match="trials"):
        wilson(hits, n)


def test_what_counts() -> None:
    right = FAULT.expected[0]
    verdicts = [
        verdict(problems=(right,)),
        verdict(notices=(right,)),
        verdict(problems=("stale_statistics",)),
        verdict(),
        verdict(fault="", problems=("stale_statistics",)),
        verdict(fault="", notices=("dead_channels",)),
    ]
    assert (recall(verdicts).hits, recall(verdicts).n) == (2, 4)
    assert recognized(verdicts).hits == 3
    assert (alarms(verdicts).hits, alarms(verdicts).n) == (1, 2)
    assert verdicts[2].besides == ("stale_statistics",)


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    verdicts = [
        verdict(problems=("momentum_too_small", "ranks_disagree")),
        verdict(fault="", notices=("dead_channels",)),
    ]
    table, page = write.results(verdicts, tmp_path / "new", "trial")
    assert write.read(table) == verdicts
    text = page.read_text()
    assert "1 of 1" in text
    names = f"| {FAULT.name} | {FAULT.pains} | `momentum_too_small` |"
    assert f"{names} yes | ranks_disagree 1 |" in text
    assert "| a:b | none | dead_channels |" in text


def test_a_kept_training_is_not_done_again(
    network: Network, material: Material, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path, replace(SIZE, steps=3))
    first = store.trained(network, SEED, material)
    monkeypatch.setattr(training, "trained", None)
    again = store.trained(network, SEED, material)
    assert all(first.state[key].equal(again.state[key]) for key in first.state)
    assert first.optimizer["param_groups"] == again.optimizer["param_groups"]
    assert not Store(tmp_path, SIZE).trainings.exists()


def test_a_kept_verdict_is_not_judged_again(network: Network, tmp_path: Path) -> None:
    store = Store(tmp_path, SIZE)
    first = verdict(problems=("ranks_disagree",))
    assert store.verdict(network, "a", 1, lambda: first) == first
    assert store.verdict(network, "a", 1, lambda: verdict()) == first
    assert store.verdict(network, "b", 1, lambda: verdict()) == verdict()


def test_a_fault_and_none_are_told_apart(tiny: Trained) -> None:
    never = next(fault for fault in FAULTS if fault.name == "update forgotten")
    found = judged(never, tiny)
    assert (found.named, found.network, found.seed) == (True, "tests:tiny", SEED)
    assert not judged(None, tiny).problems


def test_twenty_faults_of_known_names_and_thirty_networks() -> None:
    assert len({fault.name for fault in FAULTS}) == 20
    assert {name for fault in FAULTS for name in fault.expected} <= MEANINGS.keys()
    assert all(fault.apart for fault in FAULTS if len(fault.expected) > 1)
    assert all(re.fullmatch(r"P\d+(, P\d+)*", fault.pains) for fault in FAULTS)
    assert len({network.name for network in THIRTY}) == 30
    assert len(FIVE) == 5
    assert all(network.blocks for network in FIVE)


def test_the_page_says_what_the_table_does() -> None:
    verdicts = write.read(COMMITTED)
    assert {v.fault for v in verdicts} - {""} == {fault.name for fault in FAULTS}
    assert (recall(verdicts).n, alarms(verdicts).n) == (100, 30)
    assert min(v.seed for v in verdicts) >= 100
    page = (ROOT / "docs" / "diagnose-trial.md").read_text()
    for line in write.summary(verdicts).splitlines():
        assert line in page
