"""Checkpoints survive what may happen to a file; signals wait for the end of a step."""

import os
import signal

import pytest
import torch

from normlab import checkpoint
from normlab.runs import write_atomically


def test_round_trip(tmp_path):
    state = {"model": {"w": torch.randn(3)}, "position": {"epoch": 1}, "history": [{"loss": 0.5}]}
    checkpoint.save(tmp_path / "c.pt", state)
    loaded = checkpoint.load(tmp_path / "c.pt")
    assert torch.equal(loaded.pop("model")["w"], state.pop("model")["w"])
    assert loaded == state
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04half a zip"])
def test_a_spoilt_file_is_one_line(tmp_path, content):
    path = tmp_path / "c.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"c\.pt cannot be read") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_a_truncated_checkpoint_is_refused(tmp_path):
    path = tmp_path / "c.pt"
    checkpoint.save(path, {"model": {"w": torch.randn(1000)}})
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(path)


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("pwned",))


def test_code_in_a_checkpoint_does_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": Evil()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        checkpoint.load(tmp_path / "c.pt")
    assert not (tmp_path / "pwned").exists()


def test_something_else_is_not_a_checkpoint(tmp_path):
    torch.save([1, 2], tmp_path / "c.pt")
    with pytest.raises(ValueError, match="not a normlab checkpoint"):
        checkpoint.load(tmp_path / "c.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, "old")

    def no_space(_fd):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_sigterm_waits_and_then_ends_with_143():
    before = signal.getsignal(signal.SIGTERM)
    with checkpoint.deferred_signals() as stop:
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop
        with pytest.raises(SystemExit) as error:
            stop.raise_if_asked()
        stop.signal = None
    assert error.value.code == 143
    assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_waits_once_and_then_acts():
    with checkpoint.deferred_signals() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        stop.signal = None


def test_a_signal_after_the_last_look_is_not_lost():
    with pytest.raises(SystemExit) as error, checkpoint.deferred_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert error.value.code == 143


def looks_of_rank(rank, signals, dues):
    stop = checkpoint.Stop()
    seen = []
    for number, due in zip(signals[rank], dues[rank], strict=True):
        stop.signal = number
        seen.append((stop.look(due), stop.settled))
    return seen


def test_ranks_stop_and_save_at_the_same_step(ranks):
    signals = [[None] * 4, [None, None, 15, 15], [None] * 4, [None, None, None, 2]]
    dues = [[False, True, False, False], [False] * 4, [False] * 4, [False] * 4]
    everywhere = [(False, None), (True, None), (True, 15), (True, 15)]
    assert ranks.run(looks_of_rank, signals, dues) == [everywhere] * 4


def test_a_signal_after_a_look_waits_for_the_next(ranks):
    assert ranks.run(signalled_after_a_look) == ["goes on, then 143"] * 4


def signalled_after_a_look(rank):
    with checkpoint.deferred_signals() as stop:
        assert not stop.look()
        for _ in range(rank):  # to rank 0 none, and to ranks 2 and 3 a second one
            os.kill(os.getpid(), signal.SIGTERM)
        stop.end_if_settled()
        assert stop.look()
        try:
            stop.end_if_settled()
        except SystemExit as end:
            stop.signal = None
            return f"goes on, then {end.code}"
