"""Nothing is lost: runs that are killed and started again end as if nothing had happened."""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from faults import PHASES, VICTIMS, Endurance, Fault, identical, write


@pytest.mark.parametrize(
    ("faults", "codes"),
    [
        ([Fault(1, "process", "epoch")], [-9]),
        ([Fault(2, "rank 0", "checkpoint"), Fault(2, "agent", "evaluate")], [1, -9]),
    ],
)
def test_three_kills(tmp_path, faults, codes):
    """Of a run of one process, and of one over two ranks, twice: in each phase one."""
    rows, missed = Endurance(tmp_path, seed=3).run(faults)
    assert not missed
    assert [row.code for row in rows] == codes
    assert [row.phase for row in rows] == [fault.phase for fault in faults]
    assert all(row.identical for row in rows)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["rank 0", "rank 1"])
def test_a_kill_that_the_ranks_make_good_themselves(tmp_path, victim):
    """With max_restarts all of them go on from the last checkpoint, and the parent ends well."""
    endurance = Endurance(tmp_path, seed=4)
    reference = endurance.reference(2)
    row = endurance.hit(tmp_path / "run", Fault(2, victim, "epoch"), "max_restarts=1")
    assert row is not None
    assert row.code == 0
    (run,) = (tmp_path / "run" / "runs").glob("*-*")
    assert "started again after a failure: 1" in (run / "log.txt").read_text()
    assert identical(run, reference)


@pytest.mark.slow
def test_a_hundred_kills(tmp_path, capsys):
    """NORMLAB_FAULTS names the directory that the report is written to."""
    out = Path(os.environ.get("NORMLAB_FAULTS", tmp_path / "report")).absolute()
    rng = random.Random(100)
    twice = [Fault(2, victim, phase) for victim in VICTIMS[2] for phase in PHASES] * 7
    once = [Fault(1, "process", PHASES[number % 3]) for number in range(16)]
    endurance, rows, tries = Endurance(tmp_path, seed=100), [], 0
    for left in (twice, once):
        rng.shuffle(left)
        while left:
            tries += 1
            assert tries < 200, "the phases cannot be hit"
            length = rng.randint(1, 5)
            made, missed = endurance.run(left[:length])
            left[:length] = missed
            rng.shuffle(left)
            rows += made
            write(rows, out)
            with capsys.disabled():
                print(f"\n{len(rows)} faults, {sum(row.identical for row in rows)} without a trace",
                      end="")  # fmt: skip
    assert len(rows) == 100
    assert all(row.identical for row in rows)
    fell = Counter(row.phase for row in rows)
    assert all(fell[phase] >= 20 for phase in PHASES), fell
