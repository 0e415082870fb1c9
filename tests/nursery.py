"""Commands as forks of processes that have imported what they import: a start takes seconds of imports, a fork none.

What is forked is a process like another, with arguments, environment, working directory, standard streams, process
group and exit status of its own, to be waited for, signalled and killed. Three things are not as after a start, and
what they matter to is tested on real ones: nothing is imported any more, all forks of one process share its hash seed,
and /proc shows the arguments and environment of where they came from.

`Nurseries` begins such processes (nursery_process.py), and asks them for forks; so do the programs that it puts on a
PATH, which start the real command where a fork would not be the same.
"""

import contextlib
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
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

# What each console script comes to import.
LOADED = {
    "vipo": (
        *("timm", "diffusers", "transformers", "peft", "torch.distributed.fsdp"),
        *("tensorboard.compat", "torch.utils.tensorboard", "matplotlib.pyplot", "pandas", "pyarrow.parquet"),
        *("rocrate.rocrate", "jinja2", "scipy.stats", "vipo.cli", "vipo.stages", "vipo.generators.flux"),
        *("vipo.training.recorded", "vipo.evaluation.sample", "vipo.evaluation.score", "vipo.reporting"),
    ),
    "snakemake": ("snakemake.cli", "snakemake.executors.local", "pandas", "vipo.config.compose", "vipo.stages"),
    "dvc": ("dvc.cli", "dvc.repo", "dvc.commands.repro"),
}
# Variables that no library reads while it is imported, and what PyTorch sets once it computes, also in the fixtures of
# a session, whose variables no test takes back; where another one differs, nothing is forked.
FREE = re.compile(
    r"PATH|PYTHONPATH|PWD|OLDPWD|SHLVL|_|TE?MP(DIR)?|PYTHON|TORCH|MAKE\w*|MFLAGS|STAND"
    r"|(VIPO|STAND|GIT|DVC|PYTEST|TORCHINDUCTOR|CUBLAS|APPTAINER\w*?)_\w+"
)
# Of the nurseries alone, so that no library has a thread beside the one that forks. Snakemake sets the first ones too.
THREADLESS = {
    **dict.fromkeys(("GOTO_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    **dict.fromkeys(("VECLIB_MAXIMUM_THREADS", "NUMEXPR_NUM_THREADS"), "1"),
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}

SESSION = b"another session"
PROCESS = Path(__file__).with_name("nursery_process.py")

Connection = socket.socket


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
        answer = line(connection)
    except OSError:
        answer = b""
    if not answer.isdigit():
        if answer != SESSION:
            with place.with_name("refused").open("a") as refused:
                refused.write(f"{shlex.join(command)}: {answer.decode()}\n")
        connection.close()
        return None
    return connection, int(answer)


def line(connection: Connection) -> bytes:
    """The next line that comes, without its end."""
    told = b""
    while not told.endswith(b"\n") and (byte := connection.recv(1)):
        told += byte
    return told.strip()


def stand_in(place: str, real: str) -> None:
    """What a program on the nurseries' PATH does: end as the fork ends, or become the real command."""
    begun = _asked(Path(place), [real, *sys.argv[1:]], [0, 1, 2])
    if begun is None:
        os.execv(real, [real, *sys.argv[1:]])
    # From a terminal it reaches the fork as well, which may go on for a while.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    status = int(line(begun[0]))
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
            self.returncode = int(line(self._connection))
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
            command = [sys.executable, str(PROCESS), str(self._folder / name), name, *LOADED[name]]
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
        if begun is None:
            refused = (self._folder / "refused").read_text().splitlines()[-1].rpartition(": ")[2]
            raise AssertionError(f"not forked: {refused} differ from the nursery's ({command[0]})")
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
        """End them; what was forked and still runs is killed when this process ends."""
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
