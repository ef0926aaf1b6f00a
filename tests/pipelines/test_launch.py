"""Which of the failures of a training's processes a person reads: the one that the others follow from."""

import os
import signal

import pytest
from torch.distributed.elastic.multiprocessing.errors import ErrorHandler, ProcessFailure

from detr.distributed import PeerLostError
from pipelines.launch import PREEMPTED, explain_end, first_cause

LOST = PeerLostError("the connection to another process is lost (Connection closed by peer)")


@pytest.fixture
def failures(tmp_path, monkeypatch):
    """Failures by rank of ends (exit code, error or nothing), whose errors are put on record in the order of `recorded`."""

    def make(ends, recorded):
        files = {rank: tmp_path / f"{rank}.json" for rank in ends}
        for moment, rank in enumerate(recorded):
            monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(files[rank]))
            ErrorHandler().record_exception(ends[rank][1])
            os.utime(files[rank], ns=(0, 10**18 + moment))
        return {rank: ProcessFailure(rank, 100 + rank, code, str(files[rank])) for rank, (code, _) in ends.items()}

    return make


@pytest.mark.parametrize("culprit", [0, 1])
@pytest.mark.parametrize("late", [False, True])
def test_an_error_is_read_before_those_that_follow_from_it(failures, culprit, late):
    """Whatever was written first, and however torchrun has ended the others."""
    other = 1 - culprit
    ends = {0: (1, LOST), 1: (1, LOST), 2: (PREEMPTED, None), 3: (-signal.SIGKILL, None)}
    ends[culprit] = (1, ValueError("it is this"))
    recorded = [other, culprit] if late else [culprit, other]
    rank, failure = first_cause(failures(ends, recorded))
    assert (rank, failure.message["message"]) == (culprit, "ValueError: it is this")


@pytest.mark.parametrize("first", [0, 1])
def test_of_two_errors_the_earlier_is_read(failures, first):
    ends = {0: (1, ValueError("of 0")), 1: (1, OSError("of 1"))}
    assert first_cause(failures(ends, [first, 1 - first]))[0] == first


@pytest.mark.parametrize(
    ("code", "said"),
    [
        (-signal.SIGKILL, r"process 1 was ended by signal 9 \(SIGKILL\), as Linux does when memory runs out; lower"),
        (-signal.SIGSEGV, r"process 1 was ended by signal 11 \(SIGSEGV\); the same command goes on"),
        (3, "process 1 ended with exit code 3 and said nothing"),
    ],
)
def test_an_end_without_an_error_is_the_cause_of_a_lost_connection(failures, code, said):
    rank, failure = first_cause(failures({0: (1, LOST), 1: (code, None), 2: (PREEMPTED, None)}, [0]))
    assert rank == 1
    with pytest.raises(RuntimeError, match=said):
        raise RuntimeError(explain_end(rank, failure))


def test_who_was_asked_to_stop_is_no_failure_of_another(failures):
    ends = {0: (1, LOST), 1: (PREEMPTED, None)}
    assert first_cause(failures(ends, [0]))[0] == 1
    assert first_cause(failures({0: (1, LOST), 1: (-signal.SIGTERM, None)}, [0]))[0] == 1
    assert first_cause(failures({0: (1, LOST)}, [0]))[0] == 0
