"""Trains one run in forked children that are killed at given moments, then once to the end (used by test_resume).

Forking from a process that has imported everything makes a kill cost a second instead of ten, so that many
different moments fit into a test. Prints one line per child: `killed` or `finished`.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path


def main() -> None:
    """Arguments: results folder, JSON list of delays in seconds (null: let it finish), overrides."""
    from vipo.config.compose import load_config, repository_root
    from vipo.training.trainer import train_run

    results, delays, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    config, root = load_config(overrides), repository_root()
    for delay in delays:
        child = os.fork()
        if child == 0:
            train_run(config, root, results / "demo")
            os._exit(0)
        if delay is not None:
            time.sleep(delay)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        print("killed" if os.WIFSIGNALED(status) else f"finished {os.waitstatus_to_exitcode(status)}", flush=True)


if __name__ == "__main__":
    main()
