"""A command's process ends as Python ends one, but for what it takes apart."""

import os
import subprocess
import sys

_PROCESS = """
import atexit, sys, threading, time
from vipo.ending import end_process
class Imported:
    def __del__(self):
        print("taken apart", flush=True)
kept = Imported()
def late():
    time.sleep(0.3)
    print("a thread")
threading.Thread(target=late).start()
atexit.register(lambda: print("an exit function", file=sys.stderr))
print("work")
end_process()
print("went on")
"""


def test_threads_exit_functions_and_streams_have_their_end() -> None:
    ran = subprocess.run([sys.executable, "-c", _PROCESS], capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "work\na thread\n", "an exit function\n")


def test_what_cannot_be_written_is_no_success() -> None:
    """As Python ends where a reader of its output is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    ran = subprocess.run([sys.executable, "-c", _PROCESS], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert ran.returncode != 0
    assert b"BrokenPipeError" in ran.stderr
