"""Of several ranks that failed, the one whose failure caused the others is named."""

import json
import pickle

import pytest

from normlab.ranks import failures
from normlab.ranks.failures import RankFailed


def noted(folder, monkeypatch, error, **how):
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv(failures.FILE, str(folder / "error.json"))
    try:
        raise error
    except type(error) as raised:
        failures.note(raised, **how)


def ends(tmp_path, codes, noticed=1e10):
    return {
        rank: failures.of_rank(rank, code=code, noticed=noticed, folder=tmp_path / str(rank))
        for rank, code in enumerate(codes)
    }


def test_the_first_to_raise_is_the_first(tmp_path, monkeypatch):
    noted(tmp_path / "1", monkeypatch, LookupError("no shard\nand more"))
    noted(tmp_path / "0", monkeypatch, RuntimeError("Connection closed by peer"))
    first = failures.first(ends(tmp_path, [1, 1]))
    assert (first.rank, first.reason) == (1, "LookupError: no shard")
    assert first.traceback.endswith("LookupError: no shard\nand more\n")


def test_a_killed_rank_comes_before_those_that_missed_it(tmp_path, monkeypatch):
    noted(tmp_path / "0", monkeypatch, RuntimeError("Connection closed by peer"))
    at = json.loads((tmp_path / "0" / "error.json").read_text())["at"]
    first = failures.first(ends(tmp_path, [1, -9], noticed=at + 1))
    assert (first.rank, first.reason) == (1, "killed by SIGKILL")
    # The agent itself kills, half a minute later, who does not end for another's failure.
    assert failures.first(ends(tmp_path, [1, -9], noticed=at + 30)).rank == 0


def test_who_saw_a_rank_stall_and_killed_it_says_why(tmp_path, monkeypatch):
    noted(tmp_path / "0", monkeypatch, RuntimeError("rank 1 has stalled"), certain=True)
    at = json.loads((tmp_path / "0" / "error.json").read_text())["at"]
    assert "stalled" in failures.first(ends(tmp_path, [1, -9], noticed=at)).reason


@pytest.mark.parametrize("told", [143, -15, 130, -2])
def test_who_was_told_to_end_has_not_failed(tmp_path, told):
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "stderr.log").write_text("Traceback\n  ...\nImportError: no torch\n")
    first = failures.first(ends(tmp_path, [told, 3]))
    assert (first.rank, first.reason) == (1, "exit code 3: ImportError: no torch")


def test_the_failure_of_a_run_crosses_processes():
    error = pickle.loads(pickle.dumps(RankFailed("rank 1 of 2: LookupError: no shard")))
    assert failures.one_line(error) == "rank 1 of 2: LookupError: no shard"
    assert failures.one_line(LookupError("a\nb")) == "LookupError: a"
    assert failures.one_line(LookupError()) == "LookupError"
