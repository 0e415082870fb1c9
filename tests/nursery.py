"""Commands as forks of processes that have imported what they import: a start takes seconds of imports, a fork none.

What is forked is a process like another, with arguments, environment, working directory, standard streams, process
group and exit status of its own, to be waited for, signalled and killed. Three things are not as after a start, and
what they matter to is tested on real ones: nothing is imported any more, all forks of one process share its hash seed,
and /proc shows the arguments and environment of where they came from.

As a script, ``nursery.py SOCKET CONSOLE-SCRIPT MODULE...`` is such a process. It imports the modules, and forks for
whoever asks: this module's `Nurseries`, and the programs it puts on a PATH, which start the real command where a fork
would not be the same.
"""

import atexit
import contextlib
import gc
import json
import os
import re
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What each console script comes to import.
LOADED = {
    "vipo": (
        *("timm", "diffusers", "transformers", "peft", "torch.distributed.fsdp"),
        *("tensorboard.compat", "torch.utils.tensorboard", "matplotlib.pyplot", "pandas", "pyarrow.parquet"),
        *("rocrate.rocrate", "jinja2", "scipy.stats", "vipo.cli", "vipo.stages", "vipo.generators.flux"),
        *("vipo.training.recorded", "vipo.evaluation.evaluate", "vipo.reporting"),
    ),
    "snakemake": ("snakemake.cli", "snakemake.executors.local", "pandas", "vipo.config.compose", "vipo.stages"),
    "dvc": ("dvc.cli", "dvc.repo", "dvc.commands.repro"),
}
# Variables that no library reads while it is imported; where another one differs, nothing is forked.
FREE = re.compile(
    r"PATH|PYTHONPATH|PWD|OLDPWD|SHLVL|_|PYTEST_\w+|PYTHON|TORCH|MAKE\w*|MFLAGS|STAND|TE?MP(DIR)?|(VIPO|STAND|GIT|DVC|APPTAINER\w*?)_\w+"
)
# Of the nurseries alone, so that no library has a thread beside the one that forks. Snakemake sets the first ones too.
THREADLESS = {
    **dict.fromkeys(("GOTO_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **dict.fromkeys(("VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}

SESSION = b"another session"

Connection = socket.socket


# ---- whoever asks ----------------------------------------------------------------------------------------------------


def _asked(
    place: Path, command: Sequence[str], streams: Sequence[int], **more: object
) -> tuple[Connection, int] | None:
    """The connection to a fork that runs `command` as the calling process would, and its process id; None: refused."""
    connection = socket.socket(socket.AF_UNIX)
    request = {
        "command": command,
        "cwd": str(Path.cwd()),
        "environment": dict(os.environ),
        "group": os.getpgrp(),
        "session": os.getsid(0),
    } | more
    content = json.dumps(request).encode()
    try:
        connection.connect(str(place))
        socket.send_fds(connection, [len(content).to_bytes(8, "big")], list(streams))
        connection.sendall(content)
        answer = _line(connection)
    except OSError:
        answer = b""
    if not answer.isdigit():
        if answer != SESSION:
            with place.with_name("refused").open("a") as refused:
                refused.write(f"{shlex.join(command)}: {answer.decode()}\n")
        connection.close()
        return None
    return connection, int(answer)


def _line(connection: Connection) -> bytes:
    line = b""
    while not line.endswith(b"\n") and (byte := connection.recv(1)):
        line += byte
    return line.strip()


def stand_in(place: str, real: str) -> None:
    """What a program on the nurseries' PATH does: end as the fork ends, or become the real command."""
    begun = _asked(Path(place), [real, *sys.argv[1:]], [0, 1, 2])
    if begun is None:
        os.execv(real, [real, *sys.argv[1:]])
    status = int(_line(begun[0]))
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


class Forked:
    """A fork that runs a command, with what tests use of `subprocess.Popen`."""

    def __init__(self, connection: Connection, pid: int) -> None:
        self.pid, self.returncode = pid, None
        self._connection = connection

    returncode: int | None

    def poll(self) -> int | None:
        """The exit status, negative where a signal ended it; None while it runs."""
        return self._status(0)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status."""
        status = self._status(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        return status

    def _status(self, timeout: float | None) -> int | None:
        if self.returncode is None and select.select([self._connection], [], [], timeout)[0]:
            self.returncode = int(_line(self._connection))
            self._connection.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)


class Nurseries:
    """The nurseries of a test worker, each begun when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._processes = folder, dict[str, subprocess.Popen[bytes]]()
        self.programs = folder / "bin"
        self.programs.mkdir()

    def need(self, *names: str) -> Path:
        """Begin the nurseries of console scripts; the folder that a PATH finds programs of these names in."""
        missing = [name for name in names if name not in self._processes]
        for name in missing:
            command = [sys.executable, __file__, str(self._folder / name), name, *LOADED[name]]
            self._processes[name] = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=os.environ | THREADLESS
            )
        for name in missing:
            ready = self._processes[name].stdout
            assert ready is not None
            assert ready.readline() == b"ready\n", f"the nursery of {name} has not begun"
            program, real = self.programs / name, Path(sys.executable).with_name(name)
            program.write_text(
                f"#!{sys.executable} -IS\nimport sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
                f"import nursery\nnursery.stand_in({str(self._folder / name)!r}, {str(real)!r})\n"
            )
            program.chmod(0o755)
        return self.programs

    def start(
        self,
        *command: str | Path,
        cwd: Path,
        stderr: Any = None,
        stdout: Any = None,
        env: Mapping[str, str] | None = None,
        forked_ranks: bool = False,
    ) -> Forked:
        """Fork a `vipo` command, or a Python script; `forked_ranks`: its launcher forks the ranks, too."""
        self.need("vipo")
        streams = [0, *(own if given is None else given.fileno() for own, given in ((1, stdout), (2, stderr)))]
        with Path(os.devnull).open("rb") as nothing:
            streams[0] = nothing.fileno()
            more: dict[str, object] = {"cwd": str(cwd), "ranks": forked_ranks}
            if env is not None:
                more["environment"] = dict(env)
            begun = _asked(self._folder / "vipo", list(map(str, command)), streams, **more)
        assert begun is not None, f"is not forked, for its environment differs from the nursery's: {command}"
        return Forked(*begun)

    def run(self, *command: str | Path, cwd: Path, **how: Any) -> tuple[int, str, str]:
        """Run one to its end, `how` as `start` does: exit status, standard output, standard error."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            status = self.start(*command, cwd=cwd, stdout=out, stderr=err, **how).wait()
            said = []
            for stream in (out, err):
                stream.seek(0)
                said.append(stream.read().decode())
        return status, said[0], said[1]

    def end(self) -> None:
        """End them; what was forked and still runs is killed."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait()
        refused = self._folder / "refused"
        if refused.exists():
            warnings.warn(f"started, not forked, for these variables differ:\n{refused.read_text()}", stacklevel=1)


@contextlib.contextmanager
def nurseries() -> Iterator[Nurseries]:
    """None has begun yet; in the end all are ended."""
    # A socket's path is at most 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="nursery"))
    begun = Nurseries(folder)
    try:
        yield begun
    finally:
        begun.end()
        shutil.rmtree(folder)


# ---- the nursery itself ----------------------------------------------------------------------------------------------


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
