"""The pool of ranks itself: a rank's exception surfaces, and nothing waits or stays for ever."""

import os
import time

import pytest
from ranks import RankError, Ranks


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """A pool of its own, since these tests end it, and one that starts at once."""
    pool = Ranks(1, tmp_path_factory.mktemp("single"), connected=False)
    yield pool
    pool.stop()


def identify(rank, *arguments):
    return rank, os.getpid(), arguments


def fail(rank, on):
    if rank == on:
        raise LookupError("nothing here")
    return rank


def sleep(_rank):
    time.sleep(1000)


def leave(_rank):
    os._exit(3)


def test_ranks_answer_in_order_and_stay(ranks):
    first, second = ranks.run(identify, 1, "two"), ranks.run(identify)
    assert [rank for rank, _, _ in first] == [0, 1, 2, 3]
    assert {arguments for _, _, arguments in first} == {(1, "two")}
    assert [pid for _, pid, _ in first] == [pid for _, pid, _ in second]
    assert os.getpid() not in {pid for _, pid, _ in first}


@pytest.mark.parametrize(
    ("task", "arguments", "told"),
    [
        (fail, (0,), r"rank 0: Traceback(.|\n)*in fail(.|\n)*LookupError: nothing here"),
        (sleep, (), r"rank 0: no answer(.|\n)*in sleep"),
        (leave, (), "rank 0: the process ended"),
    ],
)
def test_a_failure_surfaces_and_ends_the_processes(single, task, arguments, told):
    ((_, pid, _),) = single.run(identify)
    with pytest.raises(RankError, match=told):
        single.run(task, *arguments, timeout=2.0)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert single.run(identify)[0][1] != pid  # and the next task starts others
