"""The resolved configurations that stages read, in results/NAME/configs/.

Who only reads the rules (a dry run, --lint, a start that Snakemake's lock will refuse) must leave alone what jobs of a
running workflow have yet to read. Rules need the files to be there, so that missing ones are written at once; what
differs waits for the start, which holds the lock. Until then parameters, not files, say what would run again.
"""

import sys

from vipo.config.compose import dump_config, write_if_missing
from vipo.provenance.files import StorageError, atomic_file

# Or as it may be cut short.
if workflow.is_main_process and any(word.startswith("--no-h") for word in sys.argv):
    raise WorkflowError(
        "--no-hooks: leaves out what a start begins with: jobs would read the configurations of an earlier one, and "
        "finished results would be deleted unasked; leave it out"
    )

CONFIGURATIONS = {
    Path(EXPERIMENT_DIR, "configs", f"{run}.yaml"): dump_config(resolved)
    for run, resolved in RUNS.items()
}
# A job on another node reads the rules too, perhaps before it sees what its snakemake has written.
ADDED = [
    file
    for file, text in CONFIGURATIONS.items()
    if workflow.is_main_process and write_if_missing(file, text)
]


def write_configurations():
    """Where the workflow starts: the configurations that it was started with."""
    try:
        for file, text in CONFIGURATIONS.items():
            if not file.is_file() or file.read_bytes() != text.encode():
                with atomic_file(file) as temporary:
                    temporary.write_text(text, encoding="utf-8")
    except (StorageError, OSError) as error:
        raise WorkflowError(str(error)) from error


def remove_added_configurations():
    """Where nothing starts, nothing was touched."""
    for file in ADDED:
        file.unlink(missing_ok=True)
