"""A process that has imported what a command imports, and forks for whoever asks: see nursery.py.

    nursery_process.py SOCKET CONSOLE-SCRIPT MODULE...

A process stays between it and each fork, which tells whoever asked how that ended, and kills it if nobody is there to
be told.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nursery import FREE, SESSION, THREADLESS, Connection


def _serve(place: str, mine: Mapping[str, str]) -> dict[str, Any]:
    """Fork for whoever asks, until standard input ends; returns in each fork, with what it was asked for."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(place)
    listener.listen(64)
    # From a terminal it reaches all of a group; whoever asked decides when this ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(1, b"ready\n")
    while True:
        if 0 in select.select([listener, 0], [], [])[0]:
            os._exit(0)
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            return _begun(connection, mine)
        connection.close()
        # Those that have told what became of their fork.
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def _begun(connection: Connection, mine: Mapping[str, str]) -> dict[str, Any]:
    """Read what is asked, fork for it, tell its process id, then its status; returns in the fork."""
    head, streams, _, _ = socket.recv_fds(connection, 8, 3)
    content, size = b"", int.from_bytes(head, "big")
    while len(content) < size and (piece := connection.recv(size - len(content))):
        content += piece
    request: dict[str, Any] = json.loads(content)
    differing = _differing(request["environment"], mine)
    # The process group of another session cannot be entered.
    if differing or request["session"] != os.getsid(0):
        connection.sendall((" ".join(differing).encode() or SESSION) + b"\n")
        os._exit(0)
    child = os.fork()
    if child == 0:
        connection.close()
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        os.setpgid(0, request["group"])
        return request
    for stream in streams:
        os.close(stream)
    # What ended whoever asked must not be what ends the fork unseen, nor may its streams stay open here.
    connection.sendall(b"%d\n" % child)
    handle = os.pidfd_open(child)
    if handle not in select.select([handle, connection], [], [])[0]:
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    with contextlib.suppress(OSError):
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))
    os._exit(0)


def _differing(asked: Mapping[str, str], mine: Mapping[str, str]) -> list[str]:
    names = {name for name in asked.keys() | mine.keys() if asked.get(name) != mine.get(name)}
    return [name for name in names if not FREE.fullmatch(name) and not (name in THREADLESS and name not in asked)]


def _become(command: Sequence[str], environment: Mapping[str, str], first: str, mine: Mapping[str, str]) -> None:
    """Arguments, environment and import path as they are after a start."""
    os.environ.clear()
    os.environ.update(environment)
    entries = [entry for entry in environment.get("PYTHONPATH", "").split(os.pathsep) if entry]
    inherited = mine.get("PYTHONPATH", "").split(os.pathsep)
    own = [entry for entry in sys.path[1:] if entry not in inherited]
    # -P: nothing of the script's or working directory's.
    sys.path[:] = [*([first] if first else []), *entries, *(entry for entry in own if entry not in entries)]
    sys.path_importer_cache.clear()
    tempfile.tempdir = None
    sys.argv = list(command)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr or stream.isatty())  # type: ignore[union-attr]


def _fork_ranks(mine: Mapping[str, str]) -> None:
    """Let this process's launcher fork its ranks, each with the pipes and the environment that it is started with."""
    from vipo.training import launch

    class Rank(subprocess.Popen[bytes]):
        def __init__(self, command: Sequence[str], *, env: Mapping[str, str] | None = None, **rest: Any) -> None:
            if command[0] == sys.executable and env is not None:
                rest["preexec_fn"] = lambda: _run_rank(command, env, mine)
            super().__init__(command, env=env, **rest)

    launch.subprocess.Popen = Rank  # type: ignore[misc]


def _run_rank(command: Sequence[str], environment: Mapping[str, str], mine: Mapping[str, str]) -> None:
    """In the child, where it would become another program: run the command and end as it ends."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    _become(command[command.index("-m") + 1 :], environment, "", mine)
    # psutil's name of it, for its environment cannot be seen; the last moment at which nobody knows of it.
    Path("/proc/self/comm").write_text(f"rank {environment['RANK']}")
    os.closerange(3, max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1)
    gc.enable()
    from vipo.cli import main

    _leave(main)


def _leave(run: Callable[[], object]) -> None:
    """Run a command and end as the interpreter does, but for taking its modules apart, which takes a second."""
    status: object = 1
    try:
        status = run()
    except SystemExit as end:
        status = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        if not isinstance(status, int | None):
            print(status, file=sys.stderr)
            status = 1
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        except OSError:
            # As the interpreter's own.
            status = status or 120
        os._exit((status or 0) & 0xFF)


def _target(name: str) -> Callable[[], object]:
    if name == "vipo":
        # An image holds it without what an installer notes of it.
        from vipo.cli import main

        return main
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name=name)
    loaded: Callable[[], object] = entry.load()
    return loaded


def _nursery(place: str, name: str, *modules: str) -> Callable[[], object]:
    """Import, and fork for whoever asks; returns in each fork, with what is to run."""
    import importlib
    import runpy

    mine = dict(os.environ)
    for module in modules:
        importlib.import_module(module)
    main = _target(name)
    # What the imports themselves set, they would set after a start, too.
    made = {variable: value for variable, value in os.environ.items() if mine.get(variable) != value}
    # A fork has but the thread that forks.
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "an import has started a thread"
    gc.collect()
    gc.freeze()
    request = _serve(place, mine)
    command: list[str] = request["command"]
    if command[0] == sys.executable:
        del command[0]
    os.chdir(request["cwd"])
    _become(command, request["environment"] | made, str(Path(command[0]).parent), mine)
    if request.get("ranks"):
        _fork_ranks(mine)
    if command[0].endswith(".py"):
        return lambda: runpy.run_path(command[0], run_name="__main__") and None
    return main


if __name__ == "__main__":
    _leave(_nursery(*sys.argv[1:]))
