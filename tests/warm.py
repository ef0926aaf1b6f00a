"""A warm interpreter: Python commands run as forks of a process that has imported what is slow to import.

`folder()` is a folder for the front of PATH, with `python` and `dvc`. A command there asks the warm interpreter for a
fork with its own arguments, environment, directory and files, waits for its end and ends likewise: with its exit code,
or by its signal. What is no command of the project (`python -m prefect`) becomes the real interpreter. A fork begins a session of its own, gets the signals that its command gets, and is killed when its
command is killed. Unlike a process of its own it shows no environment in /proc, so tests of what is found by its
environment, and of kills, take `cold=True` (tests.conftest.environment).

Modules of the project are never imported here: every fork takes them from where it runs.
"""

import array
import contextlib
import fcntl
import gc
import importlib
import io
import json
import logging
import os
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
import warnings
from pathlib import Path

FOLDER = "DETR_TESTS"  # in the environment: the folder of this session of tests
MODULES = (
    "alembic.command", "concurrent.futures.process", "dvc.cli", "dvc.commands.repro", "dvc.repo", "dvc.repo.reproduce",
    "dvc_data.index", "great_expectations", "great_expectations.render.renderer.site_builder", "hotcoco", "matplotlib.pyplot",
    "mlflow", "mlflow.pyfunc", "mlflow.store.model_registry.sqlalchemy_workspace_store",
    "mlflow.store.tracking.sqlalchemy_workspace_store", "mlflow.tracing.export.utils", "msgspec", "multiprocessing.queues", "numpy",
    "pandas", "PIL.ImageDraw", "PIL.JpegImagePlugin", "PIL.PngImagePlugin", "psutil", "pyarrow.pandas_compat", "pycocotools.cocoeval",
    "requests", "ruamel.yaml", "safetensors.torch", "scipy.optimize", "torch", "torch.distributed.run", "torch.utils.data",
    "torch.distributed.elastic.rendezvous.c10d_rendezvous_backend", "torch.utils.flop_counter", "torchvision.io",
    "torchvision.models", "torchvision.transforms.v2", "tqdm",
)  # fmt: skip
ONE_THREAD = {"OMP_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}  # so that a fork is safe
CLIENT = """#!{python} -IS
import os, sys
name, arguments, parent = os.path.basename(sys.argv[0]), sys.argv[1:], os.getppid()
if arguments[:2] == ["-u", "-m"]:  # from torchrun, whose end it does not outlive
    import ctypes
    ctypes.CDLL(None).prctl(1, 9)
    if os.getppid() != parent:
        os._exit(1)
    os.environ["PYTHONUNBUFFERED"] = "1"
    del arguments[0]
ours = arguments[:1] in (["-c"], ["-m"]) and len(arguments) > 1 or arguments[:1] and arguments[0].endswith(".py")
if arguments[:1] == ["-m"]:
    ours = arguments[1].partition(".")[0] in ("dvc", "pipelines")
if name != "dvc" and not ours:
    os.execv({python!r}, [{python!r}, *sys.argv[1:]])
import array, json, signal, socket
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
umask = os.umask(0)
request = json.dumps([name, arguments, os.getcwd(), umask, parent, dict(os.environ)]).encode()
files = array.array("i", [0, 1, 2])
server.sendmsg([len(request).to_bytes(4, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
for number in {signals}:
    signal.signal(number, lambda number, frame: server.send(bytes([number])))
server.sendall(request)
answer = server.recv(4, socket.MSG_WAITALL)
status = int.from_bytes(answer, "big", signed=True) if len(answer) == 4 else 70
if status < 0:
    if -status in {signals}:
        signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
os._exit(status)
"""
SIGNALS = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def folder() -> str:
    """The folder for PATH; starts the warm interpreter of this session of tests where it does not run yet."""
    place = Path(os.environ[FOLDER]) / "warm"
    place.mkdir(exist_ok=True)
    with (place / "lock").open("w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "bin").exists():
            _start(place)
    return str(place / "bin")


def _start(place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, (place / "log").open("w", encoding="utf-8") as log:
        listener.bind(str(place / "socket"))
        listener.listen(64)
        owner, python = os.environ[f"{FOLDER}_PID"], str(place / "bin/python")
        subprocess.run(
            ["setsid", "--fork", sys.executable, "-P", __file__, str(listener.fileno()), owner, python],
            env=os.environ | ONE_THREAD,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=[listener.fileno()],
            check=True,
        )
    (place / "new").mkdir()
    signals = tuple(int(number) for number in SIGNALS)
    for name in ("python", "python3", "dvc"):
        path = place / "new" / name
        path.write_text(
            CLIENT.format(python=sys.executable, address=str(place / "socket"), signals=signals), encoding="utf-8"
        )
        path.chmod(0o755)
    (place / "new").rename(place / "bin")


def serve(listener: socket.socket, owner: int, executable: str) -> None:
    """Forks for everybody who asks, until the owner of the session ends."""
    with warnings.catch_warnings():  # what they hide or send elsewhere, they shall not for others
        for name in MODULES:
            importlib.import_module(name)
    logging.captureWarnings(False)
    assert len(os.listdir("/proc/self/task")) == 1, "a module has started a thread: a fork may hang"
    sys.executable = executable
    gc.collect()
    gc.freeze()
    waiting = selectors.DefaultSelector()
    end = os.pidfd_open(owner)
    waiting.register(end, selectors.EVENT_READ)
    waiting.register(listener, selectors.EVENT_READ)
    while True:
        for key, _ in waiting.select():
            if key.fd == end:
                for child, other in (one.data for one in waiting.get_map().values() if one.data):
                    if not isinstance(other, int):  # once each, by the file that is its process
                        _signal(child, signal.SIGKILL)
                return
            if key.fileobj is listener:
                client = listener.accept()[0]
                child = _fork(client, waiting)
                if child:
                    process = os.pidfd_open(child)
                    waiting.register(process, selectors.EVENT_READ, (child, client))
                    waiting.register(client, selectors.EVENT_READ, (child, process))
                continue
            if key.fd not in waiting.get_map():
                continue  # its other half came first
            child, other = key.data
            if isinstance(key.fileobj, socket.socket):
                sent = key.fileobj.recv(1)
                _signal(child, sent[0] if sent else signal.SIGKILL)
                if not sent:
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()
                continue
            waiting.unregister(key.fileobj)
            os.close(key.fd)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if other.fileno() != -1:
                waiting.unregister(other)
                with contextlib.suppress(OSError):  # it is gone
                    other.sendall(code.to_bytes(4, "big", signed=True))
                other.close()


def _signal(child: int, number: int) -> None:
    """To all of its group, as when the group of its command gets it; to itself where it has left that."""
    for send in (os.killpg, os.kill):
        try:
            send(child, number)
            return
        except ProcessLookupError:
            continue


def _fork(client: socket.socket, waiting: selectors.BaseSelector) -> int:
    """Reads a request and forks for it: the fork's id; 0 where the client went away first. The fork never returns."""
    files = array.array("i")
    head, ancillary, *_ = client.recvmsg(4, socket.CMSG_SPACE(3 * files.itemsize))
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            files.frombytes(data)
    size = int.from_bytes(head, "big")
    request = client.recv(size, socket.MSG_WAITALL)
    if not size or len(request) < size:
        client.close()
        return 0
    child = os.fork()
    if child == 0:
        try:
            _become(json.loads(request), files)
        except BaseException:
            traceback.print_exc()
        os._exit(70)
    for file in files:
        os.close(file)
    os.setpgid(child, child)  # whoever is first, it or we: a signal may come at once
    return child


def _become(request: list, files: array.array) -> None:
    name, arguments, directory, umask, parent, env = request
    os.setpgid(0, 0)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.closerange(3, 4096)
    os.chdir(directory)
    os.umask(umask)
    os.getppid = lambda: parent
    sys.modules["torch"].seed()  # as every process begins: what is not seeded must not look as if it were
    sys.modules["numpy"].random.seed()
    os.environ.clear()
    os.environ.update(env)
    for number in SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    if env.get("PYTHONUNBUFFERED"):
        for number, stream in ((1, "stdout"), (2, "stderr")):
            raw = io.FileIO(number, "w", closefd=False)
            setattr(sys, stream, io.TextIOWrapper(raw, sys.stdout.encoding, write_through=True))
    else:
        sys.stdout.reconfigure(line_buffering=os.isatty(1))
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    places = [place for place in env.get("PYTHONPATH", "").split(os.pathsep) if place]
    sys.path[:0] = [directory, *places]
    os._exit(_exit_code(lambda: _run(name, arguments, main)))


def _run(name: str, arguments: list[str], main: types.ModuleType) -> None:
    if name == "dvc":
        arguments = ["-m", "dvc", *arguments]
    if arguments[0] == "-m":
        sys.argv[:] = ["-m", *arguments[2:]]
        runpy._run_module_as_main(arguments[1])  # what `python -m` itself calls
    elif arguments[0] == "-c":
        sys.argv[:] = ["-c", *arguments[2:]]
        exec(compile(arguments[1], "<string>", "exec"), main.__dict__)
    else:
        sys.argv[:] = arguments
        sys.path[0] = str(Path(arguments[0]).resolve().parent)
        main.__file__ = str(Path(arguments[0]).absolute())
        exec(compile(Path(arguments[0]).read_text(encoding="utf-8"), main.__file__, "exec"), main.__dict__)


def _exit_code(run) -> int:
    """Runs it to its end as the interpreter does: threads and what is registered for the exit, too."""
    import atexit

    code: object = 0
    try:
        run()
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        traceback.print_exc()
        code = 130
    except BaseException as error:
        trace = error.__traceback__
        while trace and trace.tb_frame.f_code.co_filename == __file__:
            trace = trace.tb_next
        sys.excepthook(type(error), error.with_traceback(trace), trace)
        code = 1
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            code = code or 120
    return (code or 0) & 0xFF


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), sys.argv[3])
