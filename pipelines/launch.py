"""A training's processes: started by torchrun, ended together, and the first error among theirs."""

import ctypes
import logging
import os
import signal
import sys
import tempfile
import traceback
from typing import Any, NoReturn

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure, get_error_handler
from torch.distributed.elastic.rendezvous import RendezvousError

from detr.distributed import PeerLostError
from pipelines.progress import print_error
from pipelines.stage import EXPECTED, explain

PREEMPTED = 75  # the exit code of a training that was asked to stop: EX_TEMPFAIL of sysexits.h
ASKED = (PREEMPTED, -signal.SIGTERM)  # how a process ends that was asked to, the second before it listens


def launch(module: str, num_micro_batches: int) -> None:
    """Runs a module in every process that torchrun's variables ask for; the first failure is the message.

    On several nodes the loss of one restarts the others from the last state. Exits with PREEMPTED when asked to stop.
    """
    from torch.distributed.run import parse_args, run

    processes = min(torch.cuda.device_count() or 2, num_micro_batches)
    os.environ.setdefault("PET_NPROC_PER_NODE", str(processes))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ["DETR_LAUNCHER"] = str(os.getpid())
    os.environ.setdefault("PET_SHUTDOWN_TIMEOUT", "60")  # seconds to finish the step and save
    alone = os.environ.get("PET_NNODES", "1") == "1" and "PET_RDZV_ENDPOINT" not in os.environ
    if not alone:
        os.environ.setdefault("PET_RDZV_BACKEND", "c10d")
        os.environ.setdefault("PET_MAX_RESTARTS", "30")
        os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")  # a node that joins later never finds it
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("torch.distributed.elastic")]:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    options = ["--standalone"] if alone else []
    with tempfile.TemporaryDirectory(prefix="detr-") as folder:  # of errors that processes leave; torchrun removes none
        os.environ.setdefault("PET_LOG_DIR", folder)
        try:
            run(parse_args([*options, "-m", module, *sys.argv[1:]]))
        except SignalException:
            _end_as_asked()
        except RendezvousError as error:
            endpoint = os.environ.get("PET_RDZV_ENDPOINT", "the other nodes")
            raise RuntimeError(
                f"no rendezvous at {endpoint} ({error}); is the training under way on that host?"
            ) from error
        except ChildFailedError as error:
            rank, failure = first_cause(error.failures)
            message: Any = failure.message
            if isinstance(message, dict):
                raise RuntimeError(message["message"].partition(": ")[2]) from None
            if failure.exitcode in ASKED:
                _end_as_asked()
            raise RuntimeError(explain_end(rank, failure)) from None


def first_cause(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The rank and the failure that made the others fail.

    A process records its error before it leaves its group, so it is on record before another can miss it. What left no
    record was ended from outside; PeerLostError, and the end that torchrun asks the rest for, only follow.
    """

    def order(rank: int) -> tuple[int, int]:
        failure, message = failures[rank], failures[rank].message
        if not isinstance(message, dict):
            return (2 if failure.exitcode in ASKED else 1), failure.timestamp * 10**9
        follows = message["message"].startswith(f"{PeerLostError.__name__}: ")
        return (3 if follows else 0), os.stat(failure.error_file).st_mtime_ns

    first = min(failures, key=order)
    return first, failures[first]


def explain_end(rank: int, failure: ProcessFailure) -> str:
    """What to say of a process that ended and left no error."""
    if failure.exitcode >= 0:
        return f"process {rank} ended with exit code {failure.exitcode} and said nothing; its last state is kept"
    said = f"process {rank} was ended by signal {-failure.exitcode} ({failure.signal_name()})"
    if failure.exitcode == -signal.SIGKILL:
        return f"{said}, as Linux does when memory runs out; lower train.micro_batch or use fewer processes"
    return f"{said}; the same command goes on from the last state"


def _end_as_asked() -> NoReturn:
    print_error("the training was asked to stop; the same command goes on from its last state")
    sys.exit(PREEMPTED)


def die_with_parent() -> None:
    """Asks Linux to end this process when torchrun is killed, so that no orphan trains on and writes results."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(os.environ.get("DETR_LAUNCHER", os.getppid())):  # killed while this one started
            os._exit(1)


def record_failure(error: Exception) -> None:
    """Writes an error down for the launching process; one of the code is printed with where it came from."""
    for number in (signal.SIGTERM, signal.SIGINT):  # torchrun ends the others: not in the middle of this
        signal.signal(number, signal.SIG_IGN)
    if os.environ.get("DETR_TRACEBACK") or not isinstance(error, EXPECTED):
        traceback.print_exc()
    if isinstance(error, OSError):
        error = RuntimeError(explain(error))
    elif not isinstance(error, EXPECTED):
        error = RuntimeError(f"{type(error).__name__}: {error}")
    get_error_handler().record_exception(error)
