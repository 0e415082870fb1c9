#!/usr/bin/env bash
# Runs a command as if on a machine with NVIDIA GPUs: benchmarks/gpu/README.md says what that proves and what it cannot.
#   benchmarks/gpu/rehearsal/rehearse.sh COMMAND...
# REHEARSAL_GPUS    how many there are (1)
# REHEARSAL_BYTES   memory of each (80 GiB)
# REHEARSAL_GHOST   N: results of operators of more than N values are allocated and never computed, for real sizes
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x "$root/.venv/bin/python" ]; then python=$root/.venv/bin/python; fi
REHEARSAL_BUILT=$("$python" "$here/build.py")
export REHEARSAL_BUILT REHEARSAL_GPUS=${REHEARSAL_GPUS:-1}
export LD_LIBRARY_PATH=$REHEARSAL_BUILT${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
export LD_PRELOAD=$REHEARSAL_BUILT/librehearsal.so${LD_PRELOAD:+:$LD_PRELOAD}
export PYTHONPATH=$here/site${PYTHONPATH:+:$PYTHONPATH}
exec "$@"
