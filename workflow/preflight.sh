#!/bin/sh
# What `make env` needs, looked at before anything is made or downloaded: workflow/preflight.sh [--python]
# Ends with status 1 and one message that lists all that is missing. --python: print the interpreter to use instead.
# PYTHON: an interpreter of your choice. TORCH: refused, there is no other build. UV: where uv is or will be. DISK_GB: what the environment takes.
set -eu
LC_ALL=C
export LC_ALL
cd "$(dirname "$0")/.."

missing= packages= notes=
miss() {
  missing="$missing
  - $1"
  packages="$packages${2:+ $2}"
}
has() { command -v "$1" >/dev/null 2>&1; }

# The interpreter: the first of these that requirements.lock is for.
python= seen=
for name in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
  has "$name" || continue
  version=$("$name" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
  case $version in
    3.11 | 3.12 | 3.13) python=$(command -v "$name"); break ;;
    *) seen="$seen $name is $version;" ;;
  esac
done
if [ "${1:-}" = --python ]; then
  echo "$python"
  exit
fi

if [ -n "${TORCH:-}" ]; then
  miss "TORCH=$TORCH: there is one build of PyTorch to choose; PyPI has no CPU-only one for Linux: leave TORCH out"
fi
if [ -z "$python" ]; then
  what="Python 3.11, 3.12 or 3.13: ${PYTHON:+PYTHON=$PYTHON is none;}${seen:- no python3 here;}"
  offered= usual=
  if has apt-cache; then
    usual=$(apt-cache show python3 2>/dev/null | sed -n 's/^Version: \([0-9]*\.[0-9]*\).*/\1/p' | head -n 1)
    case $usual in
      3.11 | 3.12 | 3.13) [ -n "$seen" ] || offered="python3 python3-venv" ;;
      ?*)
        for version in 3.13 3.12 3.11; do
          [ -z "$offered" ] && apt-cache show "python$version-venv" >/dev/null 2>&1 || continue
          offered="python$version python$version-venv"
        done ;;
    esac
  fi
  if [ -n "$offered" ]; then
    miss "$what" "$offered"
  elif [ -n "$seen" ] || [ -n "$usual" ]; then
    miss "$what no package of one is known here; install it another way, then: make env PYTHON=/path/to/python3.13"
  else
    miss "$what" "python3 python3-venv"
  fi
elif ! [ -x "${UV:-.uv/bin/uv}" ] && ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
  case $(basename "$python") in
    python3.*) miss "venv with pip for $python" "$(basename "$python")-venv" ;;
    *) miss "venv with pip for $python" python3-venv ;;
  esac
fi

has git || miss "git: records say which commit made a result" git

# Wheels for everything; two packages come as source without compiled code. PyTorch's wheels are for these machines.
if [ "$(uname -s)" = Linux ]; then
  case $(uname -m) in
    x86_64 | aarch64) ;;
    *) miss "an x86_64 or aarch64 processor: PyTorch has no package for $(uname -m)" ;;
  esac
  libc=$(getconf GNU_LIBC_VERSION 2>/dev/null || echo "another libc")
  case $libc in
    glibc\ 2.[0-9] | glibc\ 2.1? | glibc\ 2.2[0-7] | another*)
      miss "glibc 2.28 or newer, which PyTorch's packages are built for: here is $libc" ;;
  esac
fi

# The cache keeps every package unpacked; on the same disk, the environment shares those files with it.
free_gb() { df -Pk "$1" | awk 'NR == 2 { print int($4 / 1048576) }'; }
disk_of() { df -Pk "$1" | awk 'NR == 2 { print $1 }'; }
existing() {
  folder=$1
  while ! [ -d "$folder" ]; do folder=$(dirname "$folder"); done
  echo "$folder"
}
if ! [ -e .venv/.complete ]; then
  needed=${DISK_GB:-9}
  kept_in=${UV_CACHE_DIR:-${XDG_CACHE_HOME:-${HOME:-/}/.cache}/uv}
  cache=$(existing "$kept_in")
  for folder in . "$cache"; do
    [ "$folder" = . ] || [ "$(disk_of .)" != "$(disk_of "$cache")" ] || continue
    free=$(free_gb "$folder")
    [ "$free" -lt "$needed" ] || continue
    # What an interrupted try has there already; a large cache takes minutes to count. A home without one is not looked through.
    kept=$( (du -sk .venv "$kept_in" 2>/dev/null || true) | awk '{ if ($1 > most) most = $1 } END { print int(most / 1048576) }')
    if [ $((free + kept)) -lt "$needed" ]; then
      miss "$needed GB of free disk in $(cd "$folder" && pwd): $free GB are free"
    fi
  done
fi

# A GPU's driver decides which CUDA it runs; without a GPU everything runs on the CPU.
cuda=$(sed -n 's/^nvidia-cuda-runtime==\([0-9]*\)\..*/\1/p' requirements.lock)
driver=
if has nvidia-smi; then
  driver=$(nvidia-smi --query-gpu=driver_version --format=csv,noheader 2>/dev/null | head -n 1) || driver=
fi
case $cuda in
  12) lowest=525 ;;
  13) lowest=580 ;;
  *) lowest=0 ;;
esac
case ${driver%%.*} in
  '' | *[!0-9]*) ;;
  *) if [ "${driver%%.*}" -lt "$lowest" ]; then
       notes="note: the NVIDIA driver here is $driver, and PyTorch in requirements.lock is built for CUDA $cuda, which needs driver $lowest or
newer: until then everything runs, on the CPU alone"
     fi ;;
esac

[ -z "$notes" ] || echo "$notes" >&2
if [ -n "$missing" ]; then
  {
    echo "error: \`make env\` needs what is not here:$missing"
    [ -z "$packages" ] || echo "on Debian or Ubuntu: sudo apt-get update && sudo apt-get install --yes$packages"
    echo "then give the same command again; nothing was made or downloaded"
  } >&2
  exit 1
fi
