"""What is forked is as what is started; where it would not be, it is started."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from nursery import Nurseries, nurseries
from waits import SECONDS, eventually

TELL = """
import json, os, sys, threading
print(json.dumps([sys.argv, os.getcwd(), dict(os.environ), os.getpgrp(), sys.path, __name__, sys.stdin.read()]))
print("told", file=sys.stderr)
threading.Thread(target=lambda: print("a thread's")).start()
sys.exit(int(sys.argv[1]))
"""


def test_a_fork_is_as_a_start(forks: Nurseries, tmp_path: Path) -> None:
    (tmp_path / "tell.py").write_text(TELL)
    environment = os.environ | {"STAND_AT": "7", "PYTHONPATH": f"{tmp_path}/a:{tmp_path}/b"}
    script = str(tmp_path / "tell.py")
    code, out, err = forks.run(script, "3", cwd=tmp_path, env=environment)
    started = subprocess.run(
        [sys.executable, script, "3"],
        cwd=tmp_path, env=environment, text=True, stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    assert (code, err) == (started.returncode, started.stderr) == (3, "told\n")
    (mine, *rest), (real, *others) = out.splitlines(), started.stdout.splitlines()
    assert rest == others == ["a thread's"]
    forked, expected = json.loads(mine), json.loads(real)
    # What PyTorch sets when it is imported.
    assert forked[2].keys() - expected[2].keys() <= {"TORCHINDUCTOR_CACHE_DIR"}
    forked[2] = {name: value for name, value in forked[2].items() if name in expected[2]}
    assert forked == expected


def test_signals_reach_a_fork_and_its_end_is_told(forks: Nurseries, tmp_path: Path) -> None:
    (tmp_path / "wait.py").write_text("import pathlib, time\npathlib.Path('here').touch()\nwhile True: time.sleep(1)\n")
    for number in (signal.SIGTERM, signal.SIGKILL):
        process = forks.start(tmp_path / "wait.py", cwd=tmp_path)
        eventually("the fork has begun", (tmp_path / "here").exists)
        assert process.poll() is None
        process.send_signal(number)
        assert process.wait(SECONDS) == -number
        (tmp_path / "here").unlink()
    (tmp_path / "raise.py").write_text("raise ValueError('of mine')\n")
    code, _, err = forks.run(tmp_path / "raise.py", cwd=tmp_path)
    assert code == 1
    assert err.endswith("ValueError: of mine\n")


def test_what_a_library_may_have_read_at_its_import_is_not_forked(tmp_path: Path) -> None:
    refused = {"HF_HOME": str(tmp_path), "PYTHONHASHSEED": "1"}

    def version(programs: Path, **how: object) -> str:
        done = subprocess.run([programs / "dvc", "--version"], check=True, capture_output=True, text=True, **how)  # type: ignore[call-overload]
        return str(done.stdout)

    with contextlib.ExitStack() as stack:
        own = stack.enter_context(nurseries())
        programs = own.need("dvc")
        real = version(Path(sys.executable).parent)
        assert version(programs) == version(programs, start_new_session=True) == real
        assert version(programs, env=os.environ | refused) == real
        with pytest.warns(UserWarning, match="HF_HOME") as warned:
            stack.close()
    (warning,) = warned
    assert "dvc --version: " in str(warning.message)
    assert "PYTHONHASHSEED" in str(warning.message)
