"""Trains a run in forked children, each killed at a given moment or left to finish (used by test_resume).

Forking from a process that has imported everything makes a kill cost a second instead of five, so that many
different moments fit into a test. Prints one line per child: `killed` or `finished`.
"""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path


def kill_at(updates: int, seconds: float, metrics: Path) -> None:
    """Let this process kill itself `seconds` after ``metrics.jsonl`` holds that many updates.

    From inside: whatever else the machine does, it cannot be further than that when the kill comes.
    """

    def watch() -> None:
        while (metrics.read_bytes().count(b"\n") if metrics.is_file() else 0) < updates:
            time.sleep(0.002)
        time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> None:
    """Arguments: JSON list of results folders, each with its list of moments; overrides.

    A moment is null (let it finish) or ``[updates, seconds]``: kill that many seconds after ``metrics.jsonl``
    holds that many updates.
    """
    # What a training loads, once.
    import timm  # noqa: F401

    import vipo.generators.flux  # noqa: F401
    from vipo.config.compose import load_config, repository_root
    from vipo.training.recorded import train_run

    config, root = load_config(sys.argv[2:]), repository_root()
    for results, moments in json.loads(sys.argv[1]):
        metrics = Path(results, "demo/runs", config.run_name, "metrics.jsonl")
        for moment in moments:
            child = os.fork()
            if child == 0:
                if moment is not None:
                    kill_at(*moment, metrics)
                train_run(config, root, Path(results, "demo"))
                os._exit(0)
            _, status = os.waitpid(child, 0)
            done = metrics.read_bytes().count(b"\n") if metrics.is_file() else 0
            how = "killed" if os.WIFSIGNALED(status) else f"finished {os.waitstatus_to_exitcode(status)}"
            print(how, done, flush=True)


if __name__ == "__main__":
    main()
