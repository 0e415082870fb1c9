"""Trains one run in forked children, each killed at a given moment or left to finish (used by test_resume).

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
    """Arguments: results folder, JSON list of moments, overrides.

    A moment is null (let it finish) or ``[updates, seconds]``: kill that many seconds after ``metrics.jsonl``
    holds that many updates.
    """
    from vipo.config.compose import load_config, repository_root
    from vipo.training.recorded import train_run

    results, moments, overrides = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    config, root = load_config(overrides), repository_root()
    metrics = results / "demo/runs" / config.run_name / "metrics.jsonl"
    for moment in moments:
        child = os.fork()
        if child == 0:
            train_run(config, root, results / "demo")
            os._exit(0)
        if moment is not None:
            while (metrics.read_bytes().count(b"\n") if metrics.is_file() else 0) < moment[0]:
                time.sleep(0.002)
            time.sleep(moment[1])
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
        print("killed" if os.WIFSIGNALED(status) else f"finished {os.waitstatus_to_exitcode(status)}", done, flush=True)


if __name__ == "__main__":
    main()
