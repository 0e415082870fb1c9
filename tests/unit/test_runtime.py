"""What a command asks of Python and of the C library, seen by what the kernel counts."""

import os
import subprocess
import sys

import pytest

_AGAIN = """
import gc, resource, sys
from vipo.runtime import settle_runtime
if sys.argv[1] == "settled":
    settle_runtime()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def use():
    del [bytearray(b"x") * 2**21 for _ in range(8)][:]
use()
before = faults()
for _ in range(4):
    use()
print(faults() - before, gc.get_threshold()[0])
"""


def _faults(how: str) -> tuple[int, int]:
    told = subprocess.run([sys.executable, "-c", _AGAIN, how], check=True, capture_output=True, text=True).stdout
    faults, threshold = map(int, told.split())
    return faults, threshold


def test_a_process_begins_with_the_workspace_that_deterministic_products_need() -> None:
    # A text encoder's products come before anything is deterministic, and PyTorch looks at the environment once.
    script = "import os; from vipo.runtime import settle_runtime; settle_runtime(); print(os.environ[os.sys.argv[1]])"
    command, environment = (
        [sys.executable, "-c", script, "CUBLAS_WORKSPACE_CONFIG"],
        os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":0:0"},
    )
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout
    assert told == ":4096:8\n"


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_memory_that_was_freed_is_used_again_without_new_pages() -> None:
    settled, threshold = _faults("settled")
    usual, _ = _faults("usual")
    # 16 MiB are 4096 pages.
    assert settled < 100
    assert usual > 4 * 2048
    assert threshold == 10_000
