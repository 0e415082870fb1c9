#!/usr/bin/env bash
# Proves and measures vipo on one NVIDIA GPU: at most 8 minutes, no network. Writes gpu.json and gpu.md.
#   benchmarks/gpu/run.sh [FOLDER] [--device cuda] [--tiny] [--only STEP ...]
# A machine without vipo's environment needs the wheels that benchmarks/gpu/wheels.sh gathered, in WHEELS (default .wheels).
set -euo pipefail
cd "$(dirname "$0")/../.."

python=${PYTHON:-python3}
if [ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ]; then python=.venv/bin/python; fi
wheels=${WHEELS:-.wheels}
if [ -d "$wheels" ] && [ -n "$(ls "$wheels"/*.whl 2>/dev/null)" ]; then
  site=$(mktemp -d)
  trap 'rm -rf "$site"' EXIT
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1
"$python" -m benchmarks.gpu.gpu "$@"
